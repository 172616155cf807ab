"""torch's CPU flash kernel: top-left causal, one head dim, float masks; the rest of the meanings is made here.

What the kernel is known to get wrong is kept away from it (seen on torch 2.13):

- without a mask it takes the maximum of fewer than 16 scores past NaN, and answers 0 to a query whose scores are all NaN;
- its exp in half precision is off by 5e-5, and so is its lse: where that is asked for, it computes in float32;
- it reads a float32 mask on float64 wrongly, and a head dim that is not laid out densely, or on torch 2.6 a mask's keys;
- it reports an lse of 0 for a query that sees nothing, and its backward makes NaN of -inf there;
- it answers 0, with an lse of 0, where all scores that a query sees are -inf, as of infinite inputs: that is NaN here, but in
  compiled code only where the lse is asked for, since telling costs a pass over query and key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_core.offset import without_offset
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
from attn_native.aten_masks import Mask, additive, hide_blind, seeing

if TYPE_CHECKING:
    from attn_core.shaping import Tensors

_FEW_KEYS = 16  # float32 lanes of the widest vector
_HALF = (torch.float16, torch.bfloat16)
_is_compiled = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack  # how many are on, such as that of fake tensors
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
    queries, keys = query.shape[1], key.shape[1]
    if attn_mask is not None and (_traced() or not bool(query.detach().sum().isfinite())):
        sees = seeing(attn_mask, queries, keys, causal=causal, device=query.device)
        if (
            sees is not None
        ):  # a NaN or inf in a query that sees nothing would be in its result and in the gradients of all keys
            query = query.masked_fill(~sees.transpose(1, 2).unsqueeze(-1), 0.0)
    mask, offset = attn_mask, None
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype != torch.bool:
        mask = additive(attn_mask, torch.float32 if return_lse and query.dtype in _HALF else query.dtype)
        mask, offset = without_offset(mask, queries, keys, causal=causal)
    if causal and queries != keys:
        out, lse = aten_corner.forward(
            (_part, backward), query, key, value, scale=scale, attn_mask=mask, return_lse=True
        )
        plain = _traced() and not return_lse
    else:
        out, lse = _computed(query, key, value, scale=scale, attn_mask=mask, causal=causal, exact=return_lse)
        plain = not return_lse if _traced() else _is_plain(lse)
        lse = lse if plain else _settled(query, key, out, lse, scale=scale, attn_mask=mask, causal=causal)
    if not plain:
        out = _nan_where_unseen(out, lse, mask, keys, causal=causal)
    if not return_lse:
        return out
    return out, lse if offset is None else lse + offset


def _is_plain(lse: torch.Tensor) -> bool:
    """Whether no lse may stand for something else: 0 for -inf, and in half precision +inf for the NaN of a score of +inf."""
    low, high = lse.detach().abs().aminmax()
    return low.item() > 0.0 and high.item() < float("inf")


def _part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: Mask = None,
    causal: bool = False,
    return_lse: bool = True,  # noqa: ARG001 - always
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result over some of the keys, and the lse to merge it by: -inf where there is no score but -inf."""
    out, lse = _computed(query, key, value, scale=scale, attn_mask=attn_mask, causal=causal, exact=True)
    if not _traced() and bool(lse.all()):
        return out, lse
    return out, _settled(query, key, out, lse, scale=scale, attn_mask=attn_mask, causal=causal)


def _computed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: Mask,
    causal: bool,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's result and its lse: 0 where there is no score but -inf; if not ``exact``, rough in half precision."""
    if exact and query.dtype in _HALF:
        mask = additive(attn_mask, torch.float32)
        out, lse = _computed(
            query.float(), key.float(), value.float(), scale=scale, attn_mask=mask, causal=causal, exact=True
        )
        return out.to(query.dtype), lse
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
    width = value.shape[3]
    if query.shape[3] != width or query.shape[2] != key.shape[2]:
        query, key, value = _alike(query, key, value)
    mask = additive(attn_mask, query.dtype)
    if mask is None and (_is_compiled() or key.shape[1] < _FEW_KEYS):  # compiled code is not to depend on the length
        mask = query.new_zeros((1, 1, 1, 1))
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
    return out, lse


def _traced() -> bool:
    """Whether no number can be asked for."""
    return _is_compiled() or _dispatch_modes() > 0


def _settled(
    query: torch.Tensor,
    key: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    attn_mask: Mask,
    causal: bool,
) -> torch.Tensor:
    """The lse with -inf where the kernel found no score but -inf: of a mask, or of inputs so large that scores overflow."""
    if scale != 0.0:
        reach = query.detach().abs().amax(-1).to(lse.dtype)
        reach = reach * repeated_heads(key.detach().abs().amax((1, 3), keepdim=True), query.shape[2])[..., 0]
        large = ~(reach * (query.shape[3] * max(abs(scale), 1.0)) < torch.finfo(lse.dtype).max)
        overflown = large & (out.detach() == 0.0).all(-1)
        lse = lse.masked_fill((lse == 0.0) & overflown.transpose(1, 2), float("-inf"))
    return hide_blind(lse, attn_mask, keys=key.shape[1], causal=causal)


def _nan_where_unseen(
    out: torch.Tensor, lse: torch.Tensor, attn_mask: Mask, keys: int, *, causal: bool
) -> torch.Tensor:
    """NaN, and a gradient of NaN, for queries that see keys and have no score but -inf, or one of +inf."""
    empty = lse.detach().isinf()
    if not (_traced() or bool(empty.any())):
        return out
    sees = seeing(attn_mask, lse.shape[2], keys, causal=causal, device=lse.device)
    unseen = empty if sees is None else empty & sees
    factor = torch.ones_like(empty, dtype=out.dtype).masked_fill(unseen, float("nan"))
    return out * factor.transpose(1, 2).unsqueeze(-1)


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
    grad_query = _narrow(grad_query, head_dim)
    return (
        grad_query if sign == 1.0 else grad_query * sign,
        _narrow(summed_heads(grad_key, key_heads), head_dim),
        _narrow(summed_heads(grad_value, key_heads), value_head_dim),
    )


def _narrow(grad: torch.Tensor, width: int) -> torch.Tensor:
    """Without what a head dim was widened by; a slice of everything has no rule for ``is_grads_batched``."""
    return grad if grad.shape[3] == width else grad[..., :width]


def _alike(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    width = max(query.shape[3], value.shape[3])
    heads = query.shape[2]
    return (
        widened(query, width),
        widened(repeated_heads(key, heads), width),
        widened(repeated_heads(value, heads), width),
    )
