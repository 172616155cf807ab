"""The bias of a call, as xformers has it: one of its classes, or a tensor that is expanded and not written out.

xformers' windows count the query's own key, so that one of (3, 0) is 4 wide. Of a block-diagonal bias its operators read the
offsets on the device and the longest lengths; the same offsets on the host, which it keeps beside them, are left empty, so that
nothing has to be copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from xformers.ops.fmha.attn_bias import (
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    BlockDiagonalMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightLocalAttentionMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    _SeqLenInfo,
)

from attn_core.masks import KeyPadding


def diagonal_bias(queries: int, keys: int, left: int, right: int, causal: bool) -> Any:
    """The bias of a dense call without a mask; None where every key is seen."""
    if causal and left < 0:
        return LowerTriangularMask() if queries == keys else LowerTriangularFromBottomRightMask()
    if causal:
        return LowerTriangularFromBottomRightLocalAttentionMask(_window_size=left + 1)
    if left < 0 and right < 0:
        return None
    unlimited = queries + keys
    return LocalAttentionFromBottomRightMask(
        window_left=unlimited if left < 0 else left, window_right=unlimited if right < 0 else right
    )


def packed_bias(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, longest_q: int, longest_k: int, left: int, causal: bool
) -> Any:
    """The bias of a packed call."""
    sides = {"q_seqinfo": _sequences(cu_seqlens_q, longest_q), "k_seqinfo": _sequences(cu_seqlens_k, longest_k)}
    if not causal:
        return BlockDiagonalMask(**sides)
    if left < 0:
        return BlockDiagonalCausalFromBottomRightMask(**sides)
    return BlockDiagonalCausalLocalAttentionFromBottomRightMask(**sides, _window_size=left + 1)


def _sequences(starts: torch.Tensor, longest: int) -> _SeqLenInfo:
    return _SeqLenInfo(seqstart=starts, max_seqlen=longest, min_seqlen=-1, seqstart_py=[])


def dense_bias(attn_mask: torch.Tensor | KeyPadding, query: torch.Tensor, keys: int) -> torch.Tensor:
    """A mask as a tensor to add, of query's dtype and full shape, each row 16 bytes aligned and nothing written out twice.

    Args:
        attn_mask: bool or float, broadcastable to (B, Hq, Sq, Skv), or key padding.
        query: (B, Sq, Hq, D).
        keys: Skv.
    """
    batch, queries, heads, _ = query.shape
    if isinstance(attn_mask, KeyPadding):
        padding = attn_mask
        bias = padding.prepared(
            ("attn_xformers", query.dtype), lambda: _aligned(_added(padding.keep[:, None, None, :], query.dtype), keys)
        )
    else:
        bias = _aligned(_added(attn_mask, query.dtype), keys)
    return bias.expand(batch, heads, queries, keys)


def hidden_rows(attn_mask: torch.Tensor | KeyPadding) -> torch.Tensor:
    """Which queries see nothing, bool, broadcastable to (B, Hq, Sq)."""
    if isinstance(attn_mask, KeyPadding):
        return ~attn_mask.keep.any(-1)[:, None, None]
    if attn_mask.dtype == torch.bool:
        return ~attn_mask.any(-1)
    return attn_mask.detach().amax(-1) == float("-inf")  # with nothing of (Sq, Skv) beside the mask


def _added(attn_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if attn_mask.dtype != torch.bool:
        return attn_mask.to(dtype)
    return torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device).masked_fill(~attn_mask, float("-inf"))


def _aligned(bias: torch.Tensor, keys: int) -> torch.Tensor:
    if bias.shape[3] == 1:
        bias = bias.expand(-1, -1, -1, keys)
    step = 16 // bias.element_size()
    strides = bias.stride()  # xformers looks at those of dimensions of one as well
    if strides[3] == 1 and not any(stride % step for stride in strides[:3]) and not bias.storage_offset() % step:
        return bias
    return pad(bias, (0, -keys % step)).contiguous()[..., :keys]
