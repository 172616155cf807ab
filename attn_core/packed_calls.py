"""How a call becomes a dense or a packed call of a library in the manner of flash-attention, and back.

Such a library is aligned bottom-right, takes (B, S, H, D) or packed (N, H, D), and knows no masks. Key padding is packed, or
for one that reads on behind a sequence the keys that are kept are moved to the front of their own.
Where a diagonal would move by that (padding that is not on the left, or not known to be), it is hidden by further columns.
An adapter brings a ``Kernel``, which need not know of masks, head dims or scales.
"""

from __future__ import annotations

from math import inf, nan
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from attn_core.masks import KeyPadding, Packed
from attn_core.packing import Front, Packing, blind_queries, front, hide, keeps_diagonals, pack
from attn_core.shaping import aligned, positive_scale, query_sign, widened

if TYPE_CHECKING:
    from attn_core.shaping import Tensors

_is_traced = torch.compiler.is_dynamo_compiling  # bound once: a look-up through modules on each call adds up

_UNLIMITED = (-1, -1)
_FAR = 1e30
"""As an lse it leaves no weight to any score, whichever infinity a kernel takes for that."""

Mask = KeyPadding | Packed | None


class Starts(NamedTuple):
    """Where each sequence of a packed call starts, and bounds of the lengths."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def bounded(self, options: Options) -> Starts:
        """The same with bounds that FlashAttention-2 can be given; that is all that it needs the lengths for.

        At most one query per sequence would make it take every sequence to have one; where no sequence has a key, its
        backward would start a grid of no blocks, which is an error of CUDA. An open right side it takes for the longest
        sequence of keys, which is too little where there are more queries.
        """
        longest_q, longest_k = max(self.max_seqlen_q, 2), max(self.max_seqlen_k, 1)
        if options.open_diagonal:
            longest_k = longest_k + longest_q
        return Starts(self.cu_seqlens_q, self.cu_seqlens_k, longest_q, longest_k)


class Options(NamedTuple):
    """The options of one call, as kernels take them: -1 is an unlimited side, 0.0 no softcap."""

    scale: float
    causal: bool = False
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False

    def scaled(self, scale: float) -> Options:
        """The same with another scale; spelled out, since torch 2.6 does not trace ``_replace``."""
        return Options(scale, self.causal, self.left, self.right, self.softcap, self.dropout_p, self.deterministic)

    @property
    def diagonal(self) -> bool:
        """Whether which keys a query sees depends on where it is."""
        return self.causal or self.left >= 0 or self.right >= 0

    @property
    def open_diagonal(self) -> bool:
        """Whether it does, and a query sees keys behind its own."""
        return self.right > 0 or (self.right < 0 and self.left >= 0)

    def all_see(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether each query of a dense call, (B, S, H, D), sees a key: its own at least, where there are as many."""
        return not self.diagonal or query.shape[1] <= key.shape[1]


class Kernel(Protocol):
    """One library. Tensors are (B, S, H, D), or (N, H, D) with ``starts``; an lse is (B, H, S), or (H, N).

    One that reads none of the keys behind a sequence, and whose backward writes zeros for the keys of a sequence without
    queries, may say so with an attribute ``takes_gaps = True``: keys that need not be moved then stay in their places.

    One that reads on behind a sequence, in whole tiles, would give it what NaN the next one has. It may have a method
    ``fronted(lengths)``: the kernel of dense calls in which the first ``lengths[b]`` keys of sequence ``b`` are real, int32 (B,).
    Padded keys then go to the front of their own sequence, with zeros behind, at least as many as its attribute ``room`` says
    (none without it).
    """

    def widths(self, head_dim: int, value_head_dim: int, device: torch.device) -> tuple[int, int]:
        """The head dims of query and of value to pad to."""

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
        """Result and lse, -inf where a query sees nothing."""

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
        """The gradients of query, key and value."""


class _Form(NamedTuple):
    """How a call with a mask is made: packed by an index, packed as it came, or with padding hidden."""

    starts: Starts | None = None
    packing: Packing | None = None
    hidden: KeyPadding | None = None


