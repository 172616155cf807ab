"""Results are right at every length, batch and number of heads, not only at those that blocks divide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_core.testing.checking import check
from attn_core.testing.trying import made, reference_of, tried, within

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attn_core.testing.subject import Subject

MANY = 2**16 + 2
_LENGTHS = (1, 2, 3, 15, 17, 31, 63, 64, 65, 100, 127, 128, 129, 191, 193, 255, 257, 300, 513, 640)
_SPARSE = ((12, 4500), (4500, 5), (2, 8300), (4500, 70))
_LONG: tuple[dict[str, Any], ...] = (
    {"mask": "none"}, {"mask": "key_padding"}, {"mask": "packed"}, {"mask": "bool"}, {"mask": "float"},
    {"window_size": (700, 60)}, {"window_size": (2000, 0)}, {"window_size": (3, -1)}, {"softcap": 2.0}, {"heads": (4, 2)},
)  # fmt: skip
"""What is tried at lengths in the thousands."""


@check("lengths")
def lengths(subject: Subject) -> str:
    """Lengths around the multiples of 16, 64 and 128, of queries and of keys."""
    each: list[dict[str, Any]] = [{"queries": length} for length in _LENGTHS]
    each += [{"queries": length, "keys": other} for length, other in zip(_LENGTHS, _LENGTHS[::-1], strict=True)]
    each += [{"queries": 1, "keys": few} for few in (2, 5, 17)]  # of which each key weighs
    admitted = subject.admitted(each)
    return subject.hold(subject.draw(len(admitted), "causal", "return_lse", "gradients", "dtype", each=admitted))


@check("long")
def long(subject: Subject) -> str:
    """Thousands of keys, and thousands of queries: plain ones, of each kind of mask, with windows, softcap and GQA."""
    sparse = subject.admitted({"queries": queries, "keys": keys} for queries, keys in _SPARSE)
    both = (True, False)
    each = [item for lengths in sparse for causal in both for item in _first(subject, _LONG[0], lengths, (causal,))]
    for turn, option in enumerate(_LONG[1:]):
        for place, lengths in enumerate(sparse[:2] or [{"queries": 1100, "keys": None}]):
            each += _first(subject, option, lengths, both if (turn + place) % 2 else both[::-1])
    if not subject.quick:
        one_head = subject.admitted([{"batch": 1, "heads": (1, 1)}])
        square = {"queries": 4300 if one_head else 1100, "keys": None}
        each += [item for option in _LONG for item in _first(subject, option, square, both[::-1])][:1]
    if not each:
        return "it admits no plain call"
    return subject.hold(subject.draw(len(each), "return_lse", each=each))


def _first(
    subject: Subject, option: dict[str, Any], lengths: dict[str, Any], causal: Iterable[bool]
) -> list[dict[str, Any]]:
    """The first such call that is admitted, with gradients rather than without; none where none is."""
    shapes = [{"batch": 1, **heads, **option, **lengths} for heads in ({"heads": (1, 1)}, {})]
    names = (("query", "key", "value"), ())
    return subject.admitted(
        {**shape, "causal": one, "gradients": given} for shape in shapes for one in causal for given in names
    )[:1]


@check("each-key")
def each_key(subject: Subject) -> str:
    """No key is left out: queries that look for one key each, at the ends of blocks and of the sequence, find it."""
    each = subject.admitted({"keys": length, "queries": 12, "batch": 1} for length in (130, 700, 4500, 8300))
    if not each:
        each = subject.admitted({"keys": None, "queries": length, "batch": 1} for length in (130, 700))
    each += subject.admitted([{"keys": MANY + 500, "queries": 12, "batch": 1, "heads": (1, 1)}])
    cases = subject.draw(len(each), "dtype", "heads", each=each[:1] if subject.quick else each)
    for case in cases:
        built = made(case)
        length = built.key.shape[1]
        places = [0, 1, length // 2, 63, 64, 127, 128, length - 65, length - 64, length - 33, length - 2, length - 1]
        places = places[-built.query.shape[1] :]  # fewer than twelve, where it takes fewer queries
        group = case.heads[0] // case.heads[1]
        sought = built.key[:, places].repeat_interleave(group, 2)
        built.query[:, : len(places)] = sought * (12 / sought.float().norm(dim=-1, keepdim=True)).to(sought.dtype)
        found = tried(subject, built)
        if found is None:
            continue
        expected, allowed = reference_of(built, case)
        within(found[0], expected["out"], allowed["out"], subject, "result", case)
    return f"{len(cases)} calls"


@check("batch")
def batch(subject: Subject) -> str:
    """Any batch and any number of heads."""
    each = [
        {"batch": batch, "heads": (heads, heads), **lengths}
        for batch, heads in ((1, 1), (5, 1), (1, 5), (3, 7), (9, 2))
        for lengths in ({}, {"queries": 9, "keys": 530}, {"queries": 140, "keys": 400})
    ]
    each = subject.admitted(each) or [{"batch": batch} for batch in (1, 5, 3, 9)]
    each += subject.admitted({"batch": 1, "heads": (heads, heads)} for heads in (17, 32))
    return subject.hold(subject.draw(max(15, len(each)), "dtype", "mask", "return_lse", "gradients", each=each))


@check("many-heads")
def many_heads(subject: Subject) -> str:
    """More heads, of all sequences together, than some dimensions of a GPU's grid have."""
    subject.leave_out_if_quick()
    dims = min(subject.factors["dims"], key=lambda item: (item["value_dim"] is not None, item["dim"]))
    shape = {**dims, "queries": 3, "keys": None}
    each = subject.admitted({**shape, "batch": MANY // heads[0], "heads": heads} for heads in ((2, 2), (8, 8), (8, 1)))
    return subject.hold(subject.draw(1, each=each[:1] or [shape], where=lambda case: case.batch > 1))


@check("empty")
def empty(subject: Subject) -> str:
    """B, Sq or Skv of 0 gives an empty or a zero result."""
    each: list[dict[str, Any]] = [
        {"batch": 0},
        {"queries": 0, "keys": 0},
        {"queries": 0, "keys": 9},
        {"queries": 9, "keys": 0},
    ]
    admitted = subject.admitted(each)
    return subject.hold(subject.draw(8, "return_lse", "gradients", "heads", "causal", each=admitted or [{"batch": 0}]))
