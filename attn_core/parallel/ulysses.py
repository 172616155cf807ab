"""The exchange of positions for heads around a call, as operators of autograd and of compiled code."""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - read from the operators' annotations
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_core.parallel import communication
from attn_core.parallel.agreement import agreed, begun
from attn_core.parallel.completion import with_batch
from attn_core.parallel.faults import alone, blamed, told
from attn_core.parallel.heads import Spread, by_heads, by_positions, shares
from attn_core.parallel.holding import in_turn, nothing
from attn_core.parallel.kind import parsed

if TYPE_CHECKING:
    from collections.abc import Callable


class Exchange(NamedTuple):
    """How a call over heads is exchanged on this rank, in numbers.

    Attributes:
        text: the kind of call.
        return_lse: whether the lse is asked for.
        ring: whether a ring lies outside.
        query: ``Spread.numbers`` of the queries and of the result.
        key: the same of keys and values; None where they are whole.
        heads: the query heads that this rank computes.
        key_heads: the key heads for these.
        rows: the lengths of the queries of this ulysses group, where the rows of a mask have to be gathered.
    """

    text: str
    return_lse: bool
    ring: bool
    query: tuple[int, ...]
    key: tuple[int, ...] | None
    heads: tuple[int, int]
    key_heads: tuple[int, int]
    rows: tuple[int, ...] | None


@lru_cache(maxsize=256)
def exchange_of(text: str) -> Exchange:
    """Plan the exchange for a kind of call."""
    kind = parsed(text)
    cp = kind.cp
    ring, place = cp.place
    places = shares(kind.heads, kind.key_heads, cp.ulysses)
    query = Spread(kind.query_layout.lengths[ring], tuple(share.queries for share in places), kind.heads)
    key_layout = kind.key_layout
    key = None
    if key_layout is not None:
        key = Spread(key_layout.lengths[ring], tuple(share.keys for share in places), kind.key_heads)
    return Exchange(
        text,
        kind.return_lse,
        kind.mode == "hybrid",
        tuple(query.numbers()),
        None if key is None else tuple(key.numbers()),
        (places[place].queries.start, places[place].queries.stop),
        (places[place].keys.start, places[place].keys.stop),
        query.lengths if kind.mask_once is not None and not kind.mask_once[2] else None,
    )


