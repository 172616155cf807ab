"""What is done around a kernel of sageattention, as Triton kernels, on a GPU: ``inputs.prepared`` and ``inputs.of_real_keys``.

A program of the first two kernels has some rows of one key head to itself, or all of them where they are few. Sums are
added in one order, so that a result repeats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attn_sage.launching import launch

ROWS_ALONE = 512
"""Up to so many rows one program sums, and lays out, all of a head. For more, many programs sum parts of it, and others read
their sums; which takes a second launch."""
MOST_PARTS = 32
"""How many partial sums of a head there are at most: each program of the second launch reads all of them."""
ROWS_OF_A_PART = 128
NUMBERS_AT_ONCE = 8192
"""How many numbers of a tensor a program holds, of the first two kernels."""
STEPS = {2: (128, 64), 4: (64, 32)}
"""How many queries and keys the third kernel has at once, by the bytes of a number: what 100 KB of shared memory hold."""
LOG2_E = 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator] # triton is not installed where types are checked
def _sums_of_keys(
    key: tl.tensor, key_row: tl.tensor, value: tl.tensor, value_row: tl.tensor, keep: tl.tensor,
    first: tl.tensor, last: tl.tensor, dims: tl.tensor, real: tl.tensor, tile: tl.constexpr, fits: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of some rows that are to be kept: the sum of the keys, how many they are, and the size of the largest value."""
    total = tl.zeros([tile, dims.shape[0]], dtype=tl.float32)
    count = tl.zeros([tile], dtype=tl.float32)
    largest = tl.zeros([tile, dims.shape[0]], dtype=tl.float32)
    for start in range(first, last, tile):
        rows = start + tl.arange(0, tile)
        inside = rows < last
        if keep is not None:
            inside = inside & (tl.load(keep + rows, mask=inside, other=0) != 0)
        elements = inside[:, None] & real[None, :]
        total += tl.load(key + rows[:, None] * key_row + dims[None, :], mask=elements, other=0.0).to(tl.float32)
        count += inside.to(tl.float32)
        if fits:
            found = tl.load(value + rows[:, None] * value_row + dims[None, :], mask=elements, other=0.0)
            largest = tl.maximum(largest, tl.abs(found.to(tl.float32)))
    return tl.sum(total, 0), tl.sum(count, 0), tl.max(tl.max(largest, 1), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _nothing_of_queries(
    query: tl.tensor, query_row: tl.tensor, query_head: tl.tensor, groups: tl.tensor,
    first: tl.tensor, last: tl.tensor, dims: tl.tensor, real: tl.tensor, tile: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """0, or NaN where a number of some rows is not finite."""
    nothing = tl.zeros([tile, dims.shape[0]], dtype=tl.float32)
    for group in range(groups):
        for start in range(first, last, tile):
            rows = start + tl.arange(0, tile)
            elements = (rows < last)[:, None] & real[None, :]
            query_at = query + group * query_head + rows[:, None] * query_row + dims[None, :]
            nothing += tl.load(query_at, mask=elements, other=0.0).to(tl.float32) * 0.0
    return tl.sum(nothing, 0)


# A length or a number of heads that is new is not compiled for, but for the few forms that there are (many rows or few, with
# others added or hidden, or none): it could be met where a CUDA graph is captured.
@triton.jit(do_not_specialize=["queries", "keys", "parts", "query_rows", "key_rows", "heads", "groups"])  # type: ignore[untyped-decorator]
def _sums(
    sums: tl.tensor, query: tl.tensor, key: tl.tensor, value: tl.tensor, keep: tl.tensor,
    query_batch: tl.tensor, query_row: tl.tensor, query_head: tl.tensor,
    key_batch: tl.tensor, key_row: tl.tensor, key_head: tl.tensor,
    value_batch: tl.tensor, value_row: tl.tensor, value_head: tl.tensor,
    queries: tl.tensor, keys: tl.tensor, parts: tl.tensor, query_rows: tl.tensor, key_rows: tl.tensor,
    heads: tl.tensor, groups: tl.tensor,
    dim: tl.constexpr, padded_dim: tl.constexpr, tile: tl.constexpr, fits: tl.constexpr,
) -> None:  # fmt: skip
    """What ``_sums_of_keys`` and ``_nothing_of_queries`` find in each part of the rows, (B, parts, H, 2 D + 2)."""
    at = tl.program_id(0)
    head, part, batch = at % heads, (at // heads) % parts, at // heads // parts
    dims = tl.arange(0, padded_dim)
    real = dims < dim
    total, count, largest = _sums_of_keys(
        key + batch * key_batch + head * key_head, key_row, value + batch * value_batch + head * value_head, value_row,
        None if keep is None else keep + batch * keys,
        part * key_rows, tl.minimum((part + 1) * key_rows, keys), dims, real, tile, fits,
    )  # fmt: skip
    nothing = _nothing_of_queries(
        query + batch * query_batch + head * groups * query_head, query_row, query_head, groups,
        part * query_rows, tl.minimum((part + 1) * query_rows, queries), dims, real, tile,
    )  # fmt: skip
    to = sums + at.to(tl.int64) * (2 * dim + 2)
    tl.store(to + dims, total, mask=real)
    tl.store(to + dim + dims, nothing, mask=real)
    tl.store(to + 2 * dim, count)
    tl.store(to + 2 * dim + 1, largest)


@triton.jit(do_not_specialize=["queries", "keys", "length", "blocks", "rows_each", "parts", "heads", "groups"])  # type: ignore[untyped-decorator]
def _prepared(
    smooth: tl.tensor, shown: tl.tensor, power: tl.tensor, mean: tl.tensor, nothing: tl.tensor,
    sums: tl.tensor, query: tl.tensor, key: tl.tensor, value: tl.tensor, keep: tl.tensor,
    query_batch: tl.tensor, query_row: tl.tensor, query_head: tl.tensor,
    key_batch: tl.tensor, key_row: tl.tensor, key_head: tl.tensor,
    value_batch: tl.tensor, value_row: tl.tensor, value_head: tl.tensor,
    queries: tl.tensor, keys: tl.tensor, length: tl.tensor, blocks: tl.tensor, rows_each: tl.tensor,
    parts: tl.tensor, heads: tl.tensor, groups: tl.tensor,
    dim: tl.constexpr, padded_dim: tl.constexpr, tile: tl.constexpr, most_parts: tl.constexpr,
) -> None:  # fmt: skip
    """Keys less their mean, and values times their power; 0 behind the last one and where they are not to be kept."""
    at = tl.program_id(0)
    head, block, batch = at % heads, (at // heads) % blocks, at // heads // blocks
    dims = tl.arange(0, padded_dim)
    real = dims < dim
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    if keep is not None:
        keep += batch * keys

    if sums is None:
        total, count, largest = _sums_of_keys(
            key, key_row, value, value_row, keep, 0, keys, dims, real, tile, power is not None
        )
        of_head = query + batch * query_batch + head * groups * query_head
        not_finite = _nothing_of_queries(of_head, query_row, query_head, groups, 0, queries, dims, real, tile)
    else:
        each = tl.arange(0, most_parts)
        of_parts = sums + ((batch * parts + each).to(tl.int64) * heads + head) * (2 * dim + 2)
        there = each < parts
        of_sums = there[:, None] & real[None, :]
        total = tl.sum(tl.load(of_parts[:, None] + dims[None, :], mask=of_sums, other=0.0), 0)
        not_finite = tl.sum(tl.load(of_parts[:, None] + dim + dims[None, :], mask=of_sums, other=0.0), 0)
        count = tl.sum(tl.load(of_parts + 2 * dim, mask=there, other=0.0), 0)
        largest = tl.max(tl.load(of_parts + 2 * dim + 1, mask=there, other=0.0), 0)
    average = (total / tl.maximum(count, 1.0)).to(smooth.dtype.element_ty).to(tl.float32)
    not_finite += average * 0.0
    factor = 1.0
    if power is not None:
        factor = tl.where((largest > 0.0) & (largest < float("inf")), tl.exp2(tl.floor(8.0 - tl.log2(largest))), 1.0)
        tl.store(power + batch * heads + head, factor)  # as every program of this head does
    if mean is not None:
        to = (batch * heads + head) * dim + dims
        tl.store(mean + to, average.to(mean.dtype.element_ty), mask=real)
        tl.store(nothing + to, not_finite, mask=real)

    of_head = (batch.to(tl.int64) * length * heads + head) * dim
    for start in range(block * rows_each, tl.minimum((block + 1) * rows_each, length), tile):
        rows = start + tl.arange(0, tile)
        inside = rows < keys
        if keep is not None:
            inside = inside & (tl.load(keep + rows, mask=inside, other=0) != 0)
        elements = inside[:, None] & real[None, :]
        row_at = of_head + rows[:, None] * heads * dim + dims[None, :]
        written = (rows < length)[:, None] & real[None, :]
        found = tl.load(key + rows[:, None] * key_row + dims[None, :], mask=elements, other=0.0).to(tl.float32)
        found = tl.where(elements, found - average[None, :], 0.0)
        found = tl.where((rows == 0)[:, None] & (not_finite != 0.0)[None, :], float("inf"), found)
        tl.store(smooth + row_at, found.to(smooth.dtype.element_ty), mask=written)
        if shown is not None:
            found = tl.load(value + rows[:, None] * value_row + dims[None, :], mask=elements, other=0.0)
            if power is not None:
                found = found.to(tl.float32) * factor
            tl.store(shown + row_at, found.to(shown.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["scale", "queries", "keys", "length", "heads", "groups"])  # type: ignore[untyped-decorator]
def _of_real_keys(
    out: tl.tensor, lse: tl.tensor, query: tl.tensor, key: tl.tensor, power: tl.tensor, keep: tl.tensor,
    query_batch: tl.tensor, query_row: tl.tensor, query_head: tl.tensor,
    scale: tl.tensor, queries: tl.tensor, keys: tl.tensor, length: tl.tensor, heads: tl.tensor, groups: tl.tensor,
    dim: tl.constexpr, padded_dim: tl.constexpr, tile: tl.constexpr, step: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply results by (real + others) / real, each a sum of exponentials, where others are counted with a score of 0."""
    at = tl.program_id(0)
    blocks = tl.cdiv(queries, tile)
    block, head, batch = at % blocks, (at // blocks) % heads, at // blocks // heads
    key_heads = heads // groups
    dims = tl.arange(0, padded_dim)
    rows = block * tile + tl.arange(0, tile)
    elements = (rows < queries)[:, None] & (dims < dim)[None, :]
    of_head = query + batch * query_batch + head * query_head
    asked = tl.load(of_head + rows[:, None] * query_row + dims[None, :], mask=elements, other=0.0)
    key += (batch.to(tl.int64) * length * key_heads + head // groups) * dim

    count, first, last = keys, 0, keys
    if keep is not None:
        keep += batch * keys
        count, first, last = 0, keys, 0
        for start in range(0, keys, 1024):
            columns = start + tl.arange(0, 1024)
            kept = tl.load(keep + columns, mask=columns < keys, other=0) != 0
            count += tl.sum(kept.to(tl.int32), 0)
            first = tl.minimum(first, tl.min(tl.where(kept, columns, keys), 0))
            last = tl.maximum(last, tl.max(tl.where(kept, columns + 1, 0), 0))
        first = first // step * step

    best = tl.zeros([tile], dtype=tl.float32)  # of the others' scores
    total = tl.zeros([tile], dtype=tl.float32)
    for start in range(first, last, step):
        columns = start + tl.arange(0, step)
        inside = columns < keys
        key_at = key + columns[None, :] * key_heads * dim + dims[:, None]
        met = tl.load(key_at, mask=(dims < dim)[:, None] & inside[None, :], other=0.0)
        if keep is not None:
            inside = inside & (tl.load(keep + columns, mask=inside, other=0) != 0)
        scores = tl.where(inside[None, :], tl.dot(asked, met) * scale, float("-inf"))
        larger = tl.maximum(best, tl.max(scores, 1))
        total = total * tl.exp2(best - larger) + tl.sum(tl.exp2(scores - larger[:, None]), 1)
        best = larger

    whole = total + (length - count) * tl.exp2(-best)
    factor = whole / total
    if power is not None:
        factor /= tl.load(power + batch * key_heads + head // groups)
    out_at = out + (batch.to(tl.int64) * queries * heads + head) * dim + rows[:, None] * heads * dim + dims[None, :]
    found = tl.load(out_at, mask=elements, other=0.0).to(tl.float32) * factor[:, None]
    found = tl.where(count == 0, 0.0, found)  # a sum of 0 may come of an infinity, which is not to be hidden
    tl.store(out_at, found.to(out.dtype.element_ty), mask=elements)
    if lse is not None:
        lse_at = lse + (batch * heads + head) * queries + rows
        found = tl.load(lse_at, mask=rows < queries, other=0.0) - tl.log(whole) + tl.log(total)
        tl.store(lse_at, found, mask=rows < queries)


def prepared(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    missing: int,
    *,
    scanned: bool,
    wanted: bool,
    half: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The key, value, power, mean and nothing of ``inputs.Prepared``; up to 2^31 numbers in each, as the kernels have.

    Args:
        query: (B, Sq, Hq, D), the last dimension dense.
        key: (B, Skv, Hkv, D), so too.
        value: (B, Skv, Hkv, D), so too.
        keep: which keys are real, (B, Skv), dense, or None for all.
        missing: how many keys and values of 0 to add.
        scanned: whether to look for what is not finite in queries.
        wanted: whether ``mean`` and ``nothing`` are.
        half: whether values are wanted in float16.
    """
    batch, keys, heads, dim = key.shape
    queries, groups = query.shape[1] if scanned else 0, query.shape[2] // heads
    length = keys + missing
    device = key.get_device()
    smooth = key.new_empty((batch, length, heads, dim))
    shown = power = mean = nothing = sums = None
    kind = torch.float16 if half else value.dtype
    if keep is not None or missing or kind != value.dtype:
        shown = torch.empty_like(smooth, dtype=kind)
    if keep is not None and value.dtype == torch.float16:
        power = key.new_empty((batch, heads), dtype=torch.float32)
    if wanted:
        mean = key.new_empty((batch, 1, heads, dim))
        nothing = key.new_empty((batch, heads, dim), dtype=torch.float32)
    padded_dim = _power_of_2(dim)
    tile = min(NUMBERS_AT_ONCE // padded_dim, ROWS_OF_A_PART)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    longest = max(queries, length)
    parts, blocks, rows_each = 1, 1, ROWS_ALONE
    if longest > ROWS_ALONE:
        parts, blocks, rows_each = min(_times(longest), MOST_PARTS), _times(length), ROWS_OF_A_PART
        sums = key.new_empty((batch, parts, heads, 2 * dim + 2), dtype=torch.float32)
        numbers = (queries, keys, parts, _times(queries, parts), _times(keys, parts), heads, groups)
        constants = (dim, padded_dim, tile, power is not None)
        others = (*strides, *numbers, *constants)
        launch(_sums, device, (batch * parts * heads, 1, 1), (sums, query, key, value, keep), others, 4)
    launch(
        _prepared, device, (batch * blocks * heads, 1, 1),
        (smooth, shown, power, mean, nothing, sums, query, key, value, keep),
        (*strides, queries, keys, length, blocks, rows_each, parts, heads, groups, dim, padded_dim, tile, MOST_PARTS), 4,
    )  # fmt: skip
    return smooth, value if shown is None else shown, power, mean, nothing


def _times(rows: int, size: int = ROWS_OF_A_PART) -> int:
    return -(-rows // size)


def _power_of_2(dim: int) -> int:
    return 1 << (dim - 1).bit_length()


def of_real_keys(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    power: torch.Tensor | None,
    keep: torch.Tensor | None,
    keys: int,
    scale: float,
) -> None:
    """``inputs.of_real_keys``, in place: out (B, Sq, Hq, D) and lse (B, Hq, Sq), both dense."""
    batch, queries, heads, dim = out.shape
    padded_dim = max(_power_of_2(dim), 16)
    tile, step = STEPS[query.element_size()]
    launch(
        _of_real_keys, out.get_device(), (batch * heads * _times(queries, tile), 1, 1),
        (out, lse, query, key, power, keep),
        (
            *query.stride()[:3], scale * LOG2_E, queries, keys, key.shape[1], heads, heads // key.shape[2],
            dim, padded_dim, tile, step,
        ),
        4 if padded_dim <= 64 else 8,
    )  # fmt: skip
