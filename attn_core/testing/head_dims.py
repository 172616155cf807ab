"""Which of the declared head dims are tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from random import Random

    from attn_core.declaration import HeadDims

_USUAL = (64, 16, 128, 80, 32, 8, 1, 3, 40, 96, 192, 256)
_TYPICAL = (
    *_USUAL, 2, 4, 5, 6, 7, 12, 17, 20, 24, 36, 48, 56, 63, 65, 72, 88, 100, 104, 112, 120, 127, 129, 136, 144, 160, 176, 200,
    208, 224, 240, 255, 288, 320, 384, 512,
)  # fmt: skip
"""Powers of two and not, odd ones, and those that 2, 4, 8, 16, 32 and 64 divide and no more than that."""
FEW = 16
"""A set of as many is tried whole, wherever head dims are."""
_OTHERS = 6


def representative_head_dims(declared: HeadDims | None) -> list[tuple[int, int]]:
    """Some (D, Dv) of a declaration: the usual ones, the smallest and the largest, all of a small set, and each pair.

    >>> representative_head_dims(range(8, 257, 8))[:3], representative_head_dims({(192, 128)})
    ([(64, 64), (16, 16), (128, 128)], [(192, 128)])
    """
    if declared is None:
        return _alike(_USUAL)
    numbers, pairs = _declared(declared)
    extremes = (
        numbers if isinstance(declared, frozenset | set) and len(numbers) <= FEW else {*numbers[:1], *numbers[-1:]}
    )
    return [*_alike(dict.fromkeys([*(dim for dim in _USUAL if dim in numbers), *sorted(extremes)])), *pairs]


def many_head_dims(declared: HeadDims | None, random: Random) -> list[tuple[int, int]]:
    """Many (D, Dv) of a declaration: each of a set, of a range those of many divisors and a few others.

    >>> from random import Random
    >>> len(many_head_dims(range(8, 257, 8), Random(0))), len(many_head_dims(range(16, 257), Random(0)))
    (32, 40)
    """
    numbers, pairs = _declared(range(1, 300) if declared is None else declared)
    if declared is not None and len(numbers) <= 2 * FEW:
        return [*_alike(numbers), *pairs]
    typical = [dim for dim in _TYPICAL if declared is None or dim in declared]
    drawn = random.sample(numbers, min(_OTHERS + len(typical), len(numbers)))
    others = [dim for dim in drawn if dim not in typical][:_OTHERS]
    chosen = {*typical, *numbers[:1], *numbers[-1:], *others}
    return [*_alike(sorted(chosen)), *pairs]


def _declared(declared: HeadDims) -> tuple[Sequence[int], list[tuple[int, int]]]:
    """The numbers and the pairs, each in order; a range, which may be too long to list, as it is."""
    if isinstance(declared, range):
        return (declared if declared.step > 0 else declared[::-1]), []
    numbers = sorted(item for item in declared if isinstance(item, int))
    return numbers, sorted(item for item in declared if isinstance(item, tuple))


def _alike(numbers: Iterable[int]) -> list[tuple[int, int]]:
    return [(dim, dim) for dim in numbers]
