"""torch's CPU flash kernel: top-left causal, one head dim, float masks; the rest of the meanings is made here.

What the kernel is known to get wrong is kept away from it (seen on torch 2.13):

- without a mask it takes the maximum of fewer than 16 scores past NaN, and answers 0 to a query whose scores are all NaN;
- its exp in half precision is off by 5e-5, and so is its lse: where that is asked for, it computes in float32;
- it reads a float32 mask on float64 wrongly, and a head dim that is not laid out densely, or on torch 2.6 a mask's keys;
- it reports an lse of 0 for a query that sees nothing, and its backward makes NaN of -inf there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_core.shaping import (
    infinite_lse,
    positive_scale,
    query_sign,
    repeated_heads,
    summed_heads,
    unit_stride,
    widened,
)
from attn_native import aten_corner
from attn_native.aten_masks import Mask, additive, hide_blind

if TYPE_CHECKING:
    from attn_core.shaping import Tensors

_FEW_KEYS = 16  # float32 lanes of the widest vector
_HALF = (torch.float16, torch.bfloat16)
_FLASH = torch._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: Mask = None,
    causal: bool = False,
    deterministic: bool = False,  # noqa: ARG001 - always: each row is computed by one thread
    return_lse: bool = False,
) -> Any:
    """Attention (B, Sq, Hq, Dv), and its lse (B, Hq, Sq) where asked.

    Args:
        query: (B, Sq, Hq, D), nothing empty.
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        scale: factor of the scores.
        attn_mask: bool, float of query's dtype or float32 (both without a gradient), or ``KeyPadding``.
        causal: bottom-right.
        deterministic: accepted, always so.
        return_lse: whether the lse is returned too.
    """
    if causal and query.shape[1] != key.shape[1]:
        options: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
        return aten_corner.forward(
            (forward, backward), query, key, value, scale=scale, return_lse=return_lse, **options
        )
    if return_lse and query.dtype in _HALF:
        mask = additive(attn_mask, torch.float32)
        out, lse = forward(
            query.float(), key.float(), value.float(), scale=scale, attn_mask=mask, causal=causal, return_lse=True
        )
        return out.to(query.dtype), lse
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
    width = value.shape[3]
    if query.shape[3] != width or query.shape[2] != key.shape[2]:
        query, key, value = _alike(query, key, value)
    mask = additive(attn_mask, query.dtype)
    if mask is None and key.shape[1] < _FEW_KEYS:
        mask = torch.zeros((1, 1, 1, 1), dtype=query.dtype)
    out, lse = _FLASH(
        unit_stride(query).transpose(1, 2),
        unit_stride(key).transpose(1, 2),
        unit_stride(value).transpose(1, 2),
        0.0,
        causal,
        attn_mask=None if mask is None else unit_stride(mask),
        scale=scale,
    )
    out = out.transpose(1, 2)
    if value.shape[3] != width:
        out = out[..., :width]
    if query.dtype == torch.float64:
        lse = lse.double()  # it is; a fake one is float32 before torch 2.13
    return (out, hide_blind(lse, attn_mask, keys=key.shape[1], causal=causal)) if return_lse else out


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    attn_mask: Mask = None,
    causal: bool = False,
    deterministic: bool = False,  # noqa: ARG001 - always
) -> Tensors:
    """The gradients of query, key and value; ``out`` and ``lse`` may be those of a longer key sequence."""
    if causal and query.shape[1] != key.shape[1]:
        return aten_corner.backward(  # type: ignore[no-any-return]
            backward, grad_out, query, key, value, out, lse, attn_mask=attn_mask, scale=scale
        )
    sign = 1.0
    if scale <= 0.0:
        sign = query_sign(scale)
        query, scale = positive_scale(query, scale)
    key_heads, head_dim, value_head_dim = key.shape[2], query.shape[3], value.shape[3]
    query, key, value = _alike(query, key, value)
    width = query.shape[3]
    mask = additive(attn_mask, query.dtype)
    grads = _FLASH_BACKWARD(
        unit_stride(widened(grad_out, width)).transpose(1, 2),
        unit_stride(query).transpose(1, 2),
        unit_stride(key).transpose(1, 2),
        unit_stride(value).transpose(1, 2),
        unit_stride(widened(out, width)).transpose(1, 2),
        infinite_lse(lse),
        0.0,
        causal,
        attn_mask=None if mask is None else unit_stride(mask),
        scale=scale,
    )
    grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)
    return (
        grad_query[..., :head_dim] if sign == 1.0 else grad_query[..., :head_dim] * sign,
        summed_heads(grad_key, key_heads)[..., :head_dim],
        summed_heads(grad_value, key_heads)[..., :value_head_dim],
    )


def _alike(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    width = max(query.shape[3], value.shape[3])
    heads = query.shape[2]
    return (
        widened(query, width),
        widened(repeated_heads(key, heads), width),
        widened(repeated_heads(value, heads), width),
    )
