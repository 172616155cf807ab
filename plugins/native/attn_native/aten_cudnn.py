"""cuDNN's attention, as torch wraps it: top-left causal, GQA, dropout; the other corner is made here."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from attn_core.errors import CallRefused
from attn_core.shaping import aligned, in_graph, infinite_lse, positive_scale, query_sign, widened
from attn_native import aten_corner

if TYPE_CHECKING:
    from attn_core.shaping import Tensors

_CUDNN: Any = torch._scaled_dot_product_cudnn_attention  # cheaper to call than the operator
_CUDNN_IN_GRAPH: Any = torch.ops.aten._scaled_dot_product_cudnn_attention.default  # Dynamo fails on the other
_transpose = torch.transpose  # a tenth cheaper than the method
_grad_enabled = torch.is_grad_enabled
_is_traced = torch.compiler.is_dynamo_compiling
_CUDNN_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def forward(  # noqa: C901 - functions of its parts would cost more than they do
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    dropout_p: float = 0.0,
    deterministic: bool = False,  # noqa: ARG001 - the forward always is; the backward is refused
    return_lse: bool = False,
) -> Any:
    """Attention (B, Sq, Hq, Dv) with its graph, and its lse (B, Hq, Sq) where asked.

    Args:
        query: (B, Sq, Hq, D), float16 or bfloat16.
        key: (B, Skv, Hkv, D), Skv of 2 and up.
        value: (B, Skv, Hkv, Dv).
        scale: factor of the scores.
        causal: bottom-right.
        dropout_p: drawn from the device's generator; the backward draws the same. Not with causal and unequal lengths.
        deterministic: accepted without a backward.
        return_lse: whether the lse is returned too.

    Raises:
        CallRefused: cuDNN has no kernel for a single key, or a single query with dropout.
    """
    # On the way of every call: what is read of a tensor costs more than a comparison, and is read once at most.
    _, keys, _, head_dim = key.shape
    width = value.shape[3]
    if causal or dropout_p:
        queries = query.shape[1]
        if causal and queries != keys:
            if queries > 1:
                _check_corner(query, key)
                return aten_corner.forward((forward, backward), query, key, value, scale=scale, return_lse=return_lse)
            causal = False  # one query at the end sees every key
        if dropout_p and queries == 1:
            raise _too_short(queries, keys, dropout_p)
    if keys == 1:
        raise _too_short(query.shape[1], keys, dropout_p)
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
    if head_dim % 8 or width % 8:
        query, key, value = _padded(query, key, value)
    traced = _is_traced()
    if traced:
        query, key, value = _unexpanded_in_graph(query), _unexpanded_in_graph(key), _unexpanded_in_graph(value)
    elif not (query.is_contiguous() and key.is_contiguous() and value.is_contiguous()) or (
        query.storage_offset() or key.storage_offset() or value.storage_offset()
    ):
        query, key, value = unexpanded(query), unexpanded(key), unexpanded(value)
    graph = _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    result = (_CUDNN_IN_GRAPH if traced else _CUDNN)(
        _transpose(query, 1, 2),
        _transpose(key, 1, 2),
        _transpose(value, 1, 2),
        None,
        return_lse or graph,
        dropout_p,
        causal,
        False,
        scale=scale,
    )
    out = _transpose(result[0], 1, 2)
    if graph and not traced:
        # torch reuses its cuDNN backward by the strides of query, key and value alone; a gradient of other strides than
        # the first one's would be read wrongly
        out.register_hook(_dense)
    if width % 8:
        out = out[..., :width]
    return (out, result[1].reshape(result[1].shape[:3])) if return_lse else out


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    attn_mask: None = None,  # noqa: ARG001 - aten_corner's backwards have one
) -> Tensors:
    """The gradients of query, key and value; ``out`` and ``lse`` may be those of a longer key sequence."""
    if causal and query.shape[1] != key.shape[1]:
        if query.shape[1] > 1:
            return aten_corner.backward(  # type: ignore[no-any-return]
                backward, grad_out, query, key, value, out, lse, attn_mask=None, scale=scale
            )
        causal = False
    sign = 1.0
    if scale <= 0.0:
        sign = query_sign(scale)
        query, scale = positive_scale(query, scale)
    head_dim, value_head_dim = query.shape[3], value.shape[3]
    query, key, value = (unexpanded(item) for item in _padded(query, key, value))
    stats = infinite_lse(lse).contiguous()
    no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
    grads = _CUDNN_BACKWARD(
        _dense(widened(grad_out, value.shape[3])).transpose(1, 2),
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        _dense(widened(out, value.shape[3])).transpose(1, 2),
        stats.unsqueeze(-1) if _stats_rank(query.device) > stats.dim() else stats,
        no_dropout,
        no_dropout,
        None,
        None,
        None,
        query.shape[1],
        key.shape[1],
        0.0,
        causal,
        scale=scale,
    )
    grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)
    return (
        grad_query[..., :head_dim] if sign == 1.0 else grad_query[..., :head_dim] * sign,
        grad_key[..., :head_dim],
        grad_value[..., :value_head_dim],
    )


def _padded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    head_dim, value_head_dim = query.shape[3], value.shape[3]
    if head_dim % 8:
        query, key = widened(query, head_dim + -head_dim % 8), widened(key, head_dim + -head_dim % 8)
    if value_head_dim % 8:
        value = widened(value, value_head_dim + -value_head_dim % 8)
    return query, key, value


def unexpanded(tensor: torch.Tensor) -> torch.Tensor:
    """As ``aligned``, and no dimension expanded: cuDNN takes no stride of 0."""
    if torch.compiler.is_dynamo_compiling():
        return _unexpanded_in_graph(tensor)
    batch, rows, heads, last = tensor.stride()
    if (
        last == 1
        and batch
        and rows
        and heads
        and not (batch % 8 or rows % 8 or heads % 8 or tensor.storage_offset() % 8)
    ):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


_unexpanded_in_graph = in_graph(unexpanded)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return aligned(tensor.contiguous())


def _stats_rank(device: torch.device) -> int:
    """How many dimensions torch's cuDNN ops give the lse: 3 in older versions, 4 in newer ones, and no way to ask."""
    return _stats_rank_tried(device)


_stats_rank._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo asks while it traces, and can't trace the try


@lru_cache
def _stats_rank_tried(device: torch.device) -> int:
    probe = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device=device)
    return int(_CUDNN(probe, probe, probe, None, True)[1].dim())


def _too_short(queries: int, keys: int, dropout_p: float) -> CallRefused:
    return CallRefused(
        f"native_cudnn: found {queries} queries on {keys} keys with dropout_p={dropout_p}; cuDNN accepts "
        "2 keys and up, and with dropout 2 queries and up. Use native or native_flash"
    )


def _check_corner(query: torch.Tensor, key: torch.Tensor) -> None:
    if key.shape[1] == query.shape[1] + 1 or key.shape[1] == 1:
        msg = (
            f"native_cudnn: found causal with {query.shape[1]} queries on {key.shape[1]} keys, which leaves one key on a side "
            "of the corner; cuDNN accepts 2 keys and up. Use native or native_flash"
        )
        raise CallRefused(msg)
