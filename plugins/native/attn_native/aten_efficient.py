"""torch's memory-efficient CUDA kernel (CUTLASS, from xformers): any head dim, float32 too, additive masks with a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from attn_core.masks import diagonal_mask
from attn_core.offset import without_offset
from attn_core.shaping import (
    aligned,
    infinite_lse,
    positive_scale,
    query_sign,
    repeated_heads,
    summed_heads,
    widened,
)
from attn_native.aten_masks import Mask, additive, hide_blind, rows

if TYPE_CHECKING:
    from attn_core.shaping import Tensors

_EFFICIENT = torch.ops.aten._efficient_attention_forward.default
_SDPA_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
_EFFICIENT_BACKWARD = torch.ops.aten._efficient_attention_backward.default

_NO_CUSTOM_MASK, _TOP_LEFT, _BOTTOM_RIGHT = 0, 1, 2
_LSE_ROWS = 32
_modes: Any = torch._C._len_torch_dispatch_stack  # how many are on, such as that of fake tensors


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: Mask = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    deterministic: bool = False,  # noqa: ARG001 - the forward always is; the backward is refused
    return_lse: bool = False,
) -> Any:
    """Attention (B, Sq, Hq, Dv) with its graph, the mask's included, and its lse (B, Hq, Sq) where asked.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        scale: factor of the scores.
        attn_mask: bool, float of query's dtype, or ``KeyPadding``.
        causal: bottom-right.
        dropout_p: drawn from the device's generator; the backward draws the same.
        deterministic: accepted without a backward.
        return_lse: whether the lse is returned too.
    """
    _, queries, heads, head_dim = query.shape  # each shape is read once: a reading costs as much as two checks
    _, keys, key_heads, _ = key.shape
    width, blind = value.shape[3], queries - keys
    if causal and isinstance(attn_mask, torch.Tensor) and attn_mask.requires_grad:
        attn_mask, causal = _with_diagonal(attn_mask, queries, keys), False
    if causal and blind > 0:
        result = forward(
            query[:, blind:],
            key,
            value,
            scale=scale,
            attn_mask=rows(attn_mask, blind),
            causal=True,
            dropout_p=dropout_p,
            return_lse=return_lse,
        )
        return _with_blind(result, blind, return_lse=return_lse)
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
    if heads != key_heads or head_dim % 8 or width % 8:
        query, key, value = _widened(query, key, value)
    query, key, value = aligned(query), aligned(key), aligned(value)
    bias, offset = without_offset(attn_mask, queries, keys, causal=causal)
    compute = _in_graph if torch.compiler.is_dynamo_compiling() or _modes() else _EFFICIENT
    out, lse = compute(
        query,
        key,
        value,
        None if bias is None else _bias(bias, query, key),
        None,
        None,
        queries,
        keys,
        dropout_p,
        _mask_type(query, key, causal=causal) if causal else _NO_CUSTOM_MASK,
        True,  # the op's own backward needs the lse
        scale=scale,
    )[:2]
    if width % 8:
        out = out[..., :width]
    if out.requires_grad:
        out.register_hook(aligned)
    if not return_lse:
        return out
    lse = lse[..., :queries]
    return out, hide_blind(lse if offset is None else lse + offset, attn_mask, keys=keys, causal=causal)


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
) -> Tensors:
    """The gradients of query, key and value; ``out`` and ``lse`` may be those of a longer key sequence."""
    blind = query.shape[1] - key.shape[1]
    if causal and blind > 0:
        grads = backward(
            grad_out[:, blind:],
            query[:, blind:],
            key,
            value,
            out[:, blind:],
            lse[:, :, blind:],
            scale=scale,
            attn_mask=rows(attn_mask, blind),
            causal=True,
        )
        return pad(grads[0], (0, 0, 0, 0, blind, 0)), grads[1], grads[2]
    sign = 1.0
    if scale <= 0.0:
        sign = query_sign(scale)
        query, scale = positive_scale(query, scale)
    key_heads, head_dim, value_head_dim = key.shape[2], query.shape[3], value.shape[3]
    query, key, value = (aligned(item) for item in _widened(query, key, value))
    no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
    grads = (_planned if isinstance(query, FakeTensor) else _EFFICIENT_BACKWARD)(
        aligned(widened(grad_out, value.shape[3])),
        query,
        key,
        value,
        None if attn_mask is None else _bias(attn_mask, query, key),
        # the kernel derives the result's row stride from its shape
        aligned(widened(out, value.shape[3]).contiguous()),
        None,
        None,
        query.shape[1],
        key.shape[1],
        pad(infinite_lse(lse), (0, -lse.shape[2] % _LSE_ROWS), value=float("inf")).contiguous(),
        0.0,
        no_dropout,
        no_dropout,
        _mask_type(query, key, causal=causal),
        False,
        scale=scale,
    )[:3]
    return (
        grads[0][..., :head_dim] if sign == 1.0 else grads[0][..., :head_dim] * sign,
        summed_heads(grads[1], key_heads)[..., :head_dim],
        summed_heads(grads[2], key_heads)[..., :value_head_dim],
    )


def _planned(_: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any, **___: Any) -> Tensors:
    """The gradients without numbers: torch's own plan of its operator lacks an argument (2.6 to 2.13)."""
    first, second, third = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return first, second, third


