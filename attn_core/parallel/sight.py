"""What a rank's queries see of a chunk of keys, as calls that a kernel knows: all, causal bottom-right, or a window.

The whole score matrix is cut into rectangles: segments of queries by segments of keys, inside each document where there are
several. In a rectangle the diagonal is moved; where it does not end in the rectangle's corner, rows and columns that see
nothing are left out, and rows that see everything are a rectangle of their own. No dense mask is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from attn_core.parallel.layout import Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attn_core.parallel.layout import Layout, Segments

Window = tuple[int, int]


class Document(NamedTuple):
    """Queries and keys that see one another, with a diagonal of their own that ends where both end."""

    queries: Segment
    keys: Segment


class Piece(NamedTuple):
    """One call: rows of the queries and of the keys as they lie on the rank, and how they see each other."""

    queries: Segment
    keys: Segment
    causal: bool
    window: Window | None


class Rectangle(NamedTuple):
    """Positions of the whole sequence that meet, and where the diagonal lies."""

    queries: Segment
    keys: Segment
    shift: int


@dataclass(frozen=True)
class Sight:
    """What hides keys by position: causal, window and documents; of a whole sequence of so many queries and keys."""

    causal: bool
    window: Window | None
    documents: tuple[Document, ...]

    @property
    def left(self) -> int | None:
        """How many keys before its diagonal a query sees; None is all."""
        return None if self.window is None or self.window[0] < 0 else self.window[0]

    @property
    def right(self) -> int | None:
        """How many keys after its diagonal a query sees; None is all."""
        if self.causal:
            return 0
        return None if self.window is None or self.window[1] < 0 else self.window[1]


@dataclass(frozen=True)
class Course:
    """How the chunks of keys go round, and what each place computes when one passes.

    Attributes:
        steps: for each ring place, for each step, its pieces; at step s place p has the chunk of place p - s.
        last: for each chunk, the last step at which anybody sees any of it; it travels no further.
    """

    steps: tuple[tuple[tuple[Piece, ...], ...], ...]
    last: tuple[int, ...]


@lru_cache(maxsize=256)
def course(queries: Layout, keys: tuple[Segments, ...], sight: Sight, *, rotating: bool) -> Course:
    """Plan the ring; the same on every rank."""
    places = len(queries.pieces)
    rounds = places if rotating else 1
    steps = tuple(
        tuple(tuple(pieces(queries.pieces[place], keys[(place - step) % places], sight)) for step in range(rounds))
        for place in range(places)
    )
    last = tuple(
        max((step for step in range(rounds) if steps[(source + step) % places][step]), default=0)
        for source in range(places)
    )
    return Course(steps, last)


def pieces(queries: Segments, keys: Segments, sight: Sight) -> list[Piece]:
    """The calls that compute what these queries see of these keys.

    >>> whole = Document(Segment(0, 8), Segment(0, 8))
    >>> for piece in pieces((Segment(2, 6),), (Segment(0, 2), Segment(6, 8)), Sight(True, None, (whole,))):
    ...     print(piece.queries, piece.keys, piece.causal)
    Segment(start=0, stop=4) Segment(start=0, stop=2) False
    """
    if sight.left is None and sight.right == 0 and len(sight.documents) == 1:
        document = sight.documents[0]
        shift = document.keys.stop - document.queries.stop
        if queries and keys == tuple(Segment(start + shift, stop + shift) for start, stop in queries):
            rows = Segment(0, sum(segment.length for segment in queries))  # in order on both sides: one diagonal
            return [Piece(rows, rows, causal=True, window=None)]
    found: list[Piece] = []
    for query_start, query_segment in _placed(queries):
        for key_start, key_segment in _placed(keys):
            for document in sight.documents:
                rectangle = Rectangle(
                    _overlap(query_segment, document.queries),
                    _overlap(key_segment, document.keys),
                    document.keys.stop - document.queries.stop,
                )
                found += (
                    _moved(piece, query_start - query_segment.start, key_start - key_segment.start)
                    for piece in _calls(rectangle, sight)
                )
    return _joined(found)


def _placed(segments: Segments) -> Iterator[tuple[int, Segment]]:
    before = 0
    for segment in segments:
        yield before, segment
        before += segment.length


def _overlap(one: Segment, other: Segment) -> Segment:
    start = max(one.start, other.start)
    return Segment(start, max(start, min(one.stop, other.stop)))


def _moved(piece: Piece, queries: int, keys: int) -> Piece:
    return piece._replace(
        queries=Segment(piece.queries.start + queries, piece.queries.stop + queries),
        keys=Segment(piece.keys.start + keys, piece.keys.stop + keys),
    )


def _calls(rectangle: Rectangle, sight: Sight) -> Iterator[Piece]:
    """The calls for one rectangle, in positions of the whole."""
    queries, keys, shift = _visible(rectangle, sight)
    if queries.length <= 0 or keys.length <= 0:
        return
    left, right = sight.left, sight.right
    if right is not None and queries.start + shift + right >= keys.stop - 1:
        right = None  # the first query sees the last key
    if left is not None and queries.stop - 1 + shift - left <= keys.start:
        left = None  # the last query sees the first key
    if right == 0:
        level = keys.stop - shift  # from this query on, all keys lie before the diagonal
        window = None if left is None else (left, 0)
        yield Piece(Segment(queries.start, level), keys, causal=True, window=window)
        if level < queries.stop:
            yield from _calls(Rectangle(Segment(level, queries.stop), keys, shift), sight)
        return
    if left is not None and right is None and queries.length > keys.length:
        # kernels in the manner of flash-attention take an open right side to be as long as the keys
        for rows in (
            Segment(queries.start, queries.start + keys.length),
            Segment(queries.start + keys.length, queries.stop),
        ):
            yield from _calls(Rectangle(rows, keys, shift), sight)
        return
    beyond = shift + queries.stop - keys.stop  # how far the diagonal passes the corner
    window = (-1 if left is None else left - beyond, -1 if right is None else right + beyond)
    yield Piece(queries, keys, causal=False, window=None if window == (-1, -1) else window)


def _visible(rectangle: Rectangle, sight: Sight) -> Rectangle:
    """Leave out the rows and columns at the edges that see nothing."""
    (first, last), (start, stop), shift = rectangle
    if sight.right is not None:
        stop = min(stop, last + shift + sight.right)
        first = max(first, start - shift - sight.right)
    if sight.left is not None:
        start = max(start, first + shift - sight.left)
        last = min(last, stop + sight.left - shift)
    return Rectangle(Segment(first, last), Segment(start, stop), shift)


def _joined(found: list[Piece]) -> list[Piece]:
    """Make one call of two that see everything and touch along a whole edge."""
    joined: list[Piece] = []
    for piece in found:
        for place, other in enumerate(joined):
            union = _union(other, piece)
            if union is not None:
                joined[place] = union
                break
        else:
            joined.append(piece)
    return joined if len(joined) == len(found) else _joined(joined)


def _union(one: Piece, other: Piece) -> Piece | None:
    if one.causal or other.causal or one.window or other.window:
        return None
    if one.keys == other.keys and one.queries.stop == other.queries.start:
        return one._replace(queries=Segment(one.queries.start, other.queries.stop))
    if one.queries == other.queries and one.keys.stop == other.keys.start:
        return one._replace(keys=Segment(one.keys.start, other.keys.stop))
    return None
