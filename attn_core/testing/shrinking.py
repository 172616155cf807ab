"""Makes a failing call smaller while it goes on failing."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attn_core.testing.drawing import Case

TRIES = 80
"""How many smaller calls are tried at most."""
_KEPT = ("device", "dtype")
_SIZES = ("batch", "queries", "keys", "dim", "value_dim")


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Return a call as plain and as small as was found that still fails.

    Args:
        case: a call that fails.
        fails: whether another one does.

    Example:
        >>> from attn_core.testing import Case
        >>> shrink(Case(queries=40, causal=True, scale=2.0), lambda case: case.queries > 8)
        Case(queries=9)
    """
    seen = {case}
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(case):
            if smaller in seen:
                continue
            if len(seen) > TRIES:
                return case
            seen.add(smaller)
            if fails(smaller):
                case, progress = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Calls that differ in one field, which is plainer: its default, or a smaller number. Sizes come last: they take longest."""
    for item in sorted(fields(case), key=lambda item: item.name in _SIZES):
        value = getattr(case, item.name)
        if item.name in _KEPT or value == item.default:
            continue
        plainer: list[Any] = _plainer(item.name, value)
        if item.name not in _SIZES or item.default is None or _is_less(item.default, value):
            plainer = [item.default, *plainer]
        for other in plainer:
            changed: dict[str, Any] = {item.name: other}
            yield replace(case, **changed)


def _plainer(name: str, value: Any) -> list[int]:
    if name not in _SIZES or value is None:
        return []
    return [size for size in dict.fromkeys((1, value // 2, value - 2, value - 1)) if 1 <= size < value]


def _is_less(default: Any, value: Any) -> bool:
    return isinstance(value, int) and isinstance(default, int) and default < value
