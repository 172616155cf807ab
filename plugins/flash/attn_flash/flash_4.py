"""Adapter of flash-attn 4 (``flash_attn.cute``), written against 4.0.0b36.

What its public functions call is called: they would make a graph of their own, which costs as much as this adapter. It can't be
traced, so in traced code two operators made here stand for it. An unlimited side of a window is None there, -1 being a number.
lse is natural, and -inf both for a query that sees nothing and for one that met a NaN.

Its tiles of keys read on beyond a packed sequence, and what they read there is weighed with 0, which leaves NaN what it is. So
key padding is not packed: the kept keys of a sequence go to its front, and ``seqused_k`` says how many they are.
"""

from __future__ import annotations

import sys
import warnings
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad

from attn_core.masks import traced
from attn_core.packed_calls import Mask, Options, Starts, attend, differentiate, options_of
from attn_core.shaping import natural_lse

_shows_errors = sys.excepthook
with warnings.catch_warnings():  # its language sets filters, and a hook of its own for what nobody catches
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
sys.excepthook = _shows_errors

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
    deterministic: bool = False,  # noqa: ARG001 - the forward always is
    return_lse: bool = False,
) -> Any:
    """Attention by flash-attn 4; see ``attn_core.attention`` for the meaning of the arguments."""
    options = options_of(scale, causal, window_size, softcap)
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

    def fronted(self, lengths: torch.Tensor) -> _Kernel:
        """The same of padded keys."""
        return _Kernel(lengths)

    def widths(self, head_dim: int, value_head_dim: int, device: torch.device) -> tuple[int, int]:
        """One width, which the backward with grouped queries wants; on Blackwell there is none between 128 and 256."""
        width = max(head_dim, value_head_dim)
        width += -width % 8
        if width > 128 and _major(device) in (10, 11):
            width = 256
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
        if not traced(query):
            return _run(query, key, value, self.lengths, starts, options, return_lse=return_lse)
        out, lse = _FORWARD(query, key, value, *_flat(self.lengths, starts, options))
        return out, lse

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
        """The gradients, computed in steps of 32 of the head dim.

        On Hopper the kernel lays its sums out in steps of 16, and what reads them takes steps of 32: in between, gradients of
        other rows come out.
        """
        width = query.shape[-1]
        grad_out, query, key, value, out = (_widened(item) for item in (grad_out, query, key, value, out))
        tensors = (grad_out, query, key, value, out, lse)
        if traced(query):
            dq, dk, dv = _BACKWARD(*tensors, *_flat(self.lengths, starts, options), options.deterministic)
        else:
            dq, dk, dv = _run_backward(*tensors, self.lengths, starts, options)
        return dq[..., :width], dk[..., :width], dv[..., :width]


def _check_library() -> None:
    """flash-attn 2 carries an early ``flash_attn.cute``, which takes the place of this one where it is installed later."""
    if "return_lse" not in signature(flash_attn_func).parameters:
        msg = (
            "flash_attn.cute is not that of flash-attn-4 but the early one that flash-attn 2 carries; "
            "pip install --pre --force-reinstall --no-deps flash-attn-4"
        )
        raise ImportError(msg)


_check_library()
_NOTHING = float("-inf")
KERNEL = _Kernel()


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    missing = -tensor.shape[-1] % 32
    return pad(tensor, (0, missing)) if missing else tensor


def _side(limit: int) -> int | None:
    return None if limit < 0 else limit


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    starts: Starts | None,
    options: Options,
    *,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    scale, causal, left, right, softcap, *_ = options
    given: dict[str, Any] = {"softmax_scale": scale, "causal": causal, "softcap": softcap, "return_lse": return_lse}
    if left >= 0:
        given["window_size_left"] = left
    if right >= 0 and not causal:
        given["window_size_right"] = right
    if starts is not None:
        given |= starts._asdict()
    elif lengths is not None:
        given["seqused_k"] = lengths
    out, lse = _flash_attn_fwd(query, key, value, **given)[:2]
    if not return_lse:
        return out, None
    all_see = starts is None and lengths is None and options.all_see(query, key)
    return out, natural_lse(lse, out, _NOTHING, all_see=all_see)


def _run_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lengths: torch.Tensor | None,
    starts: Starts | None,
    options: Options,
) -> Tensors:
    places: dict[str, Any] = {"seqused_k": lengths} if starts is None else starts._asdict()
    dq, dk, dv = _flash_attn_bwd(
        query, key, value, out, grad_out, lse,
        softmax_scale=options.scale, causal=options.causal, softcap=options.softcap, deterministic=options.deterministic,
        window_size_left=_side(options.left), window_size_right=None if options.causal else _side(options.right), **places,
    )  # fmt: skip
    return dq, dk, dv


# --- operators for traced code ------------------------------------------------------------------------------------------

_GIVEN = (
    "Tensor? seqused_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "float scale, bool causal, SymInt left, SymInt right, float softcap"
)


def _flat(lengths: torch.Tensor | None, starts: Starts | None, options: Options) -> tuple[Any, ...]:
    """What an operator is given of them, in the order of its schema."""
    scale, causal, left, right, softcap, *_ = options  # not a slice, which torch 2.6 does not trace of a named tuple
    return (lengths, *(starts or (None,) * 4), scale, causal, left, right, softcap)


def _unflat(given: tuple[Any, ...], **others: Any) -> tuple[torch.Tensor | None, Starts | None, Options]:
    starts = None if given[1] is None else Starts(*given[1:5])
    return given[0], starts, Options(*given[5:10], **others)


@torch.library.custom_op(
    "attn_flash::flash_4_forward",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_GIVEN}) -> (Tensor, Tensor)",
)
def _FORWARD(query: Any, key: Any, value: Any, *given: Any) -> Any:  # noqa: N802 - an operator
    with torch.no_grad():
        return _run(query, key, value, *_unflat(given))


@_FORWARD.register_fake
def _(query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32).transpose(-1, -2).contiguous()
    return query.new_empty((*query.shape[:-1], value.shape[-1])), lse


@torch.library.custom_op(
    "attn_flash::flash_4_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_GIVEN}, "
    "bool deterministic) -> (Tensor, Tensor, Tensor)",
)
def _BACKWARD(  # noqa: N802 - an operator
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, *given: Any
) -> Any:
    return _run_backward(grad_out, query, key, value, out, lse, *_unflat(given, deterministic=given[-1]))


@_BACKWARD.register_fake
def _(_: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any) -> Tensors:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
