"""The exchange of positions for heads around a call, as operators of autograd and of compiled code."""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - read from the operators' annotations
from typing import TYPE_CHECKING, Any

import torch

from attn_core.parallel import communication
from attn_core.parallel.agreement import agreed
from attn_core.parallel.faults import blamed, told
from attn_core.parallel.heads import Spread, by_heads, by_positions, shares
from attn_core.parallel.kind import parsed

if TYPE_CHECKING:
    from attn_core.parallel.kind import Kind


def spreads(kind: Kind) -> dict[str, Spread]:
    """How queries, keys and the result lie before and after the exchange on this rank's ulysses group."""
    cp = kind.cp
    ring = cp.place[0]
    places = shares(kind.heads, kind.key_heads, cp.ulysses)
    query = Spread(kind.query_layout.lengths[ring], tuple(share.queries for share in places), kind.heads)
    if kind.key_layout is None:
        return {"query": query}
    key = Spread(kind.key_layout.lengths[ring], tuple(share.keys for share in places), kind.key_heads)
    return {"query": query, "key": key}


def to_heads(tensors: Sequence[torch.Tensor], spread: Sequence[Spread], kind: str) -> list[torch.Tensor]:
    """All positions of this place's heads, in one exchange for all tensors."""
    found: list[torch.Tensor] = _to_heads(list(tensors), [n for one in spread for n in one.numbers()], kind)
    return found


def to_positions(tensors: Sequence[torch.Tensor], spread: Sequence[Spread], kind: str) -> list[torch.Tensor]:
    """Bring this rank's positions of all heads back."""
    found: list[torch.Tensor] = _to_positions(list(tensors), [n for one in spread for n in one.numbers()], kind)
    return found


@torch.library.custom_op("attn_core::to_heads", mutates_args=())
def _to_heads(tensors: Sequence[torch.Tensor], spread: Sequence[int], kind: str) -> list[torch.Tensor]:
    cp = agreed(kind).kind.cp
    with told(cp), torch.no_grad():
        return by_heads(cp, tensors, Spread.flat(spread, cp.ulysses))


@torch.library.custom_op("attn_core::to_positions", mutates_args=())
def _to_positions(tensors: Sequence[torch.Tensor], spread: Sequence[int], kind: str) -> list[torch.Tensor]:
    cp = agreed(kind).kind.cp
    with told(cp), torch.no_grad():
        return by_positions(cp, tensors, Spread.flat(spread, cp.ulysses))


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


_to_heads.register_autograd(
    lambda ctx, grads: (_to_positions(list(grads), *ctx.call), None, None), setup_context=_setup
)
_to_positions.register_autograd(
    lambda ctx, grads: (_to_heads(list(grads), *ctx.call), None, None), setup_context=_setup
)


@torch.library.custom_op("attn_core::all_rows", mutates_args=())
def all_rows(mask: torch.Tensor, lengths: Sequence[int], kind: str) -> torch.Tensor:
    """The rows of a dense mask (B, H, s, Skv) of all places of the ulysses group, one after another."""
    cp = agreed(kind).kind.cp
    with told(cp), torch.no_grad():
        group = cp.group("ulysses")
        rows = mask.transpose(0, 2).contiguous()
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        communication.sent["masks"] += (len(lengths) - 1) * padded.numel() * padded.element_size()
        with blamed(cp, "gathering the rows of a mask"):
            found = communication.all_gather(group, padded)
        parts = found.view(len(lengths), *padded.shape)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).transpose(0, 2).clone()


@all_rows.register_fake
def _(mask: torch.Tensor, lengths: Sequence[int], kind: str) -> torch.Tensor:  # noqa: ARG001
    return mask.new_empty(mask.shape[0], mask.shape[1], sum(lengths), mask.shape[3])
