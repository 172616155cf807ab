"""Dropout: of the probabilities, rescaled, drawn once for forward and backward, anew for each call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attn_core.testing.checking import check, declared, differentiable
from attn_core.testing.comparing import expect
from attn_core.testing.outcomes import CheckFailed, NotChecked
from attn_core.testing.plans import held_to_plan
from attn_core.testing.reference import reference
from attn_core.testing.tolerances import bounds
from attn_core.testing.trying import tried, within

if TYPE_CHECKING:
    from attn_core.testing.building import Built
    from attn_core.testing.drawing import Case
    from attn_core.testing.subject import Subject

ALL = ("query", "key", "value")
PROBABILITIES = (0.1, 0.25, 0.5, 0.9)
VARIED = ("mask", "causal", "scale", "heads", "batch", "dtype", "return_lse")
DEVIATIONS = 6
"""How many standard deviations a count may be off: beyond that lies one honest draw of 500 million."""


@check("dropout", when=declared("dropout"))
def dropout(subject: Subject) -> str:
    """Kept probabilities are scaled by 1/(1 - dropout_p), and as many are kept as that says."""
    return _look_at_draws(subject, gradients=())


@check("dropout-backward", when=lambda spec: declared("dropout")(spec) and differentiable(spec))
def dropout_backward(subject: Subject) -> str:
    """The backward uses the forward's draw."""
    return _look_at_draws(subject, gradients=ALL)


@check("dropout-draws", when=declared("dropout"))
def dropout_draws(subject: Subject) -> str:
    """Each call draws anew from torch's generator, for each sequence, head and query; the same seed gives the same draw."""
    case = _cases(subject, (), varied=())[0]
    built = _of_unit_vectors(case)

    def call() -> torch.Tensor:
        found = tried(subject, built, dropout_p=0.5)
        if found is None:
            msg = f"it refuses dropout when run, in {case!r}"
            raise CheckFailed(msg)
        return found[0]

    torch.manual_seed(subject.seed)
    first, second = call(), call()
    expect("two calls drop the same: each has to draw anew", holds=not torch.equal(first, second))
    torch.manual_seed(subject.seed)
    expect("torch.manual_seed does not decide what is dropped", holds=torch.equal(first, call()))
    whole = tried(subject, built)
    seen = torch.ones_like(first, dtype=torch.bool) if whole is None else whole[0] != 0
    for place, name in enumerate(("sequences", "queries", "heads", "keys")):
        _expect_own_draws(first != 0, seen, place, name)
    return "3 calls"


def _expect_own_draws(kept: torch.Tensor, seen: torch.Tensor, place: int, what: str) -> None:
    """Of two independent draws of one half, half agrees, where there was something to drop."""
    count = kept.shape[place] - 1
    both = seen.narrow(place, 0, count) & seen.narrow(place, 1, count)
    alike = (kept.narrow(place, 0, count) == kept.narrow(place, 1, count))[both]
    off = abs(float(alike.double().sum()) - alike.numel() / 2)
    expect(f"one draw serves several {what}", holds=off <= DEVIATIONS * alike.numel() ** 0.5 / 2)


def _cases(subject: Subject, gradients: tuple[str, ...], varied: tuple[str, ...] = VARIED) -> list[Case]:
    """Calls of as many keys as the values have dimensions."""
    dims = [item["dim"] for item in subject.factors["dims"] if item["value_dim"] is None and item["dim"] >= 8]
    if not dims:
        msg = "dropout is looked at through unit vectors, for which it declares no common head dim of 8 and up"
        raise NotChecked(msg)
    size = min(dims)
    each: list[dict[str, Any]] = [
        {
            "dim": size,
            "value_dim": None,
            "queries": queries,
            "keys": size,
            "gradients": gradients,
            "layouts": ("contiguous",) * 3,
        }
        for queries in (size, 33, 5)
    ]
    cases = subject.draw(9, *varied, each=each, where=lambda case: _has_dropout(subject, case) and case.dim == size)
    return list(subject.require(cases, "dropout"))


def _has_dropout(subject: Subject, case: Case, *, compiled: bool = False) -> bool:
    return not subject.spec.reasons(replace(subject.facts(case), dropout=True, compiled=compiled))


