"""The pieces of context parallel, in one process: parts merged by lse, gradients from the global lse, shards of heads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attn_core.declaration import ContextParallelSupport
from attn_core.testing.checking import check, differentiable
from attn_core.testing.outcomes import CheckFailed, NotChecked
from attn_core.testing.reference import reference
from attn_core.testing.tolerances import bounds
from attn_core.testing.trying import made, reference_of, within

if TYPE_CHECKING:
    from collections.abc import Callable

    from attn_core.declaration import BackendSpec
    from attn_core.testing.building import Built
    from attn_core.testing.drawing import Case
    from attn_core.testing.subject import Subject

RANKS = 3
SLACK = 2
"""The pieces round as the whole does, and their sum once more."""


def _mode(name: str) -> Callable[[BackendSpec], bool]:
    def declares(spec: BackendSpec) -> bool:
        return isinstance(spec.context_parallel, ContextParallelSupport) and bool(getattr(spec.context_parallel, name))

    return declares


def _cases(subject: Subject, **fields: Any) -> list[Case]:
    """Calls of as many queries as keys, of RANKS equal parts."""
    each = [
        {"queries": 16 * RANKS, "keys": None, "mask": "none", "causal": causal, **fields} for causal in (False, True)
    ]
    cases = subject.draw(6, "dtype", "heads", "scale", "softcap", each=each)
    return [case for case in cases if case.mask == "none" and case.queries == 16 * RANKS and case.keys is None]


def _parts(case: Case) -> list[tuple[slice, slice, bool]]:
    """What each rank computes in turn: rows of queries, rows of keys, and whether they meet at the diagonal."""
    size = case.queries // RANKS
    rows = [slice(size * n, size * (n + 1)) for n in range(RANKS)]
    return [
        (rows[q], rows[k], case.causal and q == k)
        for q in range(RANKS)
        for k in range(RANKS)
        if not case.causal or k <= q
    ]


def _options(built: Built, *, causal: bool) -> dict[str, Any]:
    options = {
        name: item for name, item in built.options.items() if name not in ("return_lse", "causal", "deterministic")
    }
    return {**options, **({"causal": True} if causal else {})}


def _merged(subject: Subject, built: Built, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole result and lse from those of the parts, merged by ``lse = logaddexp(a, b)`` in float32 or better."""
    wide = torch.promote_types(built.query.dtype, torch.float32)
    batch, queries, heads, _ = built.query.shape
    out = built.query.new_zeros(batch, queries, heads, built.value.shape[3], dtype=wide)
    lse = built.query.new_full((batch, heads, queries), -torch.inf, dtype=wide)
    for rows, keys, diagonal in _parts(case):
        part, part_lse = subject.call(
            built.query[:, rows], built.key[:, keys], built.value[:, keys],
            return_lse=True, **_options(built, causal=diagonal),
        )  # fmt: skip
        before = lse[:, :, rows].clone()
        after = torch.logaddexp(before, part_lse.to(wide))
        weights = [(one - after).exp().mT[..., None] for one in (before, part_lse.to(wide))]
        out[:, rows] = out[:, rows] * weights[0] + part.to(wide) * weights[1]
        lse[:, :, rows] = after
    return out, lse


@check("ring-forward", when=_mode("ring"))
def ring_forward(subject: Subject) -> str:
    """Results of parts of the keys, merged by their lse, are the result of the whole."""
    cases = [case for case in _cases(subject, return_lse=True) if case.return_lse]
    for case in subject.require(cases, "lse"):
        built = made(case)
        out, lse = _merged(subject, built, case)
        expected, allowed = reference_of(built, case)
        within(out, expected["out"], SLACK * allowed["out"], subject, "merged result", case)
        within(lse, expected["lse"], SLACK * allowed["lse"], subject, "lse, merged,", case)
    return f"{len(cases)} calls in {RANKS} parts"


@check("ring-backward", when=lambda spec: _mode("ring")(spec) and differentiable(spec))
def ring_backward(subject: Subject) -> str:
    """Gradients of parts, each from the whole's result and lse, add up to the gradients of the whole."""
    backward = subject.adapter.backward
    if backward is None:
        msg = "its declaration names no backward, so ring serves inference alone"
        raise NotChecked(msg)
    cases = _cases(subject, return_lse=True)
    cases = [case for case in cases if subject.admits(replace(case, gradients=("query", "key", "value")))]
    if not cases:
        msg = f"no call with lse and a gradient is admitted on {subject.device}"
        raise NotChecked(msg)
    for case in cases:
        built = made(case)
        out, lse = _merged(subject, built, case)
        out = out.to(built.query.dtype)
        wide = torch.promote_types(built.query.dtype, torch.float32)
        found = {name: torch.zeros_like(getattr(built, name), dtype=wide) for name in ("query", "key", "value")}
        for rows, keys, diagonal in _parts(case):
            parts = backward(
                built.grad_out[:, rows], built.query[:, rows], built.key[:, keys], built.value[:, keys],
                out[:, rows], lse[:, :, rows].contiguous(), **_scaled(built, case, causal=diagonal),
            )  # fmt: skip
            for name, place, part in zip(found, (rows, keys, keys), parts, strict=True):
                found[name][:, place] += part.to(wide)
        _compare(subject, case, built, found)
    return f"{len(cases)} calls in {RANKS} parts"


def _scaled(built: Built, case: Case, *, causal: bool) -> dict[str, Any]:
    """The options as the core gives them to an adapter: scale always."""
    options = _options(built, causal=causal)
    return {**options, "scale": float(options.get("scale", case.dim**-0.5))}


def _compare(subject: Subject, case: Case, built: Built, found: dict[str, torch.Tensor]) -> None:
    leaves = [getattr(built, name).detach().double().requires_grad_() for name in found]
    options = _options(built, causal=case.causal)
    expected, _ = reference(*leaves, **options)
    exact = torch.autograd.grad(expected, leaves, built.grad_out.double())
    allowed = bounds(*leaves, grad_out=built.grad_out, dtype=built.query.dtype, **options)
    for name, wanted in zip(found, exact, strict=True):
        bound = SLACK * RANKS * getattr(allowed, name)
        within(found[name], wanted, bound, subject, f"gradient of {name}, added up from parts,", case)


def _same_for_all_heads(case: Case) -> bool:
    return case.mask not in ("bool", "float") or case.mask_once[1]


@check("ulysses", when=_mode("ulysses"))
def ulysses(subject: Subject) -> str:
    """Each shard of the heads gives its shard of the result."""
    each = [{"heads": heads} for heads in ((6, 6), (6, 3), (6, 2))]
    cases = subject.draw(4, "dtype", "mask", "causal", "return_lse", each=each, where=_same_for_all_heads)
    for case in cases:
        built = made(case)
        expected, allowed = reference_of(built, case)
        shards = case.heads[1]
        for n in range(shards):
            queries = slice(n * case.heads[0] // shards, (n + 1) * case.heads[0] // shards)
            tensors = built.query[:, :, queries], built.key[:, :, n : n + 1], built.value[:, :, n : n + 1]
            found = subject.call(*tensors, **built.options)
            out = found[0] if isinstance(found, tuple) else found
            within(
                out,
                expected["out"][:, :, queries],
                allowed["out"][:, :, queries],
                subject,
                f"result of shard {n}",
                case,
            )
    if not cases:
        msg = "it declares ulysses, but admits no call of 6 heads"
        raise CheckFailed(msg)
    return f"{len(cases)} calls in shards of their heads"
