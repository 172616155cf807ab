"""Which positions of the whole sequence each rank holds.

Ranks form a grid: ring by ulysses. Those of one ring place hold the parts of one piece of the sequence. In zigzag order a
piece is two chunks, one from each end, so that under causal each ring place sees as much as every other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ORDERS = ("zigzag", "contiguous")
Value = TypeVar("Value")


class Segment(NamedTuple):
    """Positions from ``start`` to before ``stop``."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many."""
        return self.stop - self.start


class kept(Generic[Value]):  # noqa: N801 - a decorator
    """Computed once, as ``functools.cached_property``, which before Python 3.12 takes a lock that compiled code can't."""

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Value:
        if instance is None:
            return self  # type: ignore[return-value]
        found = instance.__dict__[self._name] = self._compute(instance)
        return found


Segments = tuple[Segment, ...]
Lengths = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layout:
    """How a sequence lies on the grid.

    Attributes:
        lengths: positions on each rank, by ring place and then by ulysses place.
        order: one of ``ORDERS``.

    >>> Layout(((4,), (4,)), "zigzag").pieces
    ((Segment(start=0, stop=2), Segment(start=6, stop=8)), (Segment(start=2, stop=6),))
    """

    lengths: Lengths
    order: str

    @kept
    def flat(self) -> tuple[int, ...]:
        """The lengths of all ranks, in the order of the grid."""
        return tuple(length for row in self.lengths for length in row)

    @kept
    def total(self) -> int:
        """The length of the whole sequence."""
        return sum(self.flat)

    @kept
    def pieces(self) -> tuple[Segments, ...]:
        """What each ring place holds, in the order in which it lies there."""
        sizes = [sum(row) for row in self.lengths]
        if self.order == "contiguous":
            return tuple(_joined([Segment(*ends)]) for ends in pairwise((0, *accumulate(sizes))))
        first = [(size + 1) // 2 for size in sizes]
        second = [size - half for size, half in zip(sizes, first, strict=True)]
        chunks = [Segment(*ends) for ends in pairwise((0, *accumulate(first + second[::-1])))]
        return tuple(_joined([chunks[place], chunks[-1 - place]]) for place in range(len(sizes)))

    def segments(self, ring: int, ulysses: int) -> Segments:
        """What the rank at a place of the grid holds."""
        start = sum(self.lengths[ring][:ulysses])
        return cut(self.pieces[ring], start, start + self.lengths[ring][ulysses])


def even(total: int, ring: int, ulysses: int, order: str) -> Layout:
    """Spread a sequence as evenly as its length allows.

    >>> even(7, 2, 1, "zigzag").lengths
    ((4,), (3,))
    """
    return Layout(tuple(_shares(share, ulysses) for share in _shares(total, ring)), order)


def cut(segments: Segments, start: int, stop: int) -> Segments:
    """What lies from ``start`` to before ``stop`` when the segments are laid end to end.

    >>> cut((Segment(0, 2), Segment(6, 8)), 1, 3)
    (Segment(start=1, stop=2), Segment(start=6, stop=7))
    """
    found, before = [], 0
    for segment in segments:
        low, high = max(start - before, 0), min(stop - before, segment.length)
        found.append(Segment(segment.start + low, segment.start + max(low, high)))
        before += segment.length
    return _joined(found)


def _shares(total: int, parts: int) -> tuple[int, ...]:
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def _joined(segments: Iterable[Segment]) -> Segments:
    """Leave out empty segments, and make one of two that touch."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and joined[-1].stop == segment.start:
            joined[-1] = Segment(joined[-1].start, segment.stop)
        elif segment.length:
            joined.append(segment)
    return tuple(joined)
