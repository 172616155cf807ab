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
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from attn_core.parallel.merge import Part

ROWS = 16

# Triton's interpreter has one place for the number of the running program.
_alone: AbstractContextManager[Any] = Lock() if os.environ.get("TRITON_INTERPRET") == "1" else nullcontext()


@triton.jit  # type: ignore[untyped-decorator] # triton is not installed where types are checked
def _added(
    found: tl.tensor, level: tl.tensor, total: tl.tensor,
    part: tl.tensor, part_batch: tl.tensor, part_row: tl.tensor, part_head: tl.tensor, part_dim: tl.tensor,
    lse: tl.tensor, lse_batch: tl.tensor, lse_head: tl.tensor, lse_row: tl.tensor,
    batch: tl.tensor, head: tl.tensor, rows: tl.tensor, dims: tl.tensor,
    inside: tl.tensor, elements: tl.tensor,
    weighted: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The sum of weighted results, the largest lse so far that weights are relative to, and their sum."""
    part_at = part + batch * part_batch + head * part_head + rows[:, None] * part_row + dims[None, :] * part_dim
    values = tl.load(part_at, mask=elements, other=0.0).to(tl.float32)
    if weighted:
        lse_at = lse + batch * lse_batch + head * lse_head + rows * lse_row
        other = tl.load(lse_at, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(level, other)
        shift = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf is NaN
        kept = tl.exp(level - shift)
        weight = tl.exp(other - shift)
        found = found * kept[:, None] + values * weight[:, None]
        level = top
        total = total * kept + weight
    else:
        found = found + values
    return found, level, total


@triton.jit  # type: ignore[untyped-decorator]
def _together(
    out: tl.tensor, out_batch: tl.tensor, out_row: tl.tensor, out_head: tl.tensor, out_dim: tl.tensor,
    lse: tl.tensor, lse_batch: tl.tensor, lse_head: tl.tensor, lse_row: tl.tensor,
    a: tl.tensor, a_batch: tl.tensor, a_row: tl.tensor, a_head: tl.tensor, a_dim: tl.tensor,
    a_lse: tl.tensor, a_lse_batch: tl.tensor, a_lse_head: tl.tensor, a_lse_row: tl.tensor,
    b: tl.tensor, b_batch: tl.tensor, b_row: tl.tensor, b_head: tl.tensor, b_dim: tl.tensor,
    b_lse: tl.tensor, b_lse_batch: tl.tensor, b_lse_head: tl.tensor, b_lse_row: tl.tensor,
    c: tl.tensor, c_batch: tl.tensor, c_row: tl.tensor, c_head: tl.tensor, c_dim: tl.tensor,
    c_lse: tl.tensor, c_lse_batch: tl.tensor, c_lse_head: tl.tensor, c_lse_row: tl.tensor,
    d: tl.tensor, d_batch: tl.tensor, d_row: tl.tensor, d_head: tl.tensor, d_dim: tl.tensor,
    d_lse: tl.tensor, d_lse_batch: tl.tensor, d_lse_head: tl.tensor, d_lse_row: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    rows_each: tl.constexpr,
    count: tl.constexpr,
    weighted: tl.constexpr,
) -> None:  # fmt: skip
    # neighbours have the heads of the same rows, which lie side by side; the other axes of a grid end at 65535
    blocks = tl.cdiv(length, rows_each)
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    batch = (block // blocks).to(tl.int64)
    rows = ((block % blocks) * rows_each + tl.arange(0, rows_each)).to(tl.int64)
    dims = tl.arange(0, padded_dim)
    inside = rows < length
    elements = inside[:, None] & (dims[None, :] < dim)

    found = tl.zeros([rows_each, padded_dim], dtype=tl.float32)
    level = tl.full([rows_each], float("-inf"), dtype=tl.float32)
    total = tl.zeros([rows_each], dtype=tl.float32)
    found, level, total = _added(
        found, level, total, a, a_batch, a_row, a_head, a_dim, a_lse, a_lse_batch, a_lse_head, a_lse_row,
        batch, head, rows, dims, inside, elements, weighted,
    )  # fmt: skip
    if count > 1:
        found, level, total = _added(
            found, level, total, b, b_batch, b_row, b_head, b_dim, b_lse, b_lse_batch, b_lse_head, b_lse_row,
            batch, head, rows, dims, inside, elements, weighted,
        )  # fmt: skip
    if count > 2:
        found, level, total = _added(
            found, level, total, c, c_batch, c_row, c_head, c_dim, c_lse, c_lse_batch, c_lse_head, c_lse_row,
            batch, head, rows, dims, inside, elements, weighted,
        )  # fmt: skip
    if count > 3:
        found, level, total = _added(
            found, level, total, d, d_batch, d_row, d_head, d_dim, d_lse, d_lse_batch, d_lse_head, d_lse_row,
            batch, head, rows, dims, inside, elements, weighted,
        )  # fmt: skip

    tl.debug_barrier()  # several threads have read a number that one of them writes over
    if weighted:
        found = found / tl.where(total == 0.0, 1.0, total)[:, None]
        lse_at = lse + batch * lse_batch + head * lse_head + rows * lse_row
        tl.store(lse_at, level + tl.log(total), mask=inside)
    out_at = out + batch * out_batch + head * out_head + rows[:, None] * out_row + dims[None, :] * out_dim
    tl.store(out_at, found.to(out.dtype.element_ty), mask=elements)


def merge(parts: Sequence[Part], out: torch.Tensor, lse: torch.Tensor) -> None:
    """``attn_core.parallel.merge.merge``, of any strides."""
    _launched([(out, lse), *parts], weighted=True)


def add(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """``attn_core.parallel.merge.add``, of any strides."""
    _launched([(part, part) for part in (out, *parts)], weighted=False)


def _launched(pairs: list[Part], *, weighted: bool) -> None:
    """Run the kernel on where to write and what to read; the places of missing parts are filled, and not read."""
    out = pairs[0][0]
    batch, length, heads, dim = out.shape
    if out.numel() == 0:
        return
    filled = pairs + pairs[:1] * (5 - len(pairs))
    arguments: list[torch.Tensor | int] = []
    for part, lse in filled:
        arguments += part, *part.stride(), lse, *(lse.stride() if weighted else (0, 0, 0))
    there = out.get_device() == torch.cuda.current_device() if out.is_cuda else True  # to make it so takes microseconds
    with _alone, nullcontext() if there else torch.cuda.device_of(out):
        _together[batch * heads * triton.cdiv(length, ROWS),](
            *arguments,
            length,
            heads,
            dim=dim,
            padded_dim=triton.next_power_of_2(dim),
            rows_each=ROWS,
            count=len(pairs) - 1,
            weighted=weighted,
        )
