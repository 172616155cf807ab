"""Large and tiny numbers, long sums, NaN and infinity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_core.testing.checking import check
from attn_core.testing.outcomes import CheckFailed
from attn_core.testing.reference import reference
from attn_core.testing.trying import hold, made, reference_of, results_and_gradients, tried, within

if TYPE_CHECKING:
    from attn_core.testing.building import Built
    from attn_core.testing.subject import Subject

ALL = ("query", "key", "value")
KEYS = 4500
QUERIES = 8300


@check("magnitudes")
def magnitudes(subject: Subject) -> str:
    """Scores of thousands do not overflow, and numbers near 0 are not lost."""
    each = [{"amplitude": size, "scale": None} for size in (30.0, 1e-3, 10.0, 1e-4)]
    each += [{"amplitude": 4.0, "scale": 5.0}, {"amplitude": 1.0, "scale": -20.0}]
    return subject.hold(subject.draw(14, "dtype", "mask", "causal", "return_lse", "gradients", each=each))


@check("accumulation")
def accumulation(subject: Subject) -> str:
    """Sums over thousands of keys, and in the backward of queries, of one sign keep the accuracy of float32."""
    subject.leave_out_if_quick()
    each: list[dict[str, Any]] = [{"queries": 12, "keys": KEYS}, {"queries": KEYS, "causal": True}, {"queries": KEYS}]
    shapes: tuple[dict[str, Any], ...] = ({"batch": 1, "heads": (1, 1)}, {"batch": 1})
    each = subject.admitted({**shape, **item} for shape in shapes for item in each)[:1]
    if not each:
        return "it admits no plain call of thousands of keys"
    cases = subject.draw(3, "dtype", "return_lse", each=each)
    for case in cases:
        built = made(case)
        built.query.mul_(0.05)
        built.value.abs_().add_(1.0)
        found = tried(subject, built)
        if found is None:
            continue
        expected, allowed = reference_of(built, case)
        for name, result in zip(("out", "lse"), found, strict=False):
            within(result, expected[name], allowed[name], subject, name, case)
    shown = f"{len(cases)} calls of {max(case.queries if case.keys is None else case.keys for case in cases)} keys"
    return f"{shown}, {_accumulated_backwards(subject)} backwards"


def _accumulated_backwards(subject: Subject) -> int:
    """Hold the gradients of thousands of queries, of one sign, to the accuracy of float32; how many calls there were."""
    shape: dict[str, Any] = {"batch": 1, "heads": (1, 1), "gradients": ALL}
    each = subject.admitted([{**shape, "queries": QUERIES, "keys": 5}, {**shape, "queries": 2000, "keys": None}])[:1]
    cases = subject.draw(4, "dtype", each=each, where=lambda case: bool(case.gradients)) if each else []
    for case in cases:
        built = case.build()
        with torch.no_grad():
            built.query.mul_(0.05)
            built.grad_out.abs_().add_(1.0)
        hold(subject, case, results_and_gradients(subject, case, built), "of numbers of one sign", built)
    return len(cases)


@check("nan-and-inf")
def nan_and_inf(subject: Subject) -> str:
    """NaN and infinity in what a query sees come through, a NaN in scores into the lse too; they are never hidden."""
    bads = (("value", torch.nan), ("value", torch.inf), ("value", -torch.inf), ("key", torch.nan), ("query", torch.nan))
    each = [{"layouts": ("contiguous",) * 3}]
    cases = subject.draw(10, "mask", "causal", "window_size", "lengths", "heads", "dtype", "return_lse", each=each)
    tries = 0
    for case in cases:
        for name, bad in bads:
            built = made(case)
            row = getattr(built, name).shape[1] // 2
            getattr(built, name)[0, row, 0, 0] = bad
            found = tried(subject, built)
            if found is None:
                continue
            tries += 1
            hit = _what_sees(built, case.heads, name, row, found[0])
            if bool(hit.isfinite().any()):
                msg = f"{bad} in {name} row {row} gives finite results where it is seen, in {case!r}"
                raise CheckFailed(msg)
            if name != "value" and len(found) == 2:
                of_lse = _what_sees(built, case.heads, name, row, found[1].transpose(1, 2).unsqueeze(3))
                if not bool(of_lse.isnan().all()):
                    msg = f"{bad} in {name} row {row} is not in the lse of what sees it, in {case!r}"
                    raise CheckFailed(msg)
    return f"{tries} calls"


def _what_sees(built: Built, heads: tuple[int, int], name: str, row: int, out: torch.Tensor) -> torch.Tensor:
    """The results into which a bad number at ``[0, row, 0, 0]`` has to come."""
    sees, group = visible_keys(built)[0], heads[0] // heads[1]
    if name == "query":
        return out[0, row, :1][sees[:1, row].any(-1)]
    if name == "key":
        return out[0, :, :group][sees[:group, :, row].T]
    return out[0, :, :group, 0][sees[:group, :, row].T]


def visible_keys(built: Built) -> torch.Tensor:
    """Which keys each query sees, as the reference has it: bool (B, Hq, Sq, Skv)."""
    keys = built.key.shape[1]
    unit = torch.eye(keys, device=built.key.device)[None, :, None].expand(
        built.key.shape[0], -1, built.key.shape[2], -1
    )
    options = {name: option for name, option in built.options.items() if name not in ("deterministic", "return_lse")}
    zeros = torch.zeros_like(built.query), torch.zeros_like(built.key)
    out, _ = reference(*zeros, unit, **{**options, "scale": 0})
    return out.transpose(1, 2) > 0
