"""Adapter of flash-attn 3 (``flash_attn_interface``), written against hopper/ of flash-attention at commit 0251105a2fb1.

Its forward and backward are operators of their own, which trace. lse is natural, and -inf both for a query that sees nothing and
for one that met a NaN; +inf where no sequence of a packed call has a key.

Its tiles read on beyond a packed sequence, and what they read there is weighed with 0, which leaves NaN what it is. So key
padding is not packed: the kept keys of a sequence go to its front, and ``seqused_k`` says how many they are. Of a dense forward
the operator alone takes that. The backward leaves it unread without ``cu_seqlens``, so it is told where the keys of each sequence
start, with more zeros between them than a tile reads on. Queries are dense in both: it would read on among them too.

It makes descriptors of its tensors before anything that would give a new thread the context of the GPU, and a thread without
one ends the process; so this adapter gives it to each thread at its first call.
"""

from __future__ import annotations

import threading
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    flash_attn_func,
    flash_attn_varlen_func,
)

from attn_core.masks import traced
from attn_core.packed_calls import Mask, Options, Starts, attend, differentiate, options_of
from attn_core.shaping import natural_lse, needs_graph

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


class _Kernel(NamedTuple):
    """The library; ``lengths``, of a dense call, says how many keys of each sequence are real, the first ones."""

    lengths: torch.Tensor | None = None

    @property
    def room(self) -> int:
        """Its backward reads keys in tiles of 128 at most."""
        return _ROOM

    def fronted(self, lengths: torch.Tensor) -> _Kernel:
        """The same of padded keys."""
        return _Kernel(lengths)

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
        if query.is_cuda and not hasattr(_THREAD, "has_context") and not traced(query):
            torch.cuda.mem_get_info()
            _THREAD.has_context = True
        all_see = starts is None and self.lengths is None and options.all_see(query, key)
        nothing = float("inf") if key.shape[0] == 0 else float("-inf")
        if not needs_graph(query, key, value):
            out, lse = _run(query, key, value, self.lengths, starts, options)
            return out, natural_lse(lse, out, nothing, all_see=all_see) if return_lse else None
        if self.lengths is not None:
            apply: Any = _Fronted.apply
            out, lse = apply(query, key, value, self.lengths, options)
            return out, natural_lse(lse, out, nothing) if return_lse else None
        given = {
            "softmax_scale": options.scale,
            "causal": options.causal,
            "window_size": (options.left, options.right),
            "softcap": options.softcap,
            "deterministic": options.deterministic,
            "return_attn_probs": return_lse,
        }
        if starts is None:
            found = flash_attn_func(query, key, value, **given)
        else:
            found = flash_attn_varlen_func(query, key, value, *starts, **given)
        if not return_lse:
            return found, None
        out, lse = found
        return out, natural_lse(lse, out, nothing, all_see=all_see)

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
        width = key.shape[1]
        places: dict[str, Any] = {} if starts is None else starts._asdict()
        if self.lengths is not None:
            places, key, value = _laid_out(key, self.lengths), key.flatten(0, 1), value.flatten(0, 1)
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        _flash_attn_backward(
            grad_out, query, key, value, out, lse, dq=dq, dk=dk, dv=dv,
            softmax_scale=options.scale, is_causal=options.causal, softcap=options.softcap,
            window_size_left=options.left, window_size_right=options.right, deterministic=options.deterministic, **places,
        )  # fmt: skip
        if self.lengths is not None:
            dk, dv = dk.unflatten(0, (-1, width)), dv.unflatten(0, (-1, width))
        return dq, dk, dv


def _laid_out(key: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
    """Where the keys of each sequence are among those of all."""
    batch, width = key.shape[:2]
    starts = torch.arange(0, batch * width + 1, width, dtype=torch.int32, device=key.device)
    return {"cu_seqlens_k": starts, "sequed_k": lengths, "max_seqlen_k": width}


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    starts: Starts | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and lse without a graph."""
    scale, causal, left, right, softcap, *_ = options
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = starts or (None,) * 4
    out, lse, *_ = _flash_attn_forward(
        query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k,
        seqused_k=lengths, softmax_scale=scale, causal=causal, window_size_left=left, window_size_right=right, softcap=softcap,
    )  # fmt: skip
    return out, lse


class _Fronted(torch.autograd.Function):
    """The graph of a dense call of which ``lengths`` says how many keys are real, which the library has no function for."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, lengths: Any, options: Any) -> Any:
        """Result and lse."""
        out, lse = _run(query, key, value, lengths, None, options)
        ctx.save_for_backward(query, key, value, out, lse, lengths)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Any, _: Any) -> Any:
        """The gradients."""
        query, key, value, out, lse, lengths = ctx.saved_tensors
        grads = _Kernel(lengths).backward(grad_out, query, key, value, out, lse, None, ctx.options)
        return (*grads, None, None)


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
_ROOM = 128
KERNEL = _Kernel()