def options_of(
    scale: float,
    causal: bool,
    window_size: tuple[int, int] | None,
    softcap: float | None = None,
    *,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> Options:
    """The options of a call, with the diagonal in the words of the libraries."""
    left, right = window_size or _UNLIMITED
    return Options(scale, causal, left, 0 if causal else right, softcap or 0.0, dropout_p, deterministic)


def attend(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Mask,
    options: Options,
    *,
    return_lse: bool,
) -> Any:
    """Compute a call: the result (B, Sq, Hq, Dv), and the lse (B, Hq, Sq) where asked.

    Args:
        kernel: the library.
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        attn_mask: ``KeyPadding``, ``Packed`` or None.
        options: those of the call.
        return_lse: whether the lse is returned too.
    """
    if options.scale <= 0.0:
        query, scale = positive_scale(query, options.scale)
        options = options.scaled(scale)
    moved = None if attn_mask is None else _moved(kernel, attn_mask, options)
    if moved is not None:
        kernel, places = moved
        key, value, attn_mask = places.keys(key), places.keys(value), None
    if attn_mask is None:
        shaped = _shaped(kernel, query, key, value)
        out, lse = kernel.forward(*shaped, None, options, return_lse=return_lse)
        if shaped[2] is not value:
            out = out[..., : value.shape[3]]
    else:
        out, lse = _masked(kernel, query, key, value, attn_mask, options, return_lse=return_lse)
    if out.requires_grad and not _is_traced():
        # What a library's own graph is given; ``differentiate`` does it for the others. In traced code alignment would be
        # decided once, and on torch 2.11 a graph with a hook finds no lengths that may vary.
        out.register_hook(aligned)
    return (out, lse) if return_lse else out


def _masked(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: KeyPadding | Packed,
    options: Options,
    *,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    width = value.shape[3]
    form = _form(kernel, query, key, value, attn_mask, options)
    if form.hidden is not None:
        query_length = query.shape[1]
        query, key = hide(query, key, form.hidden, options.scale)
        out, lse = kernel.forward(*_shaped(kernel, query, key, value), None, options, return_lse=return_lse)
        blind = blind_queries(form.hidden, query_length, window_size=(options.left, options.right))
        out = out[..., :width].masked_fill(blind[:, :, None, None], 0.0)
        return out, lse.masked_fill(blind[:, None, :], float("-inf")) if lse is not None and return_lse else None
    packed = _packed(form, *_shaped(kernel, query, key, value))
    out, lse = kernel.forward(*packed, form.starts, options, return_lse=return_lse)
    out = (out.unsqueeze(0) if form.packing is None else form.packing.unpack(out))[..., :width]
    if lse is None or not return_lse:
        return out, None
    return out, lse.unsqueeze(0) if form.packing is None else form.packing.unpack_lse(lse)


def differentiate(
    kernel: Kernel,
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    attn_mask: Mask,
    options: Options,
) -> Tensors:
    """Gradients of query, key and value; ``out`` and ``lse`` may be those of a longer key sequence.

    Args:
        kernel: the library.
        grad_out: gradient of the result, (B, Sq, Hq, Dv).
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        out: the result.
        lse: (B, Hq, Sq), -inf where a query sees nothing.
        attn_mask: ``KeyPadding``, ``Packed`` or None.
        options: those of the forward.
    """
    moved = None if attn_mask is None else _moved(kernel, attn_mask, options)
    if moved is not None:
        kernel, places = moved
        keys, values = places.keys(key), places.keys(value)
        dq, dk, dv = differentiate(kernel, grad_out, query, keys, values, out, lse, None, options)
        return dq, places.unpack_keys(dk), places.unpack_keys(dv)
    sign, head_dim, width = 1.0, query.shape[3], value.shape[3]
    if options.scale <= 0.0:
        sign = query_sign(options.scale)
        query, scale = positive_scale(query, options.scale)
        options = options.scaled(scale)
    form = _Form() if attn_mask is None else _form(kernel, query, key, value, attn_mask, options)
    if form.hidden is not None:
        query, key = hide(query, key, form.hidden, options.scale)
        # a query that sees padding alone, which the kernel takes for one that sees, gets no weights
        lse = lse.nan_to_num(nan, inf, _FAR)
    query, key, value = _shaped(kernel, query, key, value)
    grad_out, out = (aligned(widened(item, value.shape[3])) for item in (grad_out, out))
    if form.packing is not None:
        query, key, value = _packed(form, query, key, value)
        grad_out, out = form.packing.queries(grad_out), form.packing.queries(out)
        lse = form.packing.query_lse(lse)
    elif form.starts is not None:
        query, key, value, grad_out, out, lse = (item.squeeze(0) for item in (query, key, value, grad_out, out, lse))
    dq, dk, dv = kernel.backward(grad_out, query, key, value, out, lse.contiguous(), form.starts, options)
    if form.packing is not None:
        dq, dk, dv = form.packing.unpack(dq), form.packing.unpack_keys(dk), form.packing.unpack_keys(dv)
    elif form.starts is not None:
        dq, dk, dv = dq.unsqueeze(0), dk.unsqueeze(0), dv.unsqueeze(0)
    dq = dq[..., :head_dim]
    return dq if sign == 1.0 else dq * sign, dk[..., :head_dim], dv[..., :width]


def _moved(kernel: Kernel, attn_mask: KeyPadding | Packed, options: Options) -> tuple[Kernel, Front] | None:
    """The kernel for keys that are moved to the front, and how they are, where they are: not where a diagonal would move."""
    fronted = getattr(kernel, "fronted", None)
    if fronted is None or isinstance(attn_mask, Packed) or (options.diagonal and not keeps_diagonals(attn_mask)):
        return None
    places = front(attn_mask, room=getattr(kernel, "room", 0))
    return fronted(places.lengths), places


def _form(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: KeyPadding | Packed,
    options: Options,
) -> _Form:
    if isinstance(attn_mask, Packed):
        longest_q = query.shape[1] if attn_mask.max_seqlen_q is None else attn_mask.max_seqlen_q
        longest_k = key.shape[1] if attn_mask.max_seqlen_k is None else attn_mask.max_seqlen_k
        return _Form(starts=Starts(attn_mask.cu_seqlens_q, attn_mask.cu_seqlens_k, longest_q, longest_k))
    if options.diagonal and not keeps_diagonals(attn_mask):
        return _Form(hidden=attn_mask)
    gaps = getattr(kernel, "takes_gaps", False) and not _is_traced() and _is_one(key) and _is_one(value)
    packing = pack(attn_mask, query.shape[1], gaps=gaps)
    starts = Starts(packing.cu_seqlens_q, packing.cu_seqlens_k, packing.max_seqlen_q, packing.max_seqlen_k)
    return _Form(starts=starts, packing=packing)


def _is_one(tensor: torch.Tensor) -> bool:
    """Whether the sequences of a batch follow one another, so that laying them end to end moves nothing."""
    return tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


def _shaped(kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    head_dim, value_head_dim = query.shape[3], value.shape[3]
    width, value_width = kernel.widths(head_dim, value_head_dim, query.device)
    if (  # nothing to do, found out at a third of the cost
        width == head_dim
        and value_width == value_head_dim
        and not _is_traced()
        and query.is_contiguous()
        and key.is_contiguous()
        and value.is_contiguous()
        and query.storage_offset() % 8 == 0
        and key.storage_offset() % 8 == 0
        and value.storage_offset() % 8 == 0
    ):
        return query, key, value
    return aligned(widened(query, width)), aligned(widened(key, width)), aligned(widened(value, value_width))


def _packed(form: _Form, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    if form.packing is None:
        return query.squeeze(0), key.squeeze(0), value.squeeze(0)
    return form.packing.queries(query), form.packing.keys(key), form.packing.keys(value)
