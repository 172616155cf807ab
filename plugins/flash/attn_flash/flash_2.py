"""Adapter of flash-attn 2 (``flash_attn``), written against 2.8.3.

Its public functions bring their own graph, dropout included, and trace; where no gradient is asked for, the operator below
them does the same at less cost. Of a query that sees nothing the result is 0 and the lse +inf, which its backward wants as
well. A right side of a window that is unlimited, or beyond the longest sequence of keys, it takes to be that length, which
is too little where there are more queries than keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    flash_attn_func,
    flash_attn_varlen_func,
)

from attn_core.packed_calls import Mask, Options, Starts, attend, differentiate, options_of
from attn_core.shaping import infinite_lse, natural_lse, needs_graph

if TYPE_CHECKING:
    from attn_core.shaping import Tensors


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: Mask = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention by flash-attn 2, with its graph; see ``attn_core.attention`` for the meaning of the arguments."""
    options = options_of(scale, causal, window_size, softcap, dropout_p=dropout_p, deterministic=deterministic)
    return attend(KERNEL, query, key, value, attn_mask, options, return_lse=return_lse)


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
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
) -> Tensors:
    """Gradients of query, key and value; ``out`` and ``lse`` may be those of a longer key sequence."""
    options = options_of(scale, causal, window_size, softcap, deterministic=deterministic)
    return differentiate(KERNEL, grad_out, query, key, value, out, lse, attn_mask, options)


class _Kernel:
    takes_gaps = True

    def widths(self, head_dim: int, value_head_dim: int, _: torch.device) -> tuple[int, int]:
        """One for all, in steps of 8."""
        width = max(head_dim, value_head_dim)
        width += -width % 8
        return width, width

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: Starts | None,
        options: Options,
        *,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Result with its graph, and lse."""
        if starts is None and _beyond(query, key, options):
            batch = query.shape[0]
            starts = _as_packed(query, key)
            query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
            out, lse = self.forward(query, key, value, starts, options, return_lse=return_lse)
            out = out.unflatten(0, (batch, -1))
            return out, None if lse is None else lse.unflatten(1, (batch, -1)).transpose(0, 1)
        scale, causal, left, right, softcap, dropout_p, deterministic = options
        all_see = starts is None and options.all_see(query, key)
        if not needs_graph(query, key, value):
            given = (dropout_p, scale, causal, left, right, softcap, None, False)
            if starts is None:
                out, lse, *_ = _flash_attn_forward(query, key, value, *given)
            else:
                out, lse, *_ = _flash_attn_varlen_forward(query, key, value, *starts.bounded(options), *given)
            return out, natural_lse(lse, out, all_see=all_see) if return_lse else None
        public = (dropout_p, scale, causal, (left, right), softcap, None, deterministic, return_lse)
        if starts is None:
            found = flash_attn_func(query, key, value, *public)
        else:
            found = flash_attn_varlen_func(query, key, value, *starts.bounded(options), *public)
        if not return_lse:
            return found, None
        out, lse, _ = found
        return out, natural_lse(lse, out, all_see=all_see)

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        starts: Starts | None,
        options: Options,
    ) -> Tensors:
        """The gradients."""
        if starts is None and _beyond(query, key, options):
            batch, starts = query.shape[0], _as_packed(query, key)
            grad_out, query, key, value, out = (item.flatten(0, 1) for item in (grad_out, query, key, value, out))
            lse = lse.transpose(0, 1).flatten(1).contiguous()
            dq, dk, dv = self.backward(grad_out, query, key, value, out, lse, starts, options)
            return dq.unflatten(0, (batch, -1)), dk.unflatten(0, (batch, -1)), dv.unflatten(0, (batch, -1))
        grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        given = (
            0.0, options.scale, options.causal, options.left, options.right, options.softcap, None, options.deterministic
        )  # fmt: skip
        if starts is not None or not options.all_see(query, key):
            lse = infinite_lse(lse)
        if starts is None:
            _flash_attn_backward(grad_out, query, key, value, out, lse, *grads, *given)
        else:
            bounds = starts.bounded(options)
            _flash_attn_varlen_backward(grad_out, query, key, value, out, lse, *grads, *bounds, *given)
        return grads


KERNEL = _Kernel()


def _beyond(query: torch.Tensor, key: torch.Tensor, options: Options) -> bool:
    return options.open_diagonal and query.shape[1] > key.shape[1]


def _as_packed(query: torch.Tensor, key: torch.Tensor) -> Starts:
    batch = torch.arange(query.shape[0] + 1, dtype=torch.int32, device=query.device)
    return Starts(batch * query.shape[1], batch * key.shape[1], query.shape[1], key.shape[1])
