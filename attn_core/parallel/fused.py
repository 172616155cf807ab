"""Puts partial results together in one pass over memory, for GPUs: a Triton kernel.

Each program has some rows of one head to itself: nobody else reads or writes what it reads and writes.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

ROWS = 8

# Triton's interpreter has one place for the number of the running program.
_alone: AbstractContextManager[Any] = Lock() if os.environ.get("TRITON_INTERPRET") == "1" else nullcontext()


@triton.jit  # type: ignore[untyped-decorator] # triton is not installed where types are checked
def _merge(
    out: tl.tensor,
    lse: tl.tensor,
    part: tl.tensor,
    part_lse: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    out_batch: tl.tensor, out_row: tl.tensor, out_head: tl.tensor, out_dim: tl.tensor,
    lse_batch: tl.tensor, lse_head: tl.tensor, lse_row: tl.tensor,
    part_batch: tl.tensor, part_row: tl.tensor, part_head: tl.tensor, part_dim: tl.tensor,
    part_lse_batch: tl.tensor, part_lse_head: tl.tensor, part_lse_row: tl.tensor,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    rows_each: tl.constexpr,
) -> None:  # fmt: skip
    # neighbours have the heads of the same rows, which lie side by side; the other axes of a grid end at 65535
    blocks = tl.cdiv(length, rows_each)
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    batch = (block // blocks).to(tl.int64)
    rows = ((block % blocks) * rows_each + tl.arange(0, rows_each)).to(tl.int64)
    dims = tl.arange(0, padded_dim)
    inside = rows < length

    lse_at = lse + batch * lse_batch + head * lse_head + rows * lse_row
    part_lse_at = part_lse + batch * part_lse_batch + head * part_lse_head + rows * part_lse_row
    one = tl.load(lse_at, mask=inside, other=0.0)
    other = tl.load(part_lse_at, mask=inside, other=0.0).to(tl.float32)
    level = tl.maximum(one, other)
    level = tl.where(level == float("-inf"), 0.0, level)  # -inf - -inf is NaN
    weight = tl.exp(one - level)
    part_weight = tl.exp(other - level)
    total = weight + part_weight
    divisor = tl.where(total == 0.0, 1.0, total)
    weight = weight / divisor
    part_weight = part_weight / divisor

    elements = inside[:, None] & (dims[None, :] < dim)
    out_at = out + batch * out_batch + head * out_head + rows[:, None] * out_row + dims[None, :] * out_dim
    part_at = part + batch * part_batch + head * part_head + rows[:, None] * part_row + dims[None, :] * part_dim
    found = tl.load(out_at, mask=elements, other=0.0)
    added = tl.load(part_at, mask=elements, other=0.0).to(tl.float32)
    tl.debug_barrier()  # several threads have read a number that one of them writes over
    tl.store(out_at, found * weight[:, None] + added * part_weight[:, None], mask=elements)
    tl.store(lse_at, level + tl.log(total), mask=inside)


def merge_(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """``attn_core.parallel.merge.merge_`` of float32 results, of any strides."""
    batch, length, heads, dim = out.shape
    if out.numel() == 0:
        return
    there = out.is_cuda and out.get_device() == torch.cuda.current_device()  # to make it so takes microseconds
    with _alone, nullcontext() if there else torch.cuda.device_of(out):
        _merge[batch * heads * triton.cdiv(length, ROWS),](
            out,
            lse,
            part,
            part_lse,
            length,
            heads,
            *out.stride(),
            *lse.stride(),
            *part.stride(),
            *part_lse.stride(),
            dim=dim,
            padded_dim=triton.next_power_of_2(dim),
            rows_each=ROWS,
        )
