"""Makes keys smooth in two passes over memory, on a GPU: ``inputs.smooth`` as Triton kernels.

Each program has some rows of one key head to itself. Sums are added in one order, so that a result repeats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_PARTS = 32
"""How many partial sums of a head there are at most: each program of the second pass reads all of them."""
ROWS_OF_A_PART = 128
TILE = 32


# A length or a number of heads that is new is not compiled for: it could be met where a CUDA graph is captured.
@triton.jit(do_not_specialize=["queries", "keys", "parts", "query_rows", "key_rows", "heads", "groups"])  # type: ignore[untyped-decorator] # triton is not installed where types are checked
def _sums(
    sums: tl.tensor, nothings: tl.tensor,
    query: tl.tensor, query_batch: tl.tensor, query_row: tl.tensor, query_head: tl.tensor, query_dim: tl.tensor,
    key: tl.tensor, key_batch: tl.tensor, key_row: tl.tensor, key_head: tl.tensor, key_dim: tl.tensor,
    keep: tl.tensor, keep_batch: tl.tensor, keep_row: tl.tensor,
    queries: tl.tensor, keys: tl.tensor, parts: tl.tensor, query_rows: tl.tensor, key_rows: tl.tensor,
    heads: tl.tensor, groups: tl.tensor,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile: tl.constexpr,
    masked: tl.constexpr,
) -> None:  # fmt: skip
    """Of each part of the rows: the sum of its keys, and 0 or NaN as its queries are finite or not; (B, parts, H, D)."""
    at = tl.program_id(0)
    head, part, batch = at % heads, (at // heads) % parts, at // heads // parts
    dims = tl.arange(0, padded_dim)
    real = dims < dim

    total = tl.zeros([tile, padded_dim], dtype=tl.float32)
    for start in range(part * key_rows, tl.minimum((part + 1) * key_rows, keys), tile):
        rows = start + tl.arange(0, tile)
        inside = rows < tl.minimum((part + 1) * key_rows, keys)
        if masked:
            inside = inside & (tl.load(keep + batch * keep_batch + rows * keep_row, mask=inside, other=0) != 0)
        key_at = key + batch * key_batch + head * key_head + rows[:, None] * key_row + dims[None, :] * key_dim
        total += tl.load(key_at, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)

    nothing = tl.zeros([tile, padded_dim], dtype=tl.float32)
    for group in range(groups):
        of_head = query + batch * query_batch + (head * groups + group) * query_head
        for start in range(part * query_rows, tl.minimum((part + 1) * query_rows, queries), tile):
            rows = start + tl.arange(0, tile)
            inside = rows < tl.minimum((part + 1) * query_rows, queries)
            query_at = of_head + rows[:, None] * query_row + dims[None, :] * query_dim
            nothing += tl.load(query_at, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32) * 0.0

    to = at.to(tl.int64) * dim + dims
    tl.store(sums + to, tl.sum(total, 0), mask=real)
    tl.store(nothings + to, tl.sum(nothing, 0), mask=real)


@triton.jit(do_not_specialize=["keys", "length", "parts", "heads"])  # type: ignore[untyped-decorator]
def _subtracted(
    smooth: tl.tensor, means: tl.tensor, nothing: tl.tensor, sums: tl.tensor, nothings: tl.tensor,
    key: tl.tensor, key_batch: tl.tensor, key_row: tl.tensor, key_head: tl.tensor, key_dim: tl.tensor,
    keep: tl.tensor, keep_batch: tl.tensor, keep_row: tl.tensor, counts: tl.tensor,
    keys: tl.tensor, length: tl.tensor, parts: tl.tensor, heads: tl.tensor,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    most_parts: tl.constexpr,
    rows_each: tl.constexpr,
    tile: tl.constexpr,
    masked: tl.constexpr,
) -> None:  # fmt: skip
    """Keys less their mean, 0 behind the last one and where they are not to be kept."""
    at = tl.program_id(0)
    blocks = tl.cdiv(length, rows_each)
    head, block, batch = at % heads, (at // heads) % blocks, at // heads // blocks
    dims = tl.arange(0, padded_dim)
    real = dims < dim

    each = tl.arange(0, most_parts)
    sums_at = (batch * parts + each[:, None]) * heads * dim + head * dim + dims[None, :]
    there = (each < parts)[:, None] & real[None, :]
    count = tl.load(counts + batch) if masked else keys.to(tl.float32)
    mean = (tl.sum(tl.load(sums + sums_at, mask=there, other=0.0), 0) / count).to(key.dtype.element_ty)
    mean = mean.to(tl.float32)
    not_finite = tl.sum(tl.load(nothings + sums_at, mask=there, other=0.0), 0) + mean * 0.0
    if block == 0:
        to = (batch * heads + head) * dim + dims
        tl.store(means + to, mean.to(key.dtype.element_ty), mask=real)
        tl.store(nothing + to, not_finite, mask=real)

    of_head = smooth + (batch.to(tl.int64) * length * heads + head) * dim
    for start in range(block * rows_each, tl.minimum((block + 1) * rows_each, length), tile):
        rows = start + tl.arange(0, tile)
        inside = rows < keys
        if masked:
            inside = inside & (tl.load(keep + batch * keep_batch + rows * keep_row, mask=inside, other=0) != 0)
        elements = inside[:, None] & real[None, :]
        key_at = key + batch * key_batch + head * key_head + rows[:, None] * key_row + dims[None, :] * key_dim
        found = tl.where(elements, tl.load(key_at, mask=elements, other=0.0).to(tl.float32) - mean[None, :], 0.0)
        poisoned = (rows == 0)[:, None] & (not_finite != 0.0)[None, :]
        found = tl.where(poisoned, float("inf"), found)
        smooth_at = of_head + rows[:, None] * heads * dim + dims[None, :]
        tl.store(smooth_at, found.to(smooth.dtype.element_ty), mask=(rows < length)[:, None] & real[None, :])


def smooth(
    query: torch.Tensor, key: torch.Tensor, keep: torch.Tensor | None, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three tensors of ``inputs.Smoothed``, keys with ``length`` rows; up to 2^31 numbers in each, as the kernels have.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        keep: which keys are real, (B, Skv), or None for all.
        length: up to which rows of 0 follow the keys.
    """
    batch, keys, heads, dim = key.shape
    queries, groups = query.shape[1], query.shape[2] // heads
    parts = min(max(triton.cdiv(max(queries, keys), ROWS_OF_A_PART), 1), MOST_PARTS)
    sums = torch.empty((2, batch, parts, heads, dim), dtype=torch.float32, device=key.device)
    smoothed, mean = key.new_empty((batch, length, heads, dim)), key.new_empty((batch, 1, heads, dim))
    nothing = torch.empty((batch, heads, dim), dtype=torch.float32, device=key.device)
    masked = keep is not None
    marks = (keep, *keep.stride()) if keep is not None else (sums, 0, 0)
    counts = keep.sum(1).clamp_(min=1).float() if keep is not None else sums
    common = {"dim": dim, "padded_dim": triton.next_power_of_2(dim), "tile": TILE, "masked": masked}
    _sums[batch * parts * heads,](
        sums[0], sums[1], query, *query.stride(), key, *key.stride(), *marks,
        queries, keys, parts, triton.cdiv(queries, parts), triton.cdiv(keys, parts), heads, groups, **common,
    )  # fmt: skip
    _subtracted[batch * triton.cdiv(length, ROWS_OF_A_PART) * heads,](
        smoothed, mean, nothing, sums[0], sums[1], key, *key.stride(), *marks, counts,
        keys, length, parts, heads, most_parts=MOST_PARTS, rows_each=ROWS_OF_A_PART, **common,
    )  # fmt: skip
    return smoothed, mean, nothing