def _in_graph(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    _starts_q: None,
    _starts_k: None,
    queries: int,
    keys: int,
    dropout_p: float,
    mask_type: int,
    _lse: bool,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through SDPA's operator: what torch traces as the backward of the other one fails (seen on 2.10 to 2.13)."""
    if mask_type == _BOTTOM_RIGHT:  # SDPA's operator has the other corner alone
        bias = query.new_zeros(1, 1, 1, 1) if bias is None else bias
        diagonal = _with_diagonal(bias.expand(-1, -1, queries, keys), queries, keys)
        bias = _bias(diagonal, query, key)
    out, lse = _SDPA_EFFICIENT(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        bias, True, dropout_p, mask_type == _TOP_LEFT, scale=scale,
    )[:2]  # fmt: skip
    return out.transpose(1, 2), lse


def _with_diagonal(attn_mask: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """Write the diagonal into a mask: what lies behind it, the kernel skips, and leaves the mask's gradient there unwritten."""
    visible = diagonal_mask(queries, keys, causal=True, device=attn_mask.device)
    return attn_mask.masked_fill(~cast("torch.Tensor", visible), float("-inf"))


def _with_blind(result: Any, blind: int, *, return_lse: bool) -> Any:
    if not return_lse:
        return pad(result, (0, 0, 0, 0, blind, 0))
    out, lse = result
    return pad(out, (0, 0, 0, 0, blind, 0)), pad(lse, (blind, 0), value=float("-inf"))


def _widened(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    heads, head_dim, value_head_dim = query.shape[2], query.shape[3], value.shape[3]
    if heads != key.shape[2]:
        key, value = repeated_heads(key, heads), repeated_heads(value, heads)
    if head_dim % 8:
        query, key = widened(query, head_dim + -head_dim % 8), widened(key, head_dim + -head_dim % 8)
    if value_head_dim % 8:
        value = widened(value, value_head_dim + -value_head_dim % 8)
    return query, key, value


def _mask_type(query: torch.Tensor, key: torch.Tensor, *, causal: bool) -> int:
    if not causal:
        return _NO_CUSTOM_MASK
    return _TOP_LEFT if query.shape[1] == key.shape[1] else _BOTTOM_RIGHT


def _bias(attn_mask: Any, query: torch.Tensor, key: torch.Tensor) -> Any:
    """The mask as the kernel reads it: rows 16 bytes aligned, other dimensions expanded without a copy."""
    bias: Any = additive(attn_mask, query.dtype)
    batch, queries, heads, keys = query.shape[0], query.shape[1], query.shape[2], key.shape[1]
    if bias.shape[3] == 1:
        bias = bias.expand(-1, -1, -1, keys)
    bias = pad(bias, (0, -keys % 8))[..., :keys] if keys % 8 else aligned(bias)
    return bias.expand(batch, heads, queries, keys)
