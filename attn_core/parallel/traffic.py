"""What a kind of call costs a rank beside its own kernel time: bytes sent, and a share of the work that is not even."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from attn_core.parallel.heads import shares
from attn_core.parallel.layout import Segment
from attn_core.parallel.merge import wide
from attn_core.parallel.preparation import course_of
from attn_core.parallel.sight import pieces

if TYPE_CHECKING:
    from attn_core.parallel.kind import Kind
    from attn_core.parallel.sight import Piece

OPERATIONS_A_SECOND, BYTES_A_SECOND, BYTES_OF_MEMORY_A_SECOND, SECONDS_A_STEP = 6e14, 2.5e11, 2.5e12, 1.5e-4


def bytes_sent(kind: Kind, ring: int, ulysses: int, *, backward: bool = False) -> Counter[str]:
    """How many bytes the rank at a place of the grid sends: of "keys", "gradients", "heads" and "masks".

    Args:
        kind: the call.
        ring: the place in the ring.
        ulysses: the place in the ulysses group.
        backward: what the backward sends, in place of what the forward does.
    """
    found: Counter[str] = Counter()
    if kind.mode != "ulysses" and kind.key_layout is not None and kind.ring > 1:
        found += _round_the_ring(kind, ring, ulysses, backward)
    if kind.mode != "ring":
        found += _over_heads(kind, ring, ulysses, backward)
    return found


def busiest_share(kind: Kind) -> float:
    """How much the rank with the most scores to compute has, over the average.

    1 is balanced. Counted are the pairs of a query and a key that see each other by position, times the heads of a place.
    """
    heads = [share.queries.length for share in shares(kind.heads, kind.key_heads, kind.ulysses)]
    if kind.mode == "ulysses":
        work = [float(many) for many in heads]
    else:
        pairs = [sum(pairs_of(piece) for step in steps for piece in step) for steps in course_of(kind).steps]
        work = [float(many * own) for many in pairs for own in heads]
    return max(work) * len(work) / sum(work) if sum(work) else 1.0


def predicted_seconds(kind: Kind) -> float:
    """How long the forward takes on the busiest rank, roughly: to compare one grid with another.

    A step of a ring takes as long as its kernel or its message, whichever is longer, and then its merge and what it costs to
    launch; what ulysses exchanges is not hidden. The speeds are those that were measured on two H100s and NVLink, in bfloat16.
    """
    pairs = sum(pairs_of(piece) for piece in pieces(_whole(kind.query), _whole((kind.keys or 0,)), kind.sight))
    operations = 2 * pairs * kind.heads * (kind.head_dim + kind.value_head_dim) * (kind.batch or 0)
    computing = operations * busiest_share(kind) / (kind.ring * kind.ulysses) / OPERATIONS_A_SECOND
    sent = bytes_sent(kind, 0, 0)
    steps = max(course_of(kind).last) + 1 if kind.mode != "ulysses" and kind.key else 1
    message = sent["keys"] / max(steps - 1, 1) / BYTES_A_SECOND
    exchanging = (sent["heads"] + sent["masks"]) / BYTES_A_SECOND
    exchanging += 2 * SECONDS_A_STEP if kind.mode != "ring" else 0.0
    if steps == 1:
        return exchanging + computing
    numbers = max(kind.query or (0,)) * kind.heads * kind.value_head_dim * (kind.batch or 0)
    merging = numbers * 5 / BYTES_OF_MEMORY_A_SECOND  # reads what is merged in, and a float32 sum for every three
    return exchanging + steps * (max(computing / steps, message) + merging + SECONDS_A_STEP)


def _whole(lengths: tuple[int, ...] | None) -> tuple[Segment, ...]:
    return (Segment(0, sum(lengths or ())),)


def pairs_of(piece: Piece) -> int:
    """How many pairs of a query and a key of a piece see each other.

    >>> from attn_core.parallel.layout import Segment
    >>> from attn_core.parallel.sight import Piece
    >>> pairs_of(Piece(Segment(0, 3), Segment(0, 4), causal=True, window=None))
    9
    """
    left, right = piece.window or (-1, -1)
    return _pairs(piece.queries.length, piece.keys.length, left, 0 if piece.causal else right, piece.causal)


@lru_cache(maxsize=1024)  # a ring has many pieces and few shapes of them
def _pairs(queries: int, keys: int, left: int, right: int, causal: bool) -> int:
    diagonal = torch.arange(queries, device="cpu") + keys - queries
    last = (diagonal + right).clamp(max=keys - 1) if right != -1 or causal else torch.full_like(diagonal, keys - 1)
    first = (diagonal - left).clamp(min=0) if left >= 0 else torch.zeros_like(diagonal)
    return int((last - first + 1).clamp(min=0).sum())


def _round_the_ring(kind: Kind, ring: int, ulysses: int, backward: bool) -> Counter[str]:
    """Chunks of keys and values go on until nobody sees them; in the backward their gradients do, and come home."""
    course, dtype = course_of(kind), getattr(torch, kind.dtype)
    key_heads = kind.key_heads
    if kind.mode == "hybrid":
        key_heads = shares(kind.heads, kind.key_heads, kind.ulysses)[ulysses].keys.length
    layout = kind.key_layout
    assert layout is not None  # noqa: S101 - the caller has looked
    row = (kind.batch or 0) * key_heads * (kind.head_dim + kind.value_head_dim)
    found: Counter[str] = Counter()
    for step in range(max(course.last) + 1):
        source = (ring - step) % kind.ring
        elements, last = row * sum(layout.lengths[source]), course.last[source]
        if step < last:
            found["keys"] += elements * dtype.itemsize
        if backward and step <= last > 0:
            found["gradients"] += elements * wide(dtype).itemsize
    return found


def _over_heads(kind: Kind, ring: int, ulysses: int, backward: bool) -> Counter[str]:
    """Each other place gets its heads of this rank's positions; what this place computed goes back to theirs."""
    places = shares(kind.heads, kind.key_heads, kind.ulysses)
    dtype = getattr(torch, kind.dtype)
    queries = kind.query_layout.lengths[ring]
    keys = kind.key_layout.lengths[ring] if kind.key_layout is not None else (0,) * kind.ulysses
    mine = places[ulysses]
    both = kind.head_dim + kind.value_head_dim
    elements = narrow = 0
    for place, share in enumerate(places):
        if place == ulysses:
            continue
        away_query, home_query = queries[ulysses] * share.queries.length, queries[place] * mine.queries.length
        away_key, home_key = keys[ulysses] * share.keys.length, keys[place] * mine.keys.length
        if backward:
            elements += away_query * kind.value_head_dim + home_query * kind.head_dim + home_key * both
        else:
            elements += away_query * kind.head_dim + away_key * both + home_query * kind.value_head_dim
            narrow += home_query * kind.return_lse
    found = Counter({"heads": (kind.batch or 0) * (elements * dtype.itemsize + narrow * wide(dtype).itemsize)})
    once = kind.mask_once
    if once is not None and not once[2] and not backward:
        batch, heads, keys_of_mask = (
            1 if once[0] else kind.batch or 0,
            1 if once[1] else kind.heads,
            1 if once[3] else kind.keys or 0,
        )
        size = getattr(torch, kind.mask_dtype or "bool").itemsize
        found["masks"] = (kind.ulysses - 1) * max(queries) * batch * heads * keys_of_mask * size
    return found
