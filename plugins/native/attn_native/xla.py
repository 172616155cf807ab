"""Attention on ``torch_xla.experimental.custom_kernel.flash_attention``, written against torch_xla 2.9.0.

Its convention: (B, H, S, D) with as many key heads as query heads; the scale is 1 unless given; the diagonal begins at the
first key. Lengths have to be divisible by its blocks, or be one multiple of 128 below them. The largest blocks are those of the
backward of the query: 1024 queries, and 512 keys in parts of 256. Other lengths are padded, for a forward alone too, and the
padding is a segment of its own, as hidden keys are. What is hidden has a very low score rather than none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad
from torch_xla.experimental.custom_kernel import flash_attention

from attn_core.shaping import positive_scale, repeated_heads

if TYPE_CHECKING:
    from attn_core.masks import KeyPadding

LANES = 128
QUERIES, KEYS = (512, 1024), (256, 512)
"""Up to which length one block of any multiple of 128 does, and the block above it: 513 to 1024 queries are two blocks of 512
in the forward, and one of 1024 in the backward."""


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: KeyPadding | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attend on a TPU.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, D).
        scale: of the scores.
        attn_mask: which keys are real.
        causal: with as many queries as keys.
    """
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    keep = None if attn_mask is None else attn_mask.keep
    missing_q, missing_k = missing(queries, *QUERIES), missing(keys, *KEYS)
    segments_q = segments_k = None
    if keep is not None or missing_q or missing_k:
        segments_q = torch.ones(batch, queries + missing_q, dtype=torch.int32, device=query.device)
        real = segments_q.new_ones(batch, keys) if keep is None else keep.to(torch.int32)
        segments_k = pad(real, (0, missing_k))
    key, value = repeated_heads(key, heads), repeated_heads(value, heads)
    found = flash_attention(
        _laid_out(query, missing_q), _laid_out(key, missing_k), _laid_out(value, missing_k),
        causal, segments_q, segments_k, scale,
    )  # fmt: skip
    out: torch.Tensor = found[:, :, :queries].transpose(1, 2)
    return out if keep is None else out.masked_fill(~keep.any(1)[:, None, None, None], 0.0)


def missing(length: int, single: int, block: int) -> int:
    """How many tokens a length lacks to be one that the kernel takes.

    >>> [missing(length, *QUERIES) for length in (1, 128, 300, 512, 513, 1025)]
    [127, 0, 84, 0, 511, 1023]
    >>> [missing(length, *KEYS) for length in (1, 128, 200, 256, 257, 512, 513)]
    [127, 0, 56, 0, 255, 0, 511]
    """
    return -length % (LANES if length <= single else block)


def _laid_out(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    """As (B, H, S, D), with ``missing`` rows of 0."""
    return pad(tensor, (0, 0, 0, 0, 0, missing)).transpose(1, 2)
