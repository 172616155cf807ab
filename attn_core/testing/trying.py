"""Makes a drawn call by hand, for checks that change its tensors first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attn_core.declaration import Approximate
from attn_core.errors import CallRefused
from attn_core.running import KernelError
from attn_core.testing.comparing import expectations
from attn_core.testing.nearness import assert_near, error_at
from attn_core.testing.outcomes import CheckFailed
from attn_core.testing.reference import reference
from attn_core.testing.tolerances import assert_close, bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from attn_core.testing.building import Built
    from attn_core.testing.drawing import Case
    from attn_core.testing.subject import Subject


def made(case: Case, **changes: Any) -> Built:
    """The tensors and options of a case, or of one that differs in these fields, without need of a gradient."""
    return replace(case, gradients=(), **changes).build()


def tried(subject: Subject, built: Built, **options: Any) -> tuple[torch.Tensor, ...] | None:
    """Make the call: its result, and its lse where asked; None where the adapter refuses it when run."""
    try:
        found = subject.call(built.query, built.key, built.value, **built.options, **options)
    except KernelError as lie:
        raise CheckFailed(str(lie)) from lie
    except CallRefused:
        return None
    return found if isinstance(found, tuple) else (found,)


def results_and_gradients(subject: Subject, case: Case, built: Built) -> dict[str, torch.Tensor]:
    """Everything that a call gives, by what it is; nothing where the adapter refuses it when run."""
    found = tried(subject, built)
    if found is None:
        return {}
    named = dict(zip(("result", "lse"), found, strict=False))
    if case.gradients:
        gradients = torch.autograd.grad(found[0], leaves(built, case), built.grad_out.to(found[0].dtype))
        named |= {f"gradient of {name}": tensor for name, tensor in zip(case.gradients, gradients, strict=True)}
    return named


def steps_of(subject: Subject, case: Case) -> tuple[Callable[[], None], ...]:
    """Making the call, and then its backward where gradients are asked of it."""
    built = case.build()
    held: list[torch.Tensor] = []

    def forward() -> None:
        held[:] = tried(subject, built) or ()

    def backward() -> None:
        if held and held[0].requires_grad:
            torch.autograd.grad(held[0], leaves(built, case), built.grad_out.to(held[0].dtype))

    return (forward, backward) if case.gradients else (forward,)


def leaves(built: Built, case: Case) -> list[torch.Tensor]:
    """The inputs that require a gradient, in the order of the case."""
    return [built.inputs()[name] for name in case.gradients]


def hold(
    subject: Subject, case: Case, found: Mapping[str, torch.Tensor], when: str, given: Built | None = None
) -> None:
    """Fail where results and gradients of ``results_and_gradients`` are not those of the reference.

    Args:
        subject: the backend.
        case: the call, as it was meant.
        found: by what they are; nothing is not held.
        when: what is special about the call, for the message.
        given: the tensors and options, where they are not the case's own.
    """
    for name, (expected, allowed) in expectations(case, given or case.build(), found).items():
        within(found[name], expected, allowed, subject, f"{name}, {when},", case)


def reference_of(built: Built, case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the reference says of a call, and how far from it an honest kernel may be: "out" and "lse" of each."""
    options = {name: item for name, item in built.options.items() if name not in ("deterministic", "return_lse")}
    out, lse = reference(built.query, built.key, built.value, **options)
    allowed = bounds(built.query, built.key, built.value, dtype=getattr(torch, case.dtype), **options)
    return {"out": out, "lse": lse}, {"out": allowed.out, "lse": allowed.lse}


def within(
    found: torch.Tensor,
    expected: torch.Tensor,
    allowed: torch.Tensor,
    subject: Subject,
    what: str,
    case: Case | None = None,
) -> None:
    """Fail where a result is further from the reference than the backend may be."""
    try:
        numerics = subject.spec.numerics
        if isinstance(numerics, Approximate):
            what = "lse" if what.startswith("lse") else what
            assert_near(found, expected, what=what, bound=allowed, error=_error(numerics, case))
        else:
            assert_close(found, expected, found.dtype, what, bound=allowed)
    except AssertionError as off:
        msg = str(off) if case is None else f"{off} (after a change to {case!r})"
        raise CheckFailed(msg) from off


def _error(numerics: Approximate, case: Case | None) -> float:
    """The relative error that is allowed at scores of the size of a case's."""
    if case is None:
        return numerics.error
    built = made(case)
    return error_at(numerics, built.query, built.key, built.options.get("scale"))
