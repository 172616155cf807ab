"""Adapter of flash-attn 3 (``flash_attn_interface``), written against hopper/ of flash-attention at commit 0251105a2fb1.

Its forward and backward are operators of their own, which trace. lse is natural, and -inf both for a query that sees nothing and
for one that met a NaN; +inf where no sequence of a packed call has a key.

It makes descriptors of its tensors before anything that would give a new thread the context of the GPU, and a thread without
one ends the process; so this adapter gives it to each thread at its first call.
"""

from __future__ import annotations

import threading
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from flash_attn_interface import _flash_attn_backward, flash_attn_func, flash_attn_varlen_func

from attn_core.masks import traced
from attn_core.packed_calls import Mask, Options, Starts, attend, differentiate, options_of
from attn_core.shaping import natural_lse

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
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention by flash-attn 3, with its graph; see ``attn_core.attention`` for the meaning of the arguments."""
    options = options_of(scale, causal, window_size, softcap, deterministic=deterministic)
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
        given = {
            "softmax_scale": options.scale,
            "causal": options.causal,
            "window_size": (options.left, options.right),
            "softcap": options.softcap,
            "deterministic": options.deterministic,
            "return_attn_probs": return_lse,
        }
        if query.is_cuda and not hasattr(_THREAD, "has_context") and not traced(query):
            torch.cuda.mem_get_info()
            _THREAD.has_context = True
        if starts is None:
            found = flash_attn_func(query, key, value, **given)
        else:
            found = flash_attn_varlen_func(query, key, value, *starts, **given)
        if not return_lse:
            return found, None
        out, lse = found
        all_see = starts is None and options.all_see(query, key)
        return out, natural_lse(lse, out, float("inf") if key.shape[0] == 0 else float("-inf"), all_see=all_see)

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
        grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        packed: dict[str, Any] = {} if starts is None else starts._asdict()
        dq, dk, dv = grads
        _flash_attn_backward(
            grad_out, query, key, value, out, lse, dq=dq, dk=dk, dv=dv,
            softmax_scale=options.scale, is_causal=options.causal, softcap=options.softcap,
            window_size_left=options.left, window_size_right=options.right, deterministic=options.deterministic, **packed,
        )  # fmt: skip
        return grads


def _check_library() -> None:
    """It has one version number for all its commits."""
    if "return_attn_probs" not in signature(flash_attn_func).parameters:
        msg = (
            "flash_attn_interface is of an early flash-attn 3, whose flash_attn_func takes no return_attn_probs; accepted: "
            "hopper/ of flash-attention since that argument came. Next: build it anew from https://github.com/Dao-AILab/flash-attention"
        )
        raise ImportError(msg)


_check_library()
_THREAD = threading.local()
KERNEL = _Kernel()