def _look_at_draws(subject: Subject, *, gradients: tuple[str, ...]) -> str:
    """With unit vectors for values, the result is the dropped probabilities themselves."""
    torch.manual_seed(subject.seed)
    kept = expected = variance = 0.0
    cases = [case for case in _cases(subject, gradients) if case.gradients == gradients]
    ran: list[Case] = []
    for case in cases:
        for dropout_p in PROBABILITIES:
            built = _of_unit_vectors(case)
            found = tried(subject, built, dropout_p=dropout_p)
            if found is None:
                continue
            ran.append(case)
            sure, draws = _held(subject, case, built, dropout_p, found)
            kept, expected = kept + draws, expected + sure * (1 - dropout_p)
            variance += sure * dropout_p * (1 - dropout_p)
    if not ran:
        msg = "it declares dropout and refuses each call with it when run"
        raise CheckFailed(msg)
    share = _expect_share(kept, expected, variance)
    return f"{len(ran) + _look_at_compiled_draw(subject, ran)} calls, {share}"


def _of_unit_vectors(case: Case) -> Built:
    """The call with unit vectors for values, so that its result is the probabilities."""
    built = case.build()
    with torch.no_grad():
        unit = torch.eye(built.value.shape[3], device=built.value.device)[None, :, None]
        built.value.copy_(unit.expand(built.value.shape))
    return built


def _look_at_compiled_draw(subject: Subject, cases: list[Case]) -> int:
    """The same of one of these calls where it is compiled; how many there were."""
    case = next((case for case in cases if _has_dropout(subject, case, compiled=True)), None)
    if subject.quick or not subject.spec.compile or case is None:
        return 0
    built = _of_unit_vectors(case)
    torch.compiler.reset()
    compiled = torch.compile(subject.call, fullgraph=True, dynamic=False, backend=held_to_plan)
    found = compiled(built.query, built.key, built.value, **built.options, dropout_p=0.5)
    sure, kept = _held(subject, case, built, 0.5, found if isinstance(found, tuple) else (found,))
    torch.compiler.reset()
    _expect_share(kept, sure / 2, sure / 4, " in compiled code")
    return 1


def _expect_share(kept: float, expected: float, variance: float, where: str = "") -> str:
    share = f"{kept:.0f} probabilities are kept{where} where {expected:.0f} are expected"
    expect(share, holds=abs(kept - expected) <= DEVIATIONS * variance**0.5)
    return share


def _held(
    subject: Subject, case: Case, built: Built, dropout_p: float, found: tuple[torch.Tensor, ...]
) -> tuple[int, int]:
    """Compare with the reference given the draw; how many probabilities tell kept from dropped, and how many were kept."""
    options = {name: option for name, option in built.options.items() if name not in ("return_lse", "deterministic")}
    leaves = [tensor.detach().double().requires_grad_() for tensor in (built.query, built.key, built.value)]
    plain, plain_lse = reference(*leaves, **options)
    kept = found[0].detach().double().transpose(1, 2) != 0
    sure = plain.detach().transpose(1, 2) > 1e-3  # far enough from underflow for "not 0" to mean "kept"
    expected, _ = reference(*leaves, **options, dropout_p=dropout_p, kept=kept)
    grad_out = built.grad_out if case.gradients else None
    allowed = bounds(*leaves, grad_out=grad_out, dtype=built.query.dtype, **options, dropout_p=dropout_p, kept=kept)
    within(found[0], expected, allowed.out, subject, f"result with dropout_p={dropout_p}", case)
    if len(found) > 1:
        within(found[1], plain_lse, allowed.lse, subject, "lse, which is that without dropout,", case)
    inputs = {"query": built.query, "key": built.key, "value": built.value}
    if case.gradients:
        gradients = torch.autograd.grad(found[0], list(inputs.values()), built.grad_out)
        exact = torch.autograd.grad(expected, leaves, built.grad_out.double())
        for name, gradient, wanted in zip(inputs, gradients, exact, strict=True):
            within(gradient, wanted, getattr(allowed, name), subject, f"gradient of {name} with the same draw", case)
    return int(sure.sum()), int(kept[sure].sum())