def over_heads(
    how: Exchange,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the lse, from all positions of this place's heads.

    Args:
        how: the exchange.
        query: this rank's part.
        key: this rank's part, or the whole.
        value: the same.
        mask: of the whole sequence; a dense one with this rank's rows.
        attend: computes query, key, value and mask of these heads.
    """
    rows = list(how.query)
    if how.key is not None:
        query, key, value = _to_heads([query, key, value], [*rows, *how.key, *how.key], how.text)
    else:
        query = _to_heads([query], rows, how.text)[0]
        heads = slice(*how.key_heads)
        key, value = key[:, :, heads], value[:, :, heads]
    if isinstance(mask, torch.Tensor):
        if how.rows is not None:
            mask = all_rows(in_turn(mask, query), list(how.rows), how.text)
        mask = mask[:, slice(*how.heads)] if mask.shape[1] > 1 else mask
    if how.heads[0] == how.heads[1]:
        out, lse = nothing(query, key, value, [mask] if how.rows is not None else [])
    else:
        out, lse = attend(query, key, value, mask)
    if not how.return_lse:
        return _to_positions([out], rows, how.text)[0], lse
    out, lse = _to_positions([out, lse.detach().transpose(1, 2)[..., None]], [*rows, *rows], how.text)
    return out, lse.detach()[..., 0].transpose(1, 2).contiguous()


_SCHEMA = "(Tensor[] tensors, SymInt[] spread, str kind) -> Tensor[]"
"""Given, since torch 2.6 can't tell it from the annotations."""
_WITH_LSE = 2
"""How many tensors come home in one exchange: a result and its lse, not a result alone, nor three gradients."""


@torch.library.custom_op("attn_core::to_heads", mutates_args=(), schema=_SCHEMA)
def _to_heads(tensors: Sequence[torch.Tensor], spread: Sequence[int], kind: str) -> list[torch.Tensor]:
    cp = parsed(kind).cp
    with alone(cp):
        begun(cp)
        agreed(with_batch(kind, tensors[0]))
        with told(cp), torch.no_grad():
            return by_heads(cp, tensors, Spread.flat(spread, cp.ulysses))


@torch.library.custom_op("attn_core::to_positions", mutates_args=(), schema=_SCHEMA)
def _to_positions(tensors: Sequence[torch.Tensor], spread: Sequence[int], kind: str) -> list[torch.Tensor]:
    cp = parsed(kind).cp
    with alone(cp):
        agreed(with_batch(kind, tensors[0]))
        with told(cp), torch.no_grad():
            spreads = Spread.flat(spread, cp.ulysses)
            if len(tensors) != _WITH_LSE or tensors[0].dtype == tensors[1].dtype:
                return by_positions(cp, tensors, spreads)
            return [by_positions(cp, [tensor], [one])[0] for tensor, one in zip(tensors, spreads, strict=True)]


@_to_heads.register_fake
def _(tensors: Sequence[torch.Tensor], spread: Sequence[int], kind: str) -> list[torch.Tensor]:
    cp = parsed(kind).cp
    return [
        tensor.new_empty(tensor.shape[0], sum(one.lengths), one.heads[cp.place[1]].length, tensor.shape[3])
        for tensor, one in zip(tensors, Spread.flat(spread, cp.ulysses), strict=True)
    ]


@_to_positions.register_fake
def _(tensors: Sequence[torch.Tensor], spread: Sequence[int], kind: str) -> list[torch.Tensor]:
    cp = parsed(kind).cp
    return [
        tensor.new_empty(tensor.shape[0], one.lengths[cp.place[1]], one.total, tensor.shape[3])
        for tensor, one in zip(tensors, Spread.flat(spread, cp.ulysses), strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.call = inputs[1:]


def _setup_home(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _setup(ctx, inputs, output)
    if len(inputs[0]) == _WITH_LSE:
        ctx.set_materialize_grads(False)


def _gradients_home(ctx: Any, grads: Sequence[torch.Tensor]) -> Any:
    spread, kind = ctx.call
    if len(grads) == _WITH_LSE:  # of the lse there is none, and none is sent
        return [*_to_heads(list(grads[:1]), spread[: len(spread) // 2], kind), None], None, None
    return _to_heads(list(grads), spread, kind), None, None


_to_heads.register_autograd(
    lambda ctx, grads: (_to_positions(list(grads), *ctx.call), None, None), setup_context=_setup
)
_to_positions.register_autograd(_gradients_home, setup_context=_setup_home)


@torch.library.custom_op("attn_core::all_rows", mutates_args=())
def all_rows(mask: torch.Tensor, lengths: Sequence[int], kind: str) -> torch.Tensor:
    """The rows of a dense mask (B, H, s, Skv) of all places of the ulysses group, one after another."""
    cp = parsed(kind).cp
    with alone(cp), told(cp), torch.no_grad():
        group = cp.group("ulysses")
        rows = mask.transpose(0, 2).contiguous()
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        communication.sent["masks"] += (len(lengths) - 1) * padded.numel() * padded.element_size()
        with blamed(cp, "gathering the rows of a mask"):
            found = communication.all_gather(group, padded)
        parts = found.view(len(lengths), *padded.shape)
        return (
            torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).transpose(0, 2).contiguous()
        )


@all_rows.register_fake
def _(mask: torch.Tensor, lengths: Sequence[int], kind: str) -> torch.Tensor:  # noqa: ARG001
    return mask.new_empty(mask.shape[0], mask.shape[1], sum(lengths), mask.shape[3])
