"""The adapters: xformers' own choice of operator, and one operator each.

Described masks are packed, or hidden, as for flash-attention. A written-out mask, and key padding for cutlass, becomes a tensor
to add, which cutlass alone takes.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from attn_core.masks import Packed, traced
from attn_core.offset import without_offset
from attn_core.packed_calls import Kernel, Options, Starts, attend, differentiate, options_of
from attn_core.shaping import aligned, positive_scale, query_sign, widened
from attn_xformers.bias import dense_bias, hidden_rows
from attn_xformers.operators import HAS_FLASH_3, Given, run, run_backward, traced_backward, traced_run

if TYPE_CHECKING:
    from attn_core.masks import KeyPadding
    from attn_core.shaping import Tensors

Mask = Any
_WIDEST_FLASH = 256
"""Up to which head dim FlashAttention goes, and xformers' own choice with it."""
_MOST_PROGRAMS = 65535
"""How many sequences times heads split-K takes at a time: they are one dimension of its grid."""
_MOST_PARTIAL_NUMBERS, _ROWS_OF_A_BLOCK = 2**31 // 64, 128
"""Of a sequence its partial results, in up to 64 splits, are counted in 32 bits; queries come in blocks of up to so many."""


class _Operator:
    """One of xformers' operators, or its own choice."""

    def __init__(self, which: str) -> None:
        self.which = which
        # FlashAttention-3, which xformers chooses where it is there, reads on behind a sequence
        self.takes_gaps = which == "flash" or (which == "auto" and not HAS_FLASH_3)

    def widths(self, head_dim: int, value_head_dim: int, _: torch.device) -> tuple[int, int]:
        """In steps of 8, and one for all but cutlass; a power of two for split-K."""
        if self.which == "cutlass":
            return head_dim + -head_dim % 8, value_head_dim + -value_head_dim % 8
        width = max(head_dim, value_head_dim)
        if self.which == "splitk":
            width = max(16, 1 << (width - 1).bit_length())
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
        """Result and lse."""
        if starts is None:
            return self._dense(query, key, value, options, return_lse=return_lse)
        if key.shape[0] == 0:  # no key in all sequences, of which xformers can't tell the number of heads
            lse = query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=torch.float32)
            return query.new_zeros((*query.shape[:-1], value.shape[-1])), lse
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        out, lse = call(query, key, value, self.given(None, starts, options), lse=return_lse)
        return out.squeeze(0), None if lse is None else lse.squeeze(0)

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
        if starts is not None and key.shape[0] == 0:
            return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        tensors = (grad_out, query, key, value, out, lse)
        if starts is None:
            return call_backward(tensors, self.given(None, None, options))
        packed = tuple(item.unsqueeze(0) for item in tensors)
        dq, dk, dv = call_backward(packed, self.given(None, starts, options))
        return dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)

    def _dense(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options, *, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        given = self.given(None, None, options)
        if self.which != "splitk":
            return call(query, key, value, given, lse=return_lse)
        batch, queries, heads, width = query.shape
        most = max(_MOST_PROGRAMS // heads, 1)
        if batch > most:
            parts = zip(query.split(most), key.split(most), value.split(most), strict=True)
            found = [self._dense(*part, options, return_lse=return_lse) for part in parts]
            return torch.cat([out for out, _ in found]), _joined(found, 0) if return_lse else None
        rows = max(_MOST_PARTIAL_NUMBERS // (heads * width) - _ROWS_OF_A_BLOCK, 1)
        if queries > rows:
            found = [call(part, key, value, given, lse=return_lse) for part in query.split(rows, 1)]
            return torch.cat([out for out, _ in found], 1), _joined(found, 2) if return_lse else None
        return call(query, key, value, given, lse=return_lse)

    def given(self, bias: torch.Tensor | None, starts: Starts | None, options: Options) -> Given:
        """The call in the words of xformers. One query for each sequence would be taken for no causal call."""
        scale, causal, left, right, *_ = options  # not a slice, which torch 2.6 does not trace
        causal = causal or right == 0  # of one diagonal there is one class, with a window or without
        if starts is None:
            return Given(self.which, bias, None, None, 0, 0, scale, causal, left, right)
        cu_q, cu_k, longest_q, longest_k = starts
        return Given(self.which, bias, cu_q, cu_k, max(longest_q, 2), longest_k, scale, causal, left, right)


def call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, given: Given, *, lse: bool
) -> tuple[torch.Tensor, Any]:
    """``run``, or the operator that stands for it where the call is traced."""
    if traced(query):
        out, found = traced_run(query, key, value, *given)
        return out, found
    return run(query, key, value, given, lse=lse)


def call_backward(tensors: tuple[torch.Tensor, ...], given: Given) -> Tensors:
    """``run_backward``, or the operator that stands for it where the call is traced."""
    run: Any = traced_backward if traced(*tensors) else run_backward
    dq, dk, dv = run(*tensors, *given) if run is traced_backward else run(*tensors, given)
    return dq, dk, dv


def forward(
    operator: _Operator,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: Mask = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    deterministic: bool = False,  # noqa: ARG001 - the forward always is; the backward is refused
    return_lse: bool = False,
) -> Any:
    """Attention by an operator of xformers; see ``attn_core.attention`` for the meaning of the other arguments."""
    options = options_of(scale, causal, window_size, None)
    if causal and not isinstance(attn_mask, Packed) and (blind := query.shape[1] - key.shape[1]) > 0:
        # its bias classes know no query that sees nothing
        again = partial(forward, operator, query[:, blind:], key, value, scale=scale, attn_mask=attn_mask, causal=True)
        out, lse = again(window_size=window_size, return_lse=True)
        out = pad(out, (0, 0, 0, 0, blind, 0))
        return (out, pad(lse, (blind, 0), value=float("-inf"))) if return_lse else out
    if attn_mask is None or not _added(operator, attn_mask, query, value):
        return attend(operator, query, key, value, attn_mask, options, return_lse=return_lse)
    return _with_bias(operator, query, key, value, attn_mask, options, return_lse=return_lse)


def backward(
    operator: _Operator,
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
) -> Tensors:
    """Gradients of query, key and value; ``out`` and ``lse`` may be those of a longer key sequence."""
    options = options_of(scale, causal, window_size, None)
    blind = query.shape[1] - key.shape[1]
    if causal and blind > 0 and not isinstance(attn_mask, Packed):
        grads = backward(
            operator, grad_out[:, blind:], query[:, blind:], key, value, out[:, blind:], lse[:, :, blind:],
            scale=scale, attn_mask=attn_mask, causal=True, window_size=window_size,
        )  # fmt: skip
        return pad(grads[0], (0, 0, 0, 0, blind, 0)), grads[1], grads[2]
    if attn_mask is None or not _added(operator, attn_mask, query, value):
        return differentiate(operator, grad_out, query, key, value, out, lse, attn_mask, options)
    return _with_bias_backward(operator, grad_out, query, key, value, out, lse, attn_mask, options)


def _added(operator: _Operator, attn_mask: Mask, query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a mask becomes a tensor to add to the scores, which cutlass alone takes; packed, its lse has another layout."""
    if isinstance(attn_mask, torch.Tensor):
        return True
    if isinstance(attn_mask, Packed) or operator.which == "flash":
        return False
    if (
        operator.which == "cutlass"
        or query.dtype == torch.float32
        or max(query.shape[3], value.shape[3]) > _WIDEST_FLASH
    ):
        return True
    return query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0)


def _with_bias(
    operator: _Operator,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | KeyPadding,
    options: Options,
    *,
    return_lse: bool,
) -> Any:
    width = value.shape[3]
    query, options, _ = _scaled(query, options)
    query, key, value = _shaped(query, key, value)
    near, offset = without_offset(attn_mask, query.shape[1], key.shape[1])
    bias = dense_bias(near, query, key.shape[1])
    out, lse = call(query, key, value, operator.given(bias, None, options), lse=return_lse)
    blind = hidden_rows(attn_mask)
    out = out[..., :width].masked_fill(blind.transpose(1, 2).unsqueeze(3), 0.0)
    if not return_lse:
        return out
    lse = lse if offset is None else lse + offset
    return out, lse.masked_fill(blind, float("-inf"))


def _with_bias_backward(
    operator: _Operator,
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    attn_mask: torch.Tensor | KeyPadding,
    options: Options,
) -> Tensors:
    head_dim, width = query.shape[3], value.shape[3]
    query, options, sign = _scaled(query, options)
    query, key, value = _shaped(query, key, value)
    grad_out, out = (aligned(widened(item, value.shape[3])) for item in (grad_out, out))
    given = operator.given(dense_bias(attn_mask, query, key.shape[1]), None, options)
    dq, dk, dv = call_backward((grad_out, query, key, value, out, lse), given)
    return dq[..., :head_dim] * sign, dk[..., :head_dim], dv[..., :width]


def _scaled(query: torch.Tensor, options: Options) -> tuple[torch.Tensor, Options, float]:
    if options.scale > 0.0:
        return query, options, 1.0
    sign = query_sign(options.scale)
    query, scale = positive_scale(query, options.scale)
    return query, options.scaled(scale), sign


def _shaped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    width, value_width = (size + -size % 8 for size in (query.shape[3], value.shape[3]))
    return aligned(widened(query, width)), aligned(widened(key, width)), aligned(widened(value, value_width))


_AUTO, _CUTLASS, _FLASH, _SPLITK = (_Operator(which) for which in ("auto", "cutlass", "flash", "splitk"))
_CHECKED: tuple[Kernel, ...] = (_AUTO, _CUTLASS, _FLASH, _SPLITK)


# Methods of the operator, as it were: a function that hands its options on would cost a third of a microsecond more.
auto_forward: Any = MethodType(forward, _AUTO)
"""Attention by the operator that xformers chooses."""
auto_backward: Any = MethodType(backward, _AUTO)
cutlass_forward: Any = MethodType(forward, _CUTLASS)
"""Attention by CUTLASS kernels."""
cutlass_backward: Any = MethodType(backward, _CUTLASS)
flash_forward: Any = MethodType(forward, _FLASH)
"""Attention by FlashAttention-2: flash-attn's where it is installed, else torch's."""
flash_backward: Any = MethodType(backward, _FLASH)
splitk_forward: Any = MethodType(forward, _SPLITK)
"""Attention by the Triton kernel that splits the keys."""


def _joined(found: list[tuple[torch.Tensor, torch.Tensor | None]], dim: int) -> torch.Tensor:
    return torch.cat([lse for _, lse in found if lse is not None], dim)
