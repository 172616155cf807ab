"""Results are right at every length, batch and number of heads, not only at those that blocks divide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_core.testing.checking import check

if TYPE_CHECKING:
    from attn_core.testing.subject import Subject

_LENGTHS = (1, 2, 3, 15, 17, 31, 63, 64, 65, 100, 127, 128, 129, 191, 193, 255, 257, 300)


@check("lengths")
def lengths(subject: Subject) -> str:
    """Lengths around the multiples of 16, 64 and 128, of queries and of keys."""
    each: list[dict[str, Any]] = [{"queries": length} for length in _LENGTHS]
    each += [{"queries": length, "keys": other} for length, other in zip(_LENGTHS, _LENGTHS[::-1], strict=True)]
    admitted = [item for item in each if subject.admits(subject.case(subject.plain_fragment, item))]
    return subject.hold(subject.draw(len(admitted), "causal", "return_lse", "gradients", "dtype", each=admitted))


@check("long")
def long(subject: Subject) -> str:
    """Thousands of keys, and thousands of queries."""
    each = [
        {
            "queries": queries,
            "keys": keys,
            "batch": 1,
            "heads": (1, 1),
            "mask": mask,
            "causal": causal,
            "gradients": names,
        }
        for queries, keys in ((5, 4500), (2, 8300), (4500, 5), (4500, 70), (4300, None))
        for mask in ("none", "key_padding", "packed")
        for causal in (True, False)
        for names in (("query", "key", "value"), ())
    ]
    admitted = [item for item in each if subject.admits(subject.case(subject.plain_fragment, item))]
    chosen: dict[object, dict[str, Any]] = {}
    for (
        item
    ) in admitted:  # for each length, the richest that is admitted, without a whole square of scores more than once
        chosen.setdefault((item["queries"], item["keys"]), item)
    each = [item for item in chosen.values() if not (subject.quick and item["keys"] is None)]
    if not each:
        return "it admits no plain call"
    return subject.hold(subject.draw(len(each), "return_lse", each=each))


@check("batch")
def batch(subject: Subject) -> str:
    """Any batch and any number of heads."""
    each = [{"batch": batch, "heads": (heads, heads)} for batch, heads in ((1, 1), (5, 1), (1, 5), (3, 7), (9, 2))]
    return subject.hold(subject.draw(10, "dtype", "mask", "return_lse", "gradients", each=each))


@check("empty")
def empty(subject: Subject) -> str:
    """B, Sq or Skv of 0 gives an empty or a zero result."""
    each: list[dict[str, Any]] = [
        {"batch": 0},
        {"queries": 0, "keys": 0},
        {"queries": 0, "keys": 9},
        {"queries": 9, "keys": 0},
    ]
    admitted = [item for item in each if subject.admits(subject.case(subject.plain_fragment, item))]
    return subject.hold(subject.draw(8, "return_lse", "gradients", "heads", "causal", each=admitted or [{"batch": 0}]))
