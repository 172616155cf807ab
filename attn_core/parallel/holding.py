"""Holds compiled code to the exchanges of a call: to all of them, in one order on every rank.

A compiler keeps to the order in which one result depends on another; what depends on none it may compute sooner or later on a
rank with other lengths, and what nobody needs, as a result without elements, it leaves out. Others would wait for this rank.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - read from the operators' annotations
from typing import Any

import torch

from attn_core.parallel.agreement import agreed, begun
from attn_core.parallel.completion import completed, with_batch
from attn_core.parallel.faults import alone
from attn_core.parallel.kind import parsed
from attn_core.parallel.merge import wide


def in_turn(tensor: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """The tensor; in compiled code not before the earlier one is there. No gradient passes."""
    return _after(tensor.detach(), earlier.detach()) if torch.compiler.is_dynamo_compiling() else tensor


def nothing(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, earlier: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the lse of a batch of none, or of no heads: without elements, but joined to the graph.

    It saves what a place with heads saves, so that a checkpoint ends its recomputation at the same step on every rank.

    Args:
        query: of this call, on this place.
        key: the same.
        value: the same.
        earlier: what was exchanged for it besides.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _nothing(query, key, value, list(earlier))
    return found


@torch.library.custom_op("attn_core::met", mutates_args=())
def met(query: torch.Tensor, key: torch.Tensor, mask: Sequence[torch.Tensor], kind: str) -> torch.Tensor:
    """The query of a batch of none, once all ranks have agreed that theirs is none too."""
    found = parsed(kind)
    with alone(found.cp):
        begun(found.cp)
        agreed(completed(kind, query, key, mask) if found.mode == "ring" else with_batch(kind, query))
    return query.clone()


@met.register_fake
def _(query: torch.Tensor, key: torch.Tensor, mask: Sequence[torch.Tensor], kind: str) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(query)


met.register_autograd(
    lambda ctx, grad: (grad, None, [None] * ctx.masks, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "masks", len(inputs[2])),  # noqa: ARG005
)


@torch.library.custom_op("attn_core::after", mutates_args=())
def _after(tensor: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return tensor.clone()


@_after.register_fake
def _(tensor: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(tensor)


def _without_elements(
    query: torch.Tensor,
    key: torch.Tensor,  # noqa: ARG001
    value: torch.Tensor,
    earlier: Sequence[torch.Tensor],  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = query.shape
    out = query.new_zeros(batch, length, heads, value.shape[3])
    return out, query.new_zeros(batch, heads, length, dtype=wide(query.dtype))


def _zeros(
    grad: torch.Tensor,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, earlier = inputs
    ctx.save_for_backward(*tensors)
    ctx.earlier = len(earlier)


_nothing = torch.library.custom_op("attn_core::nothing", _without_elements, mutates_args=())
_nothing.register_fake(_without_elements)
_nothing_backward = torch.library.custom_op("attn_core::nothing_backward", _zeros, mutates_args=())
_nothing_backward.register_fake(_zeros)
_nothing.register_autograd(
    lambda ctx, grad, _: (*_nothing_backward(grad, *ctx.saved_tensors), [None] * ctx.earlier), setup_context=_save
)
