"""Inputs of any strides are read as they are and left as they were; results are nobody else's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attn_core.testing.checking import check, declared
from attn_core.testing.comparing import expect
from attn_core.testing.trying import made, reference_of, tried, within

if TYPE_CHECKING:
    from attn_core.testing.drawing import Case
    from attn_core.testing.subject import Subject

LAYOUTS = ("transposed", "sliced", "last strided", "expanded batch", "expanded keys", "offset", "contiguous")


@check("strides")
def strides(subject: Subject) -> str:
    """Transposed, sliced, strided, expanded and offset tensors, alike and mixed, and such gradients of the result."""
    each: list[dict[str, Any]] = [{"layouts": (layout,) * 3} for layout in LAYOUTS]
    each += [
        {"layouts": (first, second, third), "grad_layout": grad}
        for first, second, third, grad in (
            ("transposed", "contiguous", "sliced", "expanded"), ("last strided", "offset", "transposed", "last strided"),
            ("contiguous", "expanded keys", "last strided", "transposed"), ("offset", "sliced", "expanded batch", "contiguous"),
        )
    ]  # fmt: skip
    return subject.hold(subject.draw(22, "lengths", "dims", "dtype", "mask", "return_lse", "gradients", each=each))


@check("inputs-untouched")
def inputs_untouched(subject: Subject) -> str:
    """No input is written to, not even for a while: neither its numbers nor its version change."""
    each = [
        {"scale": scale, "layouts": (layout,) * 3}
        for scale in (None, 0.3, -0.5)
        for layout in ("contiguous", "transposed")
    ]
    return subject.hold(subject.draw(8, "mask", "dtype", "causal", "softcap", "gradients", each=each))


@check("aliasing")
def aliasing(subject: Subject) -> str:
    """What is returned shares memory neither with an input nor with an earlier result."""
    for case in subject.draw(4, "dtype", "causal", "return_lse"):
        first, second = made(case), made(case, seed=case.seed + 1)
        held = tried(subject, first)
        if held is None:
            continue
        before = [tensor.clone() for tensor in held]
        tried(subject, second)
        for name, kept, found in zip(("result", "lse"), before, held, strict=False):
            expect(f"{name} was changed by a later call", holds=torch.equal(kept, found))
    return subject.hold(subject.draw(4, "lengths", "heads", "return_lse", each=[{"queries": 1, "keys": 1}, {}]))


def _has_neighbours(case: Case) -> bool:
    return case.batch == 3 and "expanded" not in str((case.layouts, case.mask_layout))


@check("neighbours")
def neighbours(subject: Subject) -> str:
    """The result of one sequence of a batch does not depend on the others."""
    cases = subject.draw(
        6, "mask", "causal", "lengths", "dtype", "return_lse", each=[{"batch": 3}], where=_has_neighbours
    )
    for case in cases:
        built = made(case)
        for tensor in (built.query, built.key, built.value):
            tensor[0] = 300.0
            tensor[2] = torch.nan
        found = tried(subject, built)
        if found is None:
            continue
        expected, allowed = reference_of(made(case), case)
        for name, result in zip(("out", "lse"), found, strict=False):
            within(result[1], expected[name][1], allowed[name][1], subject, f"{name} of the second sequence", case)
    return f"{len(cases)} calls beside neighbours of NaN and of 300"


def _can_be_one(case: Case) -> bool:
    return case.value_dim is None and case.heads[0] == case.heads[1] and case.keys is None


@check("same-tensor", when=declared("causal"))
def same_tensor(subject: Subject) -> str:
    """One tensor may be query, key and value at once."""
    cases = subject.draw(3, "dtype", each=[{"causal": True, "value_dim": None}], where=_can_be_one)
    for case in cases:
        built = made(case)
        built = replace(built, key=built.query, value=built.query)
        found = tried(subject, built)
        if found is None:
            continue
        expected, allowed = reference_of(built, case)
        within(found[0], expected["out"], allowed["out"], subject, "result", case)
    return f"{len(cases)} calls"
