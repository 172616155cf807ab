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
LENGTH = 128 * RANKS
"""Of a whole sequence, so that each part is of a length that most kernels take."""
SLACK = 2
"""The pieces round as the whole does, and their sum once more."""


def _mode(name: str) -> Callable[[BackendSpec], bool]:
    def declares(spec: BackendSpec) -> bool:
        return isinstance(spec.context_parallel, ContextParallelSupport) and bool(getattr(spec.context_parallel, name))

    return declares


def _cases(subject: Subject) -> list[Case]:
    """Calls without a mask or window, of as many queries as keys, of RANKS equal parts."""
    whole = {"keys": None, "mask": "none", "window_size": None, "return_lse": True}
    each = [{**whole, "queries": LENGTH, "causal": causal} for causal in (False, True)]
    cases = subject.draw(6, "dtype", "heads", "scale", "softcap", each=each)
    cases = [
        case
        for case in cases
        if all(getattr(case, name) == value for name, value in whole.items()) and case.queries % RANKS == 0
    ]
    if not cases:
        msg = f"it admits no call with lse, and without a mask or window, of whole sequences of {LENGTH}"
        raise NotChecked(msg)
    return cases


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
    cases = _cases(subject)
    for case in cases:
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
    cases = [case for case in _cases(subject) if subject.admits(replace(case, gradients=("query", "key", "value")))]
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


def _shards(subject: Subject, case: Case) -> list[Case]:
    """The same call for each shard of its heads: of one key head each, or else fewer; those of one key head share it."""
    heads, key_heads = case.heads
    for count in (key_heads, 4, 3, 2):
        divides = heads % count == 0 and (key_heads == 1 or key_heads % count == 0)
        shard = replace(case, heads=(heads // count, max(key_heads // count, 1)))
        if count > 1 and divides and subject.admits(shard):
            return [shard] * count
    return []


@check("ulysses", when=_mode("ulysses"))
def ulysses(subject: Subject) -> str:
    """Each shard of the heads gives its shard of the result."""
    pairs = ((6, 6), (6, 3), (6, 2), (6, 1), (16, 16), (16, 2), (16, 1))
    each = [{"heads": heads} for heads in pairs]

    def wanted(case: Case) -> bool:
        return case.heads in pairs and _same_for_all_heads(case) and bool(_shards(subject, case))

    cases = subject.draw(4, "dtype", "mask", "causal", "return_lse", each=each, where=wanted)
    shards = {case: _shards(subject, case) for case in cases}
    if not shards:
        msg = f"it declares ulysses, but admits no call of {', '.join(map(str, pairs))} heads and of shards of these"
        raise CheckFailed(msg)
    for case, own in shards.items():
        built = made(case)
        expected, allowed = reference_of(built, case)
        for n, shard in enumerate(own):
            queries = slice(n * shard.heads[0], (n + 1) * shard.heads[0])
            first = n * case.heads[1] // len(own)
            keys = slice(first, first + shard.heads[1])
            found = subject.call(
                built.query[:, :, queries], built.key[:, :, keys], built.value[:, :, keys], **built.options
            )
            out = found[0] if isinstance(found, tuple) else found
            exact, bound = expected["out"][:, :, queries], allowed["out"][:, :, queries]
            within(out, exact, bound, subject, f"result of shard {n}", case)
    return f"{len(shards)} calls in shards of their heads"
