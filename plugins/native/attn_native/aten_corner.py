"""Bottom-right causal attention from kernels that are top-left causal, without a dense mask.

With more queries than keys the first queries see nothing, and the others are a square, on which both mean the same. With
fewer queries, every query sees the first ``Skv - Sq`` keys, and the rest is a square: two calls, merged by their lse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from attn_core.shaping import needs_graph
from attn_native.aten_masks import additive, columns, rows

if TYPE_CHECKING:
    from collections.abc import Callable

Forward = Any
Backward = Any


def forward(kernel: tuple[Forward, Backward], query: Any, key: Any, value: Any, **options: Any) -> Any:
    """Attend bottom-right causally where query and key lengths differ.

    Args:
        kernel: the adapter's forward and backward, right for equal lengths and without causal.
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        **options: those of the adapter, without ``causal``.
    """
    if query.shape[1] > key.shape[1]:
        return _more_queries(kernel[0], query, key, value, **options)
    return _fewer_queries(kernel, query, key, value, **options)


def backward(
    kernel: Backward,
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    *,
    attn_mask: Any,
    scale: float,
) -> Any:
    """The gradients of ``forward``, from a result and lse that may be those of a longer key sequence."""
    blind = query.shape[1] - key.shape[1]
    if blind > 0:
        grads = kernel(
            grad_out[:, blind:],
            query[:, blind:],
            key,
            value,
            out[:, blind:],
            lse[:, :, blind:],
            scale=scale,
            causal=True,
            **_masked(rows(attn_mask, blind)),
        )
        return (pad(grads[0], (0, 0, 0, 0, blind, 0)), *grads[1:])
    seen = -blind
    mask = additive(attn_mask, query.dtype)
    first = kernel(
        grad_out, query, key[:, :seen], value[:, :seen], out, lse, scale=scale, **_masked(columns(mask, 0, seen))
    )
    second = kernel(
        grad_out,
        query,
        key[:, seen:],
        value[:, seen:],
        out,
        lse,
        scale=scale,
        causal=True,
        **_masked(columns(mask, seen, None)),
    )
    return first[0] + second[0], torch.cat((first[1], second[1]), 1), torch.cat((first[2], second[2]), 1)


def _masked(attn_mask: Any) -> dict[str, Any]:
    return {} if attn_mask is None else {"attn_mask": attn_mask}


def _more_queries(
    kernel: Forward,
    query: Any,
    key: Any,
    value: Any,
    *,
    attn_mask: Any = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    blind = query.shape[1] - key.shape[1]
    out, lse = kernel(
        query[:, blind:], key, value, causal=True, return_lse=True, **_masked(rows(attn_mask, blind)), **options
    )
    out = pad(out, (0, 0, 0, 0, blind, 0))
    return (out, pad(lse, (blind, 0), value=float("-inf"))) if return_lse else out


def _fewer_queries(
    kernel: tuple[Forward, Backward],
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float,
    attn_mask: Any = None,
    return_lse: bool = False,
) -> Any:
    mask = additive(attn_mask, query.dtype)
    if needs_graph(query, key, value):
        # Dynamo takes no tensor twice
        key = key.view_as(key) if key is query else key
        value = value.view_as(value) if value is query or value is key else value
        out, lse = _Merged.apply(query, key, value, mask, scale, *kernel)  # type: ignore[no-untyped-call]
    else:
        out, lse = _merged(kernel[0], query, key, value, mask, scale)
    return (out, lse) if return_lse else out


def _merged(kernel: Forward, query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    seen = key.shape[1] - query.shape[1]
    first = kernel(
        query, key[:, :seen], value[:, :seen], scale=scale, return_lse=True, **_masked(columns(mask, 0, seen))
    )
    second = kernel(
        query,
        key[:, seen:],
        value[:, seen:],
        scale=scale,
        causal=True,
        return_lse=True,
        **_masked(columns(mask, seen, None)),
    )
    return merge(*first, *second)


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put together the results of the same queries (B, Sq, H, Dv) on two parts of the keys, by their lse (B, H, Sq)."""
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    share_a = (lse_a - finite).exp().transpose(1, 2).unsqueeze(-1)
    share_b = (lse_b - finite).exp().transpose(1, 2).unsqueeze(-1)
    out = out_a * share_a + out_b * share_b
    # not so where nothing is to do: Dynamo of torch 2.11 then loses the gradient of what ``_Merged`` saves and returns
    return out if out.dtype == out_a.dtype else out.to(out_a.dtype), lse


class _Merged(torch.autograd.Function):
    """The ops' own graphs stop at the lse, so the graph of a merge is made from backwards with the merged lse."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scale: float,
        kernel: Callable[..., Any],
        kernel_backward: Callable[..., Any],
    ) -> Any:
        out, lse = _merged(kernel, query, key, value, mask, scale)
        ctx.save_for_backward(query, key, value, out, lse, mask)
        ctx.scale = scale
        ctx.kernel_backward = kernel_backward
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Any, _: Any) -> Any:
        query, key, value, out, lse, mask = ctx.saved_tensors
        grads = backward(ctx.kernel_backward, grad_out, query, key, value, out, lse, attn_mask=mask, scale=ctx.scale)
        return (*grads, None, None, None, None)
