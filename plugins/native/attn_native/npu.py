"""Attention on ``torch_npu.npu_fusion_attention``.

Its convention, as its documentation has it:

- True in ``atten_mask`` is hidden; the scale is 1 unless given; ``sparse_mode=3`` is the bottom-right diagonal, with a
  triangle of 2048 by 2048 as its mask, and ``sparse_mode=0`` a mask of the whole;
- packed sequences are ``TND`` with the ends of the sequences, as numbers on the host;
- beside the result come the maximum and the sum of each query's softmax, eight times each: (B, H, Sq, 8) or (T, H, 8).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch_npu import npu_fusion_attention

from attn_core.errors import CallRefused
from attn_core.masks import Packed, visible_mask
from attn_core.shaping import positive_scale

TRIANGLE = 2048


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: torch.Tensor | Packed | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend on an NPU.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, D).
        scale: of the scores.
        attn_mask: bool, 4-D, or packed sequences.
        causal: bottom-right.
        return_lse: also return the log-sum-exp.
    """
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
    if isinstance(attn_mask, Packed):
        return _packed(query, key, value, scale, attn_mask, return_lse=return_lse)
    hidden, blind, mode = _hidden(query, key, attn_mask, causal=causal)
    found = npu_fusion_attention(
        query, key, value, query.shape[2], "BSND", atten_mask=hidden, scale=scale, sparse_mode=mode
    )
    out: torch.Tensor = found[0]
    lse = _lse(*found[1:3]) if return_lse else None
    if blind is not None:
        out = out.masked_fill(blind.transpose(1, 2), 0.0)
        lse = None if lse is None else lse.masked_fill(blind[..., 0], float("-inf"))
    return out if lse is None else (out, lse)


def _hidden(
    query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, *, causal: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """The mask in the kernel's words, which queries see nothing, (B, Hq, Sq, 1) or broadcastable to it, and its mode."""
    if attn_mask is None:
        return (_triangle(query.device), None, 3) if causal else (None, None, 0)
    visible = visible_mask(query, key, attn_mask=attn_mask, causal=causal)
    assert visible is not None  # noqa: S101 - there is a mask
    batch, heads, _, _ = visible.shape
    if heads > 1 and batch == 1:
        batch = query.shape[0]  # masks are (B, H, Sq, Skv), (B, 1, Sq, Skv) or (1, 1, Sq, Skv)
    whole = visible.expand(batch, heads, query.shape[1], key.shape[1])
    return ~whole, ~visible.any(-1, keepdim=True), 0


@lru_cache(maxsize=8)
def _triangle(device: torch.device) -> torch.Tensor:
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu(1)


def _packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, packed: Packed, *, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    lengths_q, lengths_k = packed.lengths_q, packed.lengths_k
    if lengths_q is None or lengths_k is None:
        msg = "native_npu: the kernel takes the lengths of packed sequences from the host, and in traced code they can't be read"
        raise CallRefused(msg)
    if 0 in lengths_q or 0 in lengths_k:
        msg = "native_npu: found an empty sequence among the packed ones; accepted: sequences of one token and more"
        raise CallRefused(msg)
    found = npu_fusion_attention(
        query[0], key[0], value[0], query.shape[2], "TND", scale=scale,
        actual_seq_qlen=list(accumulate(lengths_q)), actual_seq_kvlen=list(accumulate(lengths_k)),
    )  # fmt: skip
    out: torch.Tensor = found[0].unsqueeze(0)
    return (out, _lse(*found[1:3]).transpose(0, 1).unsqueeze(0)) if return_lse else out


def _lse(largest: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    lse: torch.Tensor = (largest[..., 0] + total[..., 0].log()).float().detach()
    return lse
