"""Nothing is carried from one call into another, or left behind in the process: caches, threads, settings."""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Barrier, Thread
from typing import TYPE_CHECKING, Any

import torch

from attn_core.guard import Raised, attempt
from attn_core.masks import Description
from attn_core.probe import devices
from attn_core.testing.checking import check
from attn_core.testing.comparing import expectations
from attn_core.testing.fresh import left_by_first_call
from attn_core.testing.outcomes import CheckFailed, NotChecked
from attn_core.testing.subject import Subject
from attn_core.testing.surroundings import ONE_HALF, OTHER_HALF, USUAL, left_by
from attn_core.testing.trying import hold, made, reference_of, results_and_gradients, steps_of, tried, within

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from attn_core.testing.building import Built
    from attn_core.testing.drawing import Case

ALL = ("query", "key", "value")
THREADS = 8
ROUNDS = 6


@check("changed-calls")
def changed_calls(subject: Subject) -> str:
    """Calls of equal shapes and other numbers, dtypes, masks, scales or options, one after another, each get their own result."""
    shape = {"queries": 16, "keys": None, "batch": 2, "heads": (2, 2)}
    varied = ("dtype", "mask", "scale", "causal", "window_size", "softcap", "return_lse", "gradients")
    drawn = subject.draw(18, *varied, each=[{**shape, "mask_hides": "some"}, {**shape, "mask_hides": "right"}])
    again = [case for case in drawn[: len(drawn) // 2] for case in (case, replace(case, seed=case.seed + 1))]
    return subject.hold([*drawn, *again, *drawn])


@check("changed-in-place")
def changed_in_place(subject: Subject) -> str:
    """Tensors and masks that were changed in place since the last call are read as they are now."""
    cases = subject.draw(12, "mask", "causal", "dtype", "return_lse", each=[{"queries": 16, "keys": None}])
    cases = [case for case in cases if "expanded" not in str((case.layouts, case.mask_layout))]
    for case in cases:
        built = made(case)
        other = _alike(built, case)
        if other is None or tried(subject, built) is None:
            continue
        with torch.no_grad():
            for name, tensor in built.inputs().items():
                tensor.copy_(other.inputs()[name])
        _compare(subject, case, built, f"{case.mask} mask changed in place")
    return f"{len(cases)} calls"


def _alike(built: Built, case: Case) -> Built | None:
    """Another call of the same sizes, those of documents included."""
    for seed in range(case.seed + 1, case.seed + 20):
        other = made(case, seed=seed)
        if all(tensor.shape == other.inputs()[name].shape for name, tensor in built.inputs().items()):
            return other
    return None


def _compare(subject: Subject, case: Case, built: Built, what: str) -> None:
    found = tried(subject, built)
    if found is None:
        return
    expected, allowed = reference_of(built, case)
    for name, result in zip(("out", "lse"), found, strict=False):
        within(result, expected[name], allowed[name], subject, f"{name}, {what},", case)


@check("devices", when=lambda spec: len({name for item in spec.alternatives for name in item.platforms or ()}) > 1)
def other_devices(subject: Subject) -> str:
    """The same call on one device and then on another."""
    others = [Subject(subject.row, place, subject.seed, quick=True) for place in devices() if place != subject.device]
    others = [other for other in others if other.alternatives]
    if not others:
        msg = "this machine has no other device that it is for"
        raise NotChecked(msg)
    cases = subject.draw(3, "causal", "mask")
    tries = 0
    for case in cases:
        for place in (subject, *others, subject):
            moved = replace(case, device=str(place.device))
            if place.admits(moved):
                place.hold_one(moved)
                tries += 1
    return f"{tries} calls on {1 + len(others)} devices"


@check("threads")
def threads(subject: Subject) -> str:
    """Several threads call at once, and go backward, each with tensors and options of its own."""
    varied = ("dtype", "mask", "scale", "causal", "heads", "return_lse", "gradients")
    lengths = [{"queries": length, "keys": None} for length in (16, *range(40, 51))]
    cases = []
    for names in ((), ALL):  # two that differ in nothing else
        cases += subject.draw(2, each=[{"scale": scale, "gradients": names} for scale in (0.3, 2.0)])[:2]
    cases = [*cases, *subject.draw(THREADS, *varied, each=lengths)][:THREADS]
    prepared = []
    for case in cases:
        built = case.build()
        found = results_and_gradients(subject, case, built)  # what compiles at the first call has done so
        prepared.append((case, built, expectations(case, built, found)))
    barrier = Barrier(len(prepared))

    def run(case: Case, built: Built, expected: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        barrier.wait(timeout=60)
        for _ in range(ROUNDS):
            for name, result in results_and_gradients(subject, case, built).items():
                within(result, *expected[name], subject, f"{name}, with other threads calling,", case)

    raised = _in_threads([partial(run, *item) for item in prepared])
    if raised:
        raise CheckFailed(str(raised[0].error)) from raised[0].error
    return f"{len(prepared)} threads, {ROUNDS} calls each"


def _in_threads(work: list[Any]) -> list[Raised]:
    """Run each in a thread of its own, changing threads as often as Python can; what they raised."""
    raised: list[Raised] = []

    def guarded(item: Any) -> None:
        outcome = attempt(item)
        if isinstance(outcome, Raised):
            raised.append(outcome)

    started = [Thread(target=guarded, args=(item,)) for item in work]
    with _changing_often():
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    return raised


@contextmanager
def _changing_often() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


@check("global-state")
def global_state(subject: Subject) -> str:
    """A call without dropout, and its backward, leave random numbers and settings of the process as they are."""
    guarded = not subject.spec.first_call_compiles  # it would compile again where compiled code depends on a setting
    drawn = subject.draw(4, "mask", "causal", "dtype", "return_lse", each=[{"gradients": ()}, {"gradients": ALL}])
    cases = [case for case in drawn if tried(subject, made(case)) is not None]  # but for those refused when run
    for case in cases:
        subject.hold([case])  # what is drawn to set up a first call has been
        for half in (USUAL, ONE_HALF, OTHER_HALF):
            left = left_by(steps_of(subject, case), subject.device, half, guarded=guarded)
            if left:
                where = "" if half == USUAL else " (in a process whose settings are not the usual ones)"
                msg = f"a call changes {', '.join(left)}{where}, in {case!r}"
                raise CheckFailed(msg)
    return f"{len(cases)} calls, each with usual settings and with two sets of others"


@check("global-state-at-first")
def global_state_at_first(subject: Subject) -> str:
    """Loading it and its first call, in a process of its own, change nothing of that process."""
    subject.leave_out_if_quick()
    cases = subject.draw(1, each=[{"gradients": ALL}]) or [subject.plain]
    left = left_by_first_call(subject, cases[0])
    if left is not None:
        msg = f"{left}, in {cases[0]!r}"
        raise CheckFailed(msg)
    return "in a process of its own"


@check("memory")
def memory(subject: Subject) -> str:
    """After a call nothing keeps its inputs alive."""
    subject.leave_out_if_quick()
    cases = subject.draw(4, "mask", "causal", "return_lse", each=[{"gradients": ()}, {"gradients": ALL}])
    for case in cases:
        kept = _kept_inputs(subject, case)
        if kept:
            msg = f"after the call and its result are gone, {', '.join(kept)} is still held, in {case!r}"
            raise CheckFailed(msg)
    return f"{len(cases)} calls"


def _kept_inputs(subject: Subject, case: Case) -> list[str]:
    built = case.build()
    found = tried(subject, built)
    if found is not None and case.gradients:
        torch.autograd.grad(found[0], [getattr(built, name) for name in case.gradients], built.grad_out)
    given = {**built.inputs(), "gradient of the result": built.grad_out}
    watched = {name: weakref.ref(tensor) for name, tensor in given.items()}
    del given
    del built, found
    gc.collect()
    return [name for name, reference in watched.items() if reference() is not None]


DESCRIBED = ("key_padding", "packed")


@check("copied-masks")
def copied_masks(subject: Subject) -> str:
    """Described masks of equal shape, used in turn, are not taken for one another; one may be used beside other options."""
    cases = subject.draw(6, "causal", "dtype", each=[{"mask": kind} for kind in DESCRIBED])
    cases = [case for case in cases if case.mask in DESCRIBED]
    for case in cases:
        first, second = made(case), made(case, seed=case.seed + 3)
        for built in (first, second, first):
            if isinstance(built.options.get("attn_mask"), Description):
                _compare(subject, case, built, "two masks in turn")
    again = _use_again(subject) if cases else 0
    return f"{3 * len(cases)} calls, {again} of masks used again" if cases else "it declares no described mask"


def _use_again(subject: Subject) -> int:
    """Use one description for calls of other options, dtypes, heads and numbers of queries; how many there were."""
    lengths: tuple[dict[str, Any], ...] = ({"queries": 16, "keys": 16}, {"queries": 5, "keys": 16})
    each = subject.admitted({"mask": kind, **item} for kind in DESCRIBED for item in lengths)
    varied = ("causal", "window_size", "dtype", "heads", "softcap", "gradients", "return_lse")
    cases = subject.draw(6 * len(each), *varied, each=each, where=lambda case: case.mask in DESCRIBED)
    kept: dict[tuple[torch.Size, ...], Any] = {}
    for case in cases:
        built = case.build()
        shapes = [tensor.shape for name, tensor in built.inputs().items() if name not in ALL]
        ends = (built.query.shape[1:2], built.key.shape[1:2]) if case.mask == "packed" else ()
        own = built.options["attn_mask"]
        built.options["attn_mask"] = kept.setdefault((*shapes, *ends), own)
        hold(subject, case, results_and_gradients(subject, case, built), "of a mask that was used before", built)
    return len(cases)
