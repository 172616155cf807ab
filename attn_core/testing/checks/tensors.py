"""Inputs of any strides are read as they are and left as they were; results are nobody else's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attn_core.testing.checking import check, declared
from attn_core.testing.comparing import check_own_memory, expect, expectations, same_bits
from attn_core.testing.trying import results_and_gradients, within

if TYPE_CHECKING:
    from attn_core.testing.drawing import Case
    from attn_core.testing.subject import Subject

ALL = ("query", "key", "value")
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
            ("contiguous", "contiguous", "contiguous", "offset"),
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
    """Results and gradients share memory neither with what was given, nor with each other, nor with those of another call."""
    cases = subject.draw(4, "dtype", "causal", "return_lse")
    cases += subject.draw(3, "dtype", "mask", each=[{"gradients": ALL}], where=lambda case: bool(case.gradients))
    for case in cases:
        first, second = case.build(), replace(case, seed=case.seed + 1).build()
        held = results_and_gradients(subject, case, first)
        before = {name: tensor.clone() for name, tensor in held.items()}
        later = results_and_gradients(subject, case, second) if held else {}
        for name, tensor in before.items():
            expect(f"the {name} was changed by a later call, in {case!r}", holds=same_bits(tensor, held[name]))
        check_own_memory({f"{name} of a later call": tensor for name, tensor in later.items()}, held)
    one: dict[str, Any] = {
        "queries": 1,
        "keys": 1,
        "heads": subject.plain.heads,
        "return_lse": subject.plain.return_lse,
    }
    each = [one, {}, {**one, "gradients": ALL}, {"gradients": ALL}]
    return subject.hold([*cases, *subject.draw(6, "lengths", "heads", "return_lse", each=each)])


def _has_neighbours(case: Case) -> bool:
    return case.batch == 3 and "expanded" not in str((case.layouts, case.mask_layout))


@check("neighbours")
def neighbours(subject: Subject) -> str:
    """The result of one sequence of a batch, and its gradients, do not depend on the others."""
    each: list[dict[str, Any]] = [{"batch": 3}, {"batch": 3, "gradients": ALL}]
    cases = subject.draw(8, "mask", "causal", "lengths", "dtype", "return_lse", each=each, where=_has_neighbours)
    for case in cases:
        built = case.build()
        with torch.no_grad():
            for tensor in (built.query, built.key, built.value):
                tensor[0] = 300.0
                tensor[2] = torch.nan
        found = results_and_gradients(subject, case, built)
        for name, (expected, allowed) in expectations(case, case.build(), found).items():
            within(found[name][1], expected[1], allowed[1], subject, f"{name} of the second sequence", case)
    return f"{len(cases)} calls beside neighbours of NaN and of 300"


def _can_be_one(case: Case) -> bool:
    return case.value_dim is None and case.heads[0] == case.heads[1] and case.keys is None


@check("same-tensor", when=declared("causal"))
def same_tensor(subject: Subject) -> str:
    """One tensor may be query, key and value at once; its gradient is the sum of theirs."""
    each = [{"causal": True, "value_dim": None, "gradients": names} for names in ((), ("query",))]
    cases = subject.draw(4, "dtype", each=each, where=_can_be_one)
    for case in cases:
        built = case.build()
        built = replace(built, key=built.query, value=built.query)
        found = results_and_gradients(subject, case, built)
        if not found:
            continue
        expected = expectations(case, built, (*found, *(f"gradient of {name}" for name in ALL if case.gradients)))
        if "gradient of query" in found:
            gradients, bounds = zip(*(expected.pop(f"gradient of {name}") for name in ALL), strict=True)
            expected["gradient of query"] = torch.stack(gradients).sum(0), torch.stack(bounds).sum(0)
        for name, (exact, allowed) in expected.items():
            within(found[name], exact, allowed, subject, name, case)
    return f"{len(cases)} calls"
