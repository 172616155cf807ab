"""What happens around a call: errors half-way, memory that held something else, other defaults, backwards in any order."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_core.guard import Raised, attempt
from attn_core.testing.checking import check, differentiable
from attn_core.testing.outcomes import CheckFailed, NotChecked
from attn_core.testing.surroundings import USUAL, left_by
from attn_core.testing.trying import hold, leaves, made, results_and_gradients, steps_of, tried

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attn_core.testing.building import Built
    from attn_core.testing.drawing import Case
    from attn_core.testing.subject import Subject

ALL = ("query", "key", "value")
BOTH: tuple[dict[str, Any], ...] = ({"gradients": ()}, {"gradients": ALL})
CALLS = 300
INTERRUPTED_AT = (1, 2, 4, 8, 12, 16, 24)


def _leave_out_if_it_compiles(subject: Subject) -> None:
    if subject.spec.first_call_compiles:
        msg = "left out, since each kind of call would compile again under these circumstances"
        raise NotChecked(msg)


# --- the process --------------------------------------------------------------------------------------------------------


@check("other-defaults")
def other_defaults(subject: Subject) -> str:
    """With another default dtype and default device than those of its tensors, results are what they are."""
    _leave_out_if_it_compiles(subject)
    each = [{**item, "scale": scale} for scale in (0.3, None) for item in BOTH]
    cases = subject.draw(10, "mask", "causal", "window_size", "dtype", "return_lse", each=each)
    for case in cases:
        built = case.build()
        with _defaults(torch.bfloat16, "meta"):
            found = results_and_gradients(subject, case, built)
        hold(subject, case, found, "with bfloat16 and meta as default dtype and device")
    return f"{len(cases)} calls"


@contextmanager
def _defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(usual)


@check("uninitialised")
def uninitialised(subject: Subject) -> str:
    """Results do not depend on what was in memory before: here, wherever torch makes an empty tensor, NaN."""
    _leave_out_if_it_compiles(subject)
    varied = ("mask", "causal", "window_size", "lengths", "heads", "dtype", "return_lse")
    cases = subject.draw(12, *varied, each=BOTH)
    tried, refusal = 0, ""
    for case in cases:
        built = case.build()
        try:
            with _filled_with_nan():
                found = results_and_gradients(subject, case, built)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            # the only way to have memory filled tells kernels to be deterministic, which some refuse to be
            if "determin" not in str(error):
                raise
            refusal = str(error)
            continue
        hold(subject, case, found, "with NaN in memory before")
        tried += 1
    if not tried:
        msg = f"torch fills memory only where it asks for deterministic algorithms, and then it raises: {refusal[:200]}"
        raise NotChecked(msg)
    return f"{tried} calls"


@contextmanager
def _filled_with_nan() -> Iterator[None]:
    """What torch does for those who want to know, where they ask for deterministic algorithms."""
    import warnings

    usual = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(usual[0], warn_only=usual[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


# --- earlier calls --------------------------------------------------------------------------------------------------------


class _Interrupt(TorchDispatchMode):
    """Raises at one of torch's operations, as where memory runs out."""

    def __init__(self, at: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = at

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if not self.left:
            msg = "interrupted by the kit"
            raise MemoryError(msg)
        return function(*args, **(kwargs or {}))


@check("interrupted")
def interrupted(subject: Subject) -> str:
    """After a call, or its backward, that an error ended half-way, the next is right and the process is as it was."""
    _leave_out_if_it_compiles(subject)
    cases = subject.draw(4, "mask", "causal", "dtype", "return_lse", each=BOTH)
    places = INTERRUPTED_AT[::3] if subject.quick else INTERRUPTED_AT
    for case in cases:
        for at in places:
            forward, *backward = steps_of(subject, case)
            left = left_by([partial(_interrupt, forward, at)], subject.device, USUAL)
            if backward and not left:
                left = left_by([forward, partial(_interrupt, backward[0], at)], subject.device, USUAL)
            if left:
                msg = f"an error half-way leaves behind {', '.join(left)}, in {case!r}"
                raise CheckFailed(msg)
            hold(subject, case, results_and_gradients(subject, case, case.build()), "after one that an error ended")
    return f"{len(cases)} calls, each interrupted at {len(places)} places"


def _interrupt(step: Callable[[], None], at: int) -> None:
    with _Interrupt(at):
        step()


@check("many-calls")
def many_calls(subject: Subject) -> str:
    """The same call again and again gives the same again and again."""
    count = CALLS // 10 if subject.quick else CALLS
    cases = subject.draw(2, "causal", "dtype", each=[{"queries": 8, "keys": None, **item} for item in BOTH])
    for case in cases:
        built = case.build()
        first = results_and_gradients(subject, case, built)
        for turn in range(1, count):
            found = results_and_gradients(subject, case, built)
            if not all(torch.equal(tensor, first[name]) for name, tensor in found.items()):
                hold(subject, case, found, f"at the {turn + 1}th call")
    return f"{len(cases)} calls, {count} times each"


# --- between a call and its backward --------------------------------------------------------------------------------------


@check("backward-order", when=differentiable)
def backward_order(subject: Subject) -> str:
    """Backwards after another call, twice through one graph, and in another thread, give the gradients of their own call."""
    each = [{"gradients": ALL}]
    cases = subject.draw(4, "mask", "causal", "heads", "dtype", each=each, where=lambda case: bool(case.gradients))
    for case in cases:
        calls = [(item, item.build()) for item in (case, replace(case, seed=case.seed + 1))]
        results = [tried(subject, built) for _, built in calls]
        if None in results:
            continue
        backwards = [
            partial(_backward, item, built, result[0])  # type: ignore[index]
            for (item, built), result in zip(calls, results, strict=True)
        ]
        first, second = backwards
        # A graph may refuse to be gone through twice; then it says so, and is not tried again.
        again = attempt(partial(first, retain=True))
        if not isinstance(again, Raised):
            hold(subject, case, again.value, "after the call that followed")
        hold(subject, calls[1][0], _in_thread(second), "by a backward in another thread")
        if not isinstance(again, Raised):
            hold(subject, case, first(), "by the second backward through one graph")
    return f"{len(cases)} pairs of calls"


def _backward(case: Case, built: Built, out: torch.Tensor, *, retain: bool = False) -> dict[str, torch.Tensor]:
    grad_out = built.grad_out.to(out.dtype)
    found = torch.autograd.grad(out, leaves(built, case), grad_out, retain_graph=retain)
    return {f"gradient of {name}": tensor for name, tensor in zip(case.gradients, found, strict=True)}


def _in_thread(work: Callable[[], Any]) -> Any:
    outcomes: list[Any] = []
    thread = Thread(target=lambda: outcomes.append(attempt(work)))
    thread.start()
    thread.join()
    (outcome,) = outcomes
    if isinstance(outcome, Raised):
        msg = f"a backward in another thread than its forward raises {outcome}"
        raise CheckFailed(msg) from outcome.error
    return outcome.value


@check("changed-before-backward", when=differentiable)
def changed_before_backward(subject: Subject) -> str:
    """Where a tensor was changed in place between call and backward, it raises, or the gradients are those of the call."""
    each = [{"gradients": names} for names in (("query",), ("value",), ("key",))]
    cases = subject.draw(6, "mask", "causal", "dtype", each=each, where=lambda case: bool(case.gradients))
    cases = [case for case in cases if "expanded" not in str((case.layouts, case.mask_layout))]
    tries = 0
    for case in cases:
        for name in (*made(case).inputs(), "result"):
            built = case.build()
            found = None if name in case.gradients else tried(subject, built)
            if found is None:
                continue
            changed = found[0] if name == "result" else built.inputs()[name]
            _change(changed.detach())
            tries += 1
            gradients = attempt(partial(_backward, case, built, found[0]))
            if not isinstance(gradients, Raised):
                hold(subject, case, gradients.value, f"after the {name} was changed in place before the backward")
    return f"{tries} calls"


def _change(tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    elif tensor.is_floating_point():
        tensor.mul_(-2)
    else:  # where documents end
        tensor[1:-1] = 0
