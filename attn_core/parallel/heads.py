"""Which heads each ulysses place computes, and the exchange that brings them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from attn_core.parallel import communication
from attn_core.parallel.layout import Segment
from attn_core.parallel.merge import wide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attn_core.parallel.context import ContextParallel


class Share(NamedTuple):
    """The query heads and the key heads of one place; empty where there is nothing left for it."""

    queries: Segment
    keys: Segment


def shares(heads: int, key_heads: int, places: int) -> tuple[Share, ...]:
    """Spread heads over places, so that at each place as many query heads share a key head.

    With as many key heads as places, or more, each goes to one place, its query heads with it. With fewer, a key head is
    given to several places, and each takes some of its query heads.

    >>> [tuple(share.queries) for share in shares(6, 2, 4)], [tuple(share.keys) for share in shares(6, 2, 4)]
    ([(0, 1), (1, 3), (3, 4), (4, 6)], [(0, 1), (0, 1), (1, 2), (1, 2)])
    """
    group = heads // key_heads
    if key_heads >= places:
        keys = [Segment(key_heads * n // places, key_heads * (n + 1) // places) for n in range(places)]
        return tuple(Share(Segment(one.start * group, one.stop * group), one) for one in keys)
    owners = [place * key_heads // places for place in range(places)]
    found = []
    for place, key in enumerate(owners):
        many, nth = owners.count(key), place - owners.index(key)
        queries = Segment(key * group + group * nth // many, key * group + group * (nth + 1) // many)
        found.append(Share(queries, Segment(key, key + 1) if queries.length else Segment(key, key)))
    return tuple(found)


class Spread(NamedTuple):
    """How one tensor (B, S, H, D) lies before and after the exchange.

    Attributes:
        lengths: positions at each place before it.
        heads: heads at each place after it; several places may have the same.
        total: how many heads there are.
    """

    lengths: tuple[int, ...]
    heads: tuple[Segment, ...]
    total: int

    @classmethod
    def flat(cls, numbers: Sequence[int], places: int) -> list[Spread]:
        """As many as the numbers make; an operator takes them flat."""
        size = 3 * places + 1
        found = []
        for start in range(0, len(numbers), size):
            part = tuple(numbers[start : start + size])
            ends = zip(part[places : 2 * places], part[2 * places : 3 * places], strict=True)
            found.append(cls(part[:places], tuple(Segment(*pair) for pair in ends), part[-1]))
        return found

    def numbers(self) -> list[int]:
        """What ``flat`` reads."""
        starts, stops = [one.start for one in self.heads], [one.stop for one in self.heads]
        return [*self.lengths, *starts, *stops, self.total]


def by_heads(cp: ContextParallel, tensors: Sequence[torch.Tensor], spreads: Sequence[Spread]) -> list[torch.Tensor]:
    """All positions of some heads, from some positions of all heads: (B, S, h, D) of each (B, s, H, D), in one exchange."""
    me, places = cp.place[1], cp.ulysses
    both = list(zip(tensors, spreads, strict=True))
    parts = [
        [tensor[:, :, spread.heads[place].start : spread.heads[place].stop] for tensor, spread in both]
        for place in range(places)
    ]
    sizes = [
        [tensor.shape[0] * spread.lengths[place] * spread.heads[me].length * tensor.shape[3] for tensor, spread in both]
        for place in range(places)
    ]
    arrived = _exchanged(cp, parts, sizes)
    return [
        torch.cat([
            arrived[place][nth].view(tensor.shape[0], spread.lengths[place], spread.heads[me].length, tensor.shape[3])
            for place in range(places)
        ], 1)
        for nth, (tensor, spread) in enumerate(both)
    ]  # fmt: skip


def by_positions(cp: ContextParallel, tensors: Sequence[torch.Tensor], spreads: Sequence[Spread]) -> list[torch.Tensor]:
    """The way back: some positions of all heads. What several places have of one head is summed, in float32 or better."""
    me, places = cp.place[1], cp.ulysses
    both = list(zip(tensors, spreads, strict=True))
    parts = [
        [
            tensor.narrow(1, sum(spread.lengths[:place]), spread.lengths[place])
            for tensor, spread in both
        ]
        for place in range(places)
    ]  # fmt: skip
    sizes = [
        [tensor.shape[0] * spread.lengths[me] * spread.heads[place].length * tensor.shape[3] for tensor, spread in both]
        for place in range(places)
    ]
    arrived = _exchanged(cp, parts, sizes)
    found = []
    for nth, (tensor, spread) in enumerate(both):
        batch, head_dim = tensor.shape[0], tensor.shape[3]
        repeated = sum(one.length for one in spread.heads) > spread.total
        dtype = wide(tensor.dtype) if repeated else tensor.dtype
        make = tensor.new_zeros if repeated else tensor.new_empty
        whole = make((batch, spread.lengths[me], spread.total, head_dim), dtype=dtype)
        for place, heads in enumerate(spread.heads):
            part = arrived[place][nth].view(batch, spread.lengths[me], heads.length, head_dim)
            own = whole[:, :, heads.start : heads.stop]
            own.add_(part) if repeated else own.copy_(part)
        found.append(whole.to(tensor.dtype))
    return found


def _exchanged(
    cp: ContextParallel, parts: list[list[torch.Tensor]], sizes: list[list[int]]
) -> list[tuple[torch.Tensor, ...]]:
    """Send each place its parts, as one message; what has arrived from each place, in flat parts of these sizes."""
    counts = [part.numel() for some in parts for part in some]
    sending = parts[0][0].new_empty(sum(counts))
    for room, part in zip(sending.split(counts), (part for some in parts for part in some), strict=True):
        room.view(part.shape).copy_(part)
    arrived = communication.all_to_all(
        cp, sending, [sum(part.numel() for part in some) for some in parts], [sum(some) for some in sizes]
    )
    return [message.split(some) for message, some in zip(arrived, sizes, strict=True)]
