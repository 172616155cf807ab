"""torch's CUDA flash kernel (FlashAttention-2): bottom-right causal, windows, packed sequences, GQA, dropout.

The op below SDPA's is called: it takes (B, S, H, D) as it is, and what SDPA has no word for. Its backward is in torch's
derivatives.yaml with everything given here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_core.shaping import aligned, infinite_lse, natural_lse, positive_scale, query_sign, widened

if TYPE_CHECKING:
    from attn_core.masks import Packed
    from attn_core.shaping import Tensors

_FLASH = torch.ops.aten._flash_attention_forward.default
_FLASH_BACKWARD = torch.ops.aten._flash_attention_backward.default


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: Packed | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,  # noqa: ARG001 - the forward always is; the backward is refused
    return_lse: bool = False,
) -> Any:
    """Attention (B, Sq, Hq, Dv) with its graph, and its lse (B, Hq, Sq) where asked.

    Args:
        query: (B, Sq, Hq, D), D up to 256, float16 or bfloat16.
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        scale: factor of the scores.
        attn_mask: ``Packed`` or None.
        causal: bottom-right.
        window_size: (left, right), -1 unlimited; a right side other than 0 wants no more queries than keys.
        dropout_p: drawn from the device's generator; the backward draws the same.
        deterministic: accepted without a backward.
        return_lse: whether the lse is returned too.
    """
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
    _, queries, _, head_dim = query.shape  # each shape is read once: a reading costs as much as two checks
    width = value.shape[3]
    padded = width % 8 or head_dim != width
    if padded:
        query, key, value = _alike(query, key, value)
    query, key, value = aligned(query), aligned(key), aligned(value)
    if attn_mask is not None:
        out, lse = _packed(query, key, value, attn_mask, dropout_p, causal, window_size, scale)
    elif window_size is None:
        out, lse = _FLASH(query, key, value, None, None, queries, key.shape[1], dropout_p, causal, False, scale=scale)[
            :2
        ]
    else:
        out, lse = _FLASH(
            query,
            key,
            value,
            None,
            None,
            queries,
            key.shape[1],
            dropout_p,
            causal,
            False,
            scale=scale,
            window_size_left=window_size[0],
            window_size_right=window_size[1],
        )[:2]
    if padded and value.shape[3] != width:
        out = out[..., :width]
    if out.requires_grad:
        out.register_hook(aligned)
    if not return_lse:
        return out
    all_see = attn_mask is None and _all_see(queries, key.shape[1], causal, window_size)
    return out, natural_lse(lse, out, all_see=all_see)


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    attn_mask: Packed | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
) -> Tensors:
    """The gradients of query, key and value; ``out`` and ``lse`` may be those of a longer key sequence."""
    sign = 1.0
    if scale <= 0.0:
        sign = query_sign(scale)
        query, scale = positive_scale(query, scale)
    head_dim, value_head_dim = query.shape[3], value.shape[3]
    query, key, value = _alike(query, key, value)
    width = query.shape[3]
    tensors = [aligned(item) for item in (widened(grad_out, width), query, key, value, widened(out, width))]
    if attn_mask is not None or not _all_see(query.shape[1], key.shape[1], causal, window_size):
        lse = infinite_lse(lse)
    lse = lse.contiguous()
    left, right = window_size or (-1, -1)
    starts: tuple[Any, Any] = (None, None)
    lengths = (query.shape[1], key.shape[1])
    if attn_mask is not None:
        tensors, lse = [item.squeeze(0) for item in tensors], lse.squeeze(0)
        starts = (attn_mask.cu_seqlens_q, attn_mask.cu_seqlens_k)
        lengths = _longest(attn_mask, query, key, window_size)
    no_dropout = torch.empty(2, dtype=torch.uint64, device=query.device)
    grads = _FLASH_BACKWARD(
        *tensors,
        lse,
        *starts,
        *lengths,
        0.0,
        causal,
        no_dropout,
        no_dropout,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    grad_query, grad_key, grad_value = grads if attn_mask is None else (grad.unsqueeze(0) for grad in grads)
    return (
        grad_query[..., :head_dim] if sign == 1.0 else grad_query[..., :head_dim] * sign,
        grad_key[..., :head_dim],
        grad_value[..., :value_head_dim],
    )


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed,
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, int] | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = window_size or (-1, -1)
    out, lse = _FLASH(
        query.squeeze(0),
        key.squeeze(0),
        value.squeeze(0),
        packed.cu_seqlens_q,
        packed.cu_seqlens_k,
        *_longest(packed, query, key, window_size),
        dropout_p,
        causal,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )[:2]
    return out.unsqueeze(0), lse.unsqueeze(0)


def _all_see(queries: int, keys: int, causal: bool, window_size: tuple[int, int] | None) -> bool:
    """Whether each query of a dense call sees a key: its own at least, where there are as many."""
    return queries <= keys or (not causal and window_size is None)


def _longest(
    packed: Packed, query: torch.Tensor, key: torch.Tensor, window_size: tuple[int, int] | None
) -> tuple[int, int]:
    """Upper bounds of the lengths, which is all that the kernel needs them for.

    At most one query per sequence would make the kernel take every sequence to have one. And it holds a right side
    (unlimited, or beyond max_seqlen_k) for max_seqlen_k, which is too little where a sequence has more queries than keys.
    """
    longest_q = query.shape[1] if packed.max_seqlen_q is None else packed.max_seqlen_q
    longest_k = key.shape[1] if packed.max_seqlen_k is None else packed.max_seqlen_k
    longest_q = max(longest_q, 2)
    if window_size is not None and window_size[1] != 0 and packed.cu_seqlens_q is not packed.cu_seqlens_k:
        longest_k = longest_k + longest_q
    return longest_q, longest_k


def _alike(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    width = max(query.shape[3], value.shape[3])
    width += -width % 8
    return widened(query, width), widened(key, width), widened(value, width)
