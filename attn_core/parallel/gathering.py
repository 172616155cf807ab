"""Takes a rank's part of a whole tensor, and gathers the whole from the parts."""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - read from the operators' annotations
from typing import TYPE_CHECKING, Any

import torch

from attn_core.parallel.communication import all_gather
from attn_core.parallel.faults import alone, blamed
from attn_core.parallel.layout import Segment

if TYPE_CHECKING:
    from attn_core.parallel.context import ContextParallel
    from attn_core.parallel.layout import Layout, Segments


def taken(tensor: torch.Tensor, dim: int, segments: Segments) -> torch.Tensor:
    """The positions of the segments, one after another, in memory of their own."""
    parts = [tensor.narrow(dim, segment.start, segment.length) for segment in segments or (Segment(0, 0),)]
    return torch.cat(parts, dim)


def gathered(cp: ContextParallel, tensor: torch.Tensor, dim: int, layout: Layout) -> torch.Tensor:
    """The whole, in the order of the sequence; its gradient here is this rank's part of the gradient of the whole."""
    found: torch.Tensor = gather(tensor, dim % tensor.ndim, cp.handle, [size for row in layout.lengths for size in row])
    return found


def ordered(parts: list[torch.Tensor], dim: int, layout: Layout) -> torch.Tensor:
    """Parts of all ranks, in the order of the grid, put in the order of the sequence."""
    pieces: list[tuple[int, torch.Tensor]] = []
    places = [(ring, ulysses) for ring, row in enumerate(layout.lengths) for ulysses in range(len(row))]
    for place, part in zip(places, parts, strict=True):
        before = 0
        for segment in layout.segments(*place):
            pieces.append((segment.start, part.narrow(dim, before, segment.length)))
            before += segment.length
    pieces.sort(key=lambda item: item[0])
    return torch.cat([piece for _, piece in pieces], dim) if pieces else parts[0].clone()


def all_parts(cp: ContextParallel, tensor: torch.Tensor, dim: int, lengths: Sequence[int]) -> list[torch.Tensor]:
    """The parts of all ranks, in the order of the grid: gathered among ulysses places first, then round the ring."""
    longest = max(lengths)
    row = tensor.movedim(dim, 0)
    padded = row.new_zeros(longest, *row.shape[1:])
    padded[: row.shape[0]] = row
    stacked = padded[None]
    for name in ("ulysses", "ring"):
        group = cp.group(name)
        if group is not None:
            with blamed(cp, "gathering the parts of a sequence"):
                stacked = all_gather(group, stacked)
    return [part[:length].movedim(0, dim) for part, length in zip(stacked, lengths, strict=True)]


@torch.library.custom_op("attn_core::unshard", mutates_args=())
def gather(tensor: torch.Tensor, dim: int, handle: str, lengths: Sequence[int]) -> torch.Tensor:
    """The whole, from parts of these lengths on the ranks of the grid of this handle."""
    from attn_core.parallel.context import context

    cp = context(handle)
    with alone(cp):
        return ordered(all_parts(cp, tensor, dim, lengths), dim, cp.layout_on(lengths))


@gather.register_fake
def _(tensor: torch.Tensor, dim: int, handle: str, lengths: Sequence[int]) -> torch.Tensor:  # noqa: ARG001
    shape = list(tensor.shape)
    shape[dim] = sum(lengths)
    return tensor.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.call = inputs[1:]


def _own_part(ctx: Any, grad: torch.Tensor) -> Any:
    from attn_core.parallel.context import context

    dim, handle, lengths = ctx.call
    cp = context(handle)
    return taken(grad, dim, cp.layout_on(lengths).segments(*cp.place)), None, None, None


gather.register_autograd(_own_part, setup_context=_keep)
