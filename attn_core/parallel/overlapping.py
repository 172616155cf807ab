"""Ulysses in two halves of the heads on GPUs: one is exchanged while the other is computed, in the backward too.

Each half has a stream of its own for its exchanges. Autograd runs the backward of an operator on the stream of its forward, and
has streams wait for one another, so that gradients travel while others are computed.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from attn_core.parallel.heads import Spread
from attn_core.parallel.kind import parsed
from attn_core.parallel.layout import Segment
from attn_core.parallel.ulysses import Exchange, back, exchange_of, there

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

LEAST_BYTES = 2**24
"""Of a rank's queries, from which on two exchanges and two calls take less than one of each."""


Halves = tuple[tuple[int, Exchange], tuple[int, Exchange]]
"""How many key heads of each place are in a half, and how it is exchanged."""


def worthwhile(text: str, query: torch.Tensor) -> Halves | None:
    """The halves of a call where they pay: where much travels beside the computing, and its heads can be halved."""
    if not query.is_cuda or query.numel() * query.element_size() < LEAST_BYTES or parsed(text).cp.staged:
        return None
    return halves_of(text)


@lru_cache(maxsize=256)
def halves_of(text: str) -> Halves | None:
    """The halves of a call; None where places have no two key heads, or not as many."""
    kind, whole = parsed(text), exchange_of(text)
    places = kind.ulysses
    each, left = divmod(kind.key_heads, places)
    if whole.key is None or whole.ring or left or each < 2 or kind.mask_once is not None:
        return None
    group, place = kind.heads // kind.key_heads, kind.cp.place[1]
    lengths = (spread.lengths for spread in (Spread.flat(whole.query, places)[0], Spread.flat(whole.key, places)[0]))
    query_lengths, key_lengths = lengths

    def half(count: int) -> tuple[int, Exchange]:
        queries, keys = (
            Spread(given, tuple(Segment(n * heads, (n + 1) * heads) for n in range(places)), places * heads)
            for given, heads in ((query_lengths, count * group), (key_lengths, count))
        )
        return count, whole._replace(
            query=tuple(queries.numbers()),
            key=tuple(keys.numbers()),
            heads=(queries.heads[place].start, queries.heads[place].stop),
            key_heads=(keys.heads[place].start, keys.heads[place].stop),
        )

    return half(each - each // 2), half(each // 2)


def in_halves(
    halves: Halves,
    places: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ulysses.over_heads`` of a call whose heads can be halved."""
    group = query.shape[2] // key.shape[2]
    counts = [count for count, _ in halves]
    parts = zip(
        _split(query, places, [count * group for count in counts]), _split(key, places, counts), _split(value, places, counts),
        strict=True,
    )  # fmt: skip
    current = torch.cuda.current_stream(query.device) if query.is_cuda else None
    arrived = []
    for (_, how), part, stream in zip(halves, parts, _streams(query.device), strict=True):
        with _after(stream, current):
            arrived.append(there(how, *(tensor.flatten(2, 3) for tensor in part)))
    found = []
    for (_, how), tensors, stream in zip(halves, arrived, _streams(query.device), strict=True):
        _join(current, stream, tensors)
        out, lse = attend(*tensors, mask)
        with _after(stream, current):
            _used(stream, (out, lse))
            found.append(back(how, out, lse))
    for results, stream in zip(found, _streams(query.device), strict=True):
        _join(current, stream, results)
    outs, lses = zip(*found, strict=True)
    out = torch.cat([one.unflatten(2, (places, -1)) for one in outs], 3).flatten(2, 3)
    if not halves[0][1].return_lse:
        return out, lses[0]
    return out, torch.cat([one.unflatten(1, (places, -1)) for one in lses], 2).flatten(1, 2)


def _split(tensor: torch.Tensor, places: int, counts: list[int]) -> tuple[torch.Tensor, ...]:
    """The heads of each half, (B, S, places, count, D)."""
    halves: tuple[torch.Tensor, ...] = tensor.unflatten(2, (places, -1)).split(counts, 3)
    return halves


@lru_cache(maxsize=16)
def _streams(device: torch.device) -> tuple[Any, Any]:
    if device.type != "cuda":
        return None, None
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _after(stream: Any, current: Any) -> AbstractContextManager[Any]:
    """Work on this stream, after what the current one was given so far."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(current)
    entered: AbstractContextManager[Any] = torch.cuda.stream(stream)
    return entered


def _join(current: Any, stream: Any, tensors: tuple[torch.Tensor, ...]) -> None:
    """Have the current stream wait for what another has made for it."""
    if stream is not None:
        current.wait_stream(stream)
        _used(current, tensors)


def _used(stream: Any, tensors: tuple[torch.Tensor, ...]) -> None:
    """Keep the memory of tensors that another stream made until this one is done with it."""
    if stream is not None:
        for tensor in tensors:
            tensor.record_stream(stream)
