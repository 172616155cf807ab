"""The block mask of flex_attention, computed block by block: no (Sq, Skv) tensor is made on the way.

``create_block_mask`` would evaluate the mask function for each pair of query and key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from attn_native.flex_forms import BLOCK, Blocks

if TYPE_CHECKING:
    from attn_core.masks import Packed

NO_LIMIT = 2**30
"""Beyond any key: a side of the window that is not limited."""


class Visible(NamedTuple):
    """For each pair of blocks, (b, h, query blocks, key blocks), whether any or all of its pairs may attend."""

    any: torch.Tensor
    all: torch.Tensor


class Documents(NamedTuple):
    """What packed sequences are to the mask function, see ``Operands``."""

    position: torch.Tensor
    owner_q: torch.Tensor
    owner_k: torch.Tensor


def count(length: int) -> int:
    """How many blocks a length takes."""
    return (length + BLOCK - 1) // BLOCK


def diagonal(
    query_length: int, key_length: int, low: int, high: int, device: torch.device, documents: Documents | None = None
) -> Visible:
    """Blocks around the diagonal: query i sees the keys from ``position + low`` to ``position + high``.

    Args:
        query_length: Sq.
        key_length: Skv.
        low: relative to the position of the query, which is i, or ``documents.position[i]``.
        high: the same.
        device: of the result.
        documents: packed sequences, each seeing only itself.
    """
    first_q = torch.arange(count(query_length), device=device) * BLOCK
    first_k = torch.arange(count(key_length), device=device) * BLOCK
    last_q, last_k = first_q + BLOCK - 1, first_k + BLOCK - 1
    whole = (last_q < query_length)[:, None] & (last_k < key_length)
    last_q, last_k = last_q.clamp(max=query_length - 1), last_k.clamp(max=key_length - 1)
    start, end = first_q, last_q
    if documents is not None:
        start, end = _range(documents.position)
    seen = (end[:, None] + high >= first_k) & (start[:, None] + low <= last_k)
    whole = whole & (start[:, None] + high >= last_k) & (end[:, None] + low <= first_k)
    if documents is not None:
        (lowest_q, highest_q), (lowest_k, highest_k) = _range(documents.owner_q), _range(documents.owner_k)
        seen = seen & (lowest_q[:, None] <= highest_k) & (highest_q[:, None] >= lowest_k)
        whole = whole & (lowest_q[:, None] == highest_k) & (highest_q[:, None] == lowest_k)
    return Visible(seen[None, None], whole[None, None])


def documents_of(packed: Packed, query_length: int, key_length: int) -> Documents:
    """Position and owner of each packed query and key. No value is copied from the device."""
    ends_q, ends_k = packed.cu_seqlens_q[1:], packed.cu_seqlens_k[1:]
    queries = torch.arange(query_length, device=ends_q.device, dtype=torch.int32)
    keys = torch.arange(key_length, device=ends_k.device, dtype=torch.int32)
    owner_q = torch.bucketize(queries, ends_q, right=True, out_int32=True)
    owner_k = torch.bucketize(keys, ends_k, right=True, out_int32=True)
    return Documents(queries - ends_q[owner_q] + ends_k[owner_q], owner_q, owner_k)


def dense(mask: torch.Tensor) -> Visible:
    """Blocks of a bool mask (b, h, q, k), each 1 or the full size."""
    queries, keys = (1 if size == 1 else BLOCK for size in mask.shape[2:])
    padding = (0, -mask.shape[3] % keys, 0, -mask.shape[2] % queries)
    blocks = torch.nn.functional.pad(mask, padding).unflatten(3, (-1, keys)).unflatten(2, (-1, queries))
    return Visible(blocks.any(5).any(3), blocks.all(5).all(3))


def both(one: Visible, other: Visible) -> Visible:
    """Blocks visible under one mask and another. Some of ``any`` may turn out empty, which costs time only."""
    return Visible(one.any & other.any, one.all & other.all)


def blocks(visible: Visible) -> Blocks:
    """The indices that the kernel walks over: partly visible blocks, and fully visible ones, which skip the mask."""
    partial = visible.any & ~visible.all
    return Blocks(
        *_walk(partial), *_walk(visible.all), *_walk(partial.transpose(2, 3)), *_walk(visible.all.transpose(2, 3))
    )


def _walk(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.argsort(chosen.to(torch.int32), dim=-1, descending=True, stable=True)
    # The kernel of the backward takes rows of indices to be contiguous; what is sorted keeps the strides of its transpose.
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _range(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest value in each block."""
    short = -values.shape[0] % BLOCK
    padded = torch.cat([values, values[-1:].expand(short)]).unflatten(0, (-1, BLOCK))
    return padded.amin(1), padded.amax(1)
