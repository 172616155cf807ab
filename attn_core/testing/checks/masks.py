"""Each kind of mask hides what it says, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_core.facts import MASKS
from attn_core.testing.checking import check

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attn_core.declaration import BackendSpec
    from attn_core.testing.subject import Subject

_LENGTHS: tuple[dict[str, Any], ...] = (
    {"queries": 16, "keys": None},
    {"queries": 300, "keys": None, "batch": 1},
    *({"queries": queries, "keys": keys} for queries, keys in ((5, 17), (9, 530), (33, 5), (1, 70))),
    {"queries": 400, "keys": 140, "batch": 1},
    *({"queries": queries, "keys": keys} for queries, keys in ((130, None), (1, 1030))),
)
_CALLS = 40
"""How many calls are about right for a kind of mask; more where each of its forms takes four."""
_ONCE: tuple[dict[str, Any], ...] = tuple(
    {"mask_once": tuple(once == "1" for once in pattern), "mask_layout": layout}
    for pattern, layout in (
        ("0000", "contiguous"), ("1100", "contiguous"), ("0100", "sliced"), ("1110", "contiguous"), ("0010", "transposed"),
        ("1001", "contiguous"), ("0110", "contiguous"), ("1000", "contiguous"), ("0000", "transposed"), ("0100", "expanded"),
        ("1111", "contiguous"), ("0000", "last strided"),
    )
)  # fmt: skip
_DENSE = tuple({**once, "mask_hides": hides} for once in _ONCE for hides in ("some", "rows"))
FORMS: dict[str, tuple[dict[str, Any], ...]] = {
    "key_padding": tuple({"mask_hides": hides} for hides in ("left", "right", "some", "nothing", "everything")),
    "packed": ({"batch": 1},),
    "bool": (*_DENSE, {"mask_hides": "everything"}, {"mask_hides": "nothing"}),
    "float": (
        *_DENSE, {"mask_hides": "far"}, {"mask_hides": "large"}, {"mask_hides": "everything"}, {"mask_dtype": "float32"},
        {"mask_dtype": "float32", "dtype": "float16", "return_lse": True},  # of rounding the mask the lse alone tells
        {"mask_dtype": "float32", "dtype": "bfloat16"},
        # scores so small that nothing is lost beside a large number: it changes no result and no gradient
        {"mask_hides": "far", "amplitude": 1e-3, "gradients": ("query", "key", "value")},
        {"mask_hides": "far", "amplitude": 1e-3, "gradients": (), "causal": False, "window_size": None},
    ),
}  # fmt: skip
"""For each kind of mask, what it may be like."""


def declared_masks(spec: BackendSpec) -> Iterable[str]:
    """The kinds of mask that some alternative declares."""
    return [kind for kind in MASKS if kind in FORMS and any(item.mask_abilities[kind] for item in spec.alternatives)]


@check("masks", each=declared_masks)
def masks(subject: Subject, kind: str) -> str:
    """A mask of this kind, in every form, alone and with causal and a window."""
    forms = [{"mask": kind, **form} for form in FORMS[kind]]
    lengths = subject.admitted(_LENGTHS) or [{}]
    rounds = min(len(lengths), len(lengths) if subject.spec.first_call_compiles else max(4, _CALLS // len(forms)))
    each = [
        {**form, **lengths[(place + turn) % len(lengths)]} for turn in range(rounds) for place, form in enumerate(forms)
    ]
    varied = ("causal", "window_size", "heads", "return_lse", "gradients", "dtype")
    count = _CALLS if subject.quick else max(len(each), _CALLS // 2)
    cases = subject.draw(count, *varied, each=each, where=lambda case: case.mask == kind)
    return subject.hold(subject.require(cases, f"masks: {kind}"))


@check("sees-nothing")
def sees_nothing(subject: Subject) -> str:
    """A query that sees nothing has result 0, lse -inf and gradients 0, never NaN."""
    each: list[dict[str, Any]] = [
        {"mask": kind, "mask_hides": hides, **lengths}
        for kind in ("bool", "float", "key_padding")
        for hides in ("rows", "everything")
        for lengths in _LENGTHS[:4]
    ]
    each += [{"causal": True, "queries": 33, "keys": 5}, {"causal": True, "queries": 70, "keys": 1}]
    each += [{"window_size": (2, 0), "queries": 33, "keys": 5}, {"window_size": (0, 1), "queries": 5, "keys": 40}]
    each += [{"mask": "packed", "queries": 33, "keys": 5}, {"mask": "packed", "causal": True, "queries": 40, "keys": 9}]
    admitted = subject.admitted(each)
    if not admitted:
        return "nothing that it admits leaves a query without keys"
    return subject.hold(subject.draw(2 * len(admitted), "return_lse", "gradients", "heads", "dtype", each=admitted))
