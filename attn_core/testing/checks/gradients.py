"""Gradients are those of the function that the table defines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_core.testing.checking import check, declared, differentiable
from attn_core.testing.checks.options import DIAGONALS

if TYPE_CHECKING:
    from attn_core.testing.subject import Subject

ALL = ("query", "key", "value")


@check("gradients", when=differentiable)
def gradients(subject: Subject) -> str:
    """Gradients of query, key and value, together and alone, of a gradient of any strides."""
    each = [
        {"gradients": names, "grad_layout": layout}
        for names in (ALL, ("query",), ("key",), ("value",), ("key", "value"))
        for layout in ("contiguous", "expanded", "transposed", "last strided", "sliced", "expanded batch", "offset")
    ]
    varied = ("mask", "causal", "window_size", "heads", "scale", "lengths", "dims", "dtype", "return_lse")
    cases = subject.draw(40, *varied, each=each, where=lambda case: bool(case.gradients))
    return subject.hold(subject.require(cases, "backward"))


@check("gradients-of-diagonals", when=lambda spec: differentiable(spec) and declared("causal")(spec))
def gradients_of_diagonals(subject: Subject) -> str:
    """Causal and windows are aligned in the backward as they are in the forward, at every pair of lengths."""
    each = [
        {**lengths, "gradients": ALL, "causal": causal, "window_size": window}
        for causal, window in ((True, None), (False, (3, 1)), (True, (2, 0)))
        for lengths in DIAGONALS
    ]
    cases = subject.draw(len(each), "heads", "dtype", each=subject.admitted(each) or each)
    return subject.hold(cases) if cases else "causal is declared without a backward"


@check("gradients-of-softcap", when=lambda spec: differentiable(spec) and declared("softcap")(spec))
def gradients_of_softcap(subject: Subject) -> str:
    """The slope of the softcap is in the gradients."""
    each = [{"gradients": ALL, "softcap": cap, "amplitude": 2.0} for cap in (1.0, 5.0)]
    cases = subject.draw(6, "mask", "causal", "heads", "lengths", each=each, where=lambda case: bool(case.softcap))
    return subject.hold(cases) if cases else "softcap is declared without a backward"


@check("gradients-of-mask", when=declared("mask_gradient"))
def gradients_of_mask(subject: Subject) -> str:
    """A float mask that requires a gradient gets its own."""
    patterns = ("0000", "1100", "0110", "0100", "1110", "0010")
    each = [
        {"mask": "float", "gradients": names, "mask_once": tuple(once == "1" for once in pattern)}
        for pattern in patterns
        for names in (("attn_mask",), (*ALL, "attn_mask"))
    ]
    cases = subject.draw(
        18, "causal", "heads", "lengths", "dtype", each=each, where=lambda case: "attn_mask" in case.gradients
    )
    return subject.hold(subject.require(cases, "mask_gradient"))
