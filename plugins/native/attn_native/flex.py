"""Adapter of ``torch.nn.attention.flex_attention``, always compiled."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from attn_core.masks import Description, KeyPadding, Packed
from attn_native import flex_blocks
from attn_native.flex_blocks import NO_LIMIT, Documents, Visible
from attn_native.flex_compiled import compiled
from attn_native.flex_forms import INDEXED, Blocks, Form, Operands, attend, roomy

if TYPE_CHECKING:
    from collections.abc import Callable

    Mask = torch.Tensor | Description | None


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
    deterministic: bool = False,  # noqa: ARG001 (the kernels are; what is not is refused by a rule)
    return_lse: bool = False,
) -> Any:
    """Attention by compiled flex_attention; see ``attention`` for the meaning of the arguments.

    Inside code that torch.compile traces, a CPU call is one opaque operator: the CPU template can't be fused with what
    follows it ("Unsupported for `epilogue_nodes`"). On a GPU flex_attention becomes part of the graph.

    Raises:
        BackendNotUsable: torch.compile has no compiler, is switched off, gives up, or reached its limit.
    """
    left, right = window_size or (-1, -1)
    if causal:
        right = 0
    if query.device.type == "cpu":
        if _traced():
            return _opaque(query, key, value, attn_mask, scale, left, right, softcap)
        with torch.no_grad():
            return _eager(query.detach(), key.detach(), value.detach(), attn_mask, scale, left, right, softcap, lse=return_lse)
    if _traced():
        form, operands = _prepare(query, key, attn_mask, scale, left, right, softcap, lse=return_lse)
        return attend(form, query, key, value, operands)
    if torch.is_grad_enabled() and _requires_grad(query, key, value, attn_mask):
        return _eager(query, key, value, attn_mask, scale, left, right, softcap, lse=return_lse)
    with torch.no_grad():
        return _eager(query, key, value, attn_mask, scale, left, right, softcap, lse=return_lse)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of these keys' part in attention over a longer key sequence, whose result and lse are given.

    flex_attention has no backward that takes them, so the part is computed again, (o, l), and differentiated through the
    merge: with w = exp(l - lse) the result is the sum of w o over the parts, so that

        d result / d o = w        d result / d l = w (o - result)

    Returns:
        (dq, dk, dv), shaped as query, key and value.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    with torch.enable_grad():
        part, part_lse = forward(
            *inputs, scale=scale, attn_mask=attn_mask, causal=causal, window_size=window_size, softcap=softcap, return_lse=True
        )
    weight = (part_lse.detach() - lse).exp().masked_fill(part_lse.detach() == -torch.inf, 0)
    grad_part = grad_out.float() * weight.transpose(1, 2)[..., None]
    grad_lse = (grad_part * (part.detach().float() - out.float())).sum(-1).transpose(1, 2)
    dq, dk, dv = torch.autograd.grad((part, part_lse), inputs, (grad_part.to(part.dtype), grad_lse))
    return dq, dk, dv


def _traced() -> bool:
    return torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _requires_grad(*tensors: object) -> bool:
    return any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors)


# --- eager callers ------------------------------------------------------------------------------------------------------


def _eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Mask,
    scale: float, left: int, right: int, softcap: float | None, *, lse: bool,
) -> Any:  # fmt: skip
    form, operands = _prepare(query, key, attn_mask, scale, left, right, softcap, lse=lse)
    if query.device.type == "cpu":
        operands = operands._replace(**{name: roomy(getattr(operands, name)) for name in INDEXED})
    layouts, (query, key, value) = zip(*(_settled(tensor) for tensor in (query, key, value)), strict=True)
    if key is query:  # Dynamo compiles anew for arguments that are one tensor
        key = key.view_as(key)
    if value is query or value is key:
        value = value.view_as(value)
    batch, query_length, key_length = query.shape[0], query.shape[1], key.shape[1]
    kind = (
        query.device, query.dtype, query.shape[2:], key.shape[2:], value.shape[3], layouts,
        batch == 1, query_length == 1, key_length == 1, query_length == key_length,
        operands.blocks is None or (query_length <= flex_blocks.BLOCK, key_length <= flex_blocks.BLOCK),
        torch.is_grad_enabled() and (query.requires_grad, key.requires_grad, value.requires_grad),
        operands.dense is not None and (operands.dense.dtype, operands.dense.requires_grad),
        query.device.type == "cpu" and tuple(_shape(getattr(operands, name)) for name in INDEXED),
        query.is_inference(),
    )  # fmt: skip
    return compiled(form, kind)(query, key, value, operands)


def _shape(tensor: torch.Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _settled(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    """A tensor in one of three layouts, and which: every other one would be code of its own."""
    if tensor.is_contiguous():
        return 0, tensor
    if tensor.transpose(1, 2).is_contiguous():
        return 1, tensor
    strides = tensor.stride()
    if strides[3] == 1 and strides[0] >= strides[1] >= strides[2] >= tensor.shape[3]:  # a slice of (B, S, H, D)
        return 2, tensor
    return 0, tensor.contiguous()


# --- what the form of a call and its tensors are ------------------------------------------------------------------------


def _prepare(
    query: torch.Tensor, key: torch.Tensor, attn_mask: Mask, scale: float, left: int, right: int, softcap: float | None, *, lse: bool
) -> tuple[Form, Operands]:
    device, head_dim, groups = query.device, query.shape[3], query.shape[2] // key.shape[2]
    query_length, key_length = query.shape[1], key.shape[1]
    shift = 0 if isinstance(attn_mask, Packed) else key_length - query_length
    usual = scale == float(head_dim) ** -0.5
    on_diagonal = right >= 0 and shift + right == 0
    indexed, dense = _dense_operand(attn_mask, key_length)
    form = Form(
        scale=scale if usual else None,
        mask=_kind(attn_mask),
        indexed=indexed,
        low=left >= 0,
        high=right >= 0 and not on_diagonal,
        diagonal=on_diagonal,
        softcap=softcap is not None,
        gqa=groups > 1,
        forced=groups & (groups - 1) != 0,
        lse=lse,
    )
    low = shift - left if left >= 0 else -NO_LIMIT
    high = shift + right if right >= 0 else NO_LIMIT
    documents, blocks = _hidden(form, attn_mask, query_length, key_length, low, high, device)
    return form, Operands(
        dense=dense,
        position=documents and documents.position,
        owner_q=documents and documents.owner_q,
        owner_k=documents and documents.owner_k,
        low=_scalar(low, torch.int32, device) if form.low else None,
        high=_scalar(high, torch.int32, device) if form.high else None,
        factor=None if usual else _scalar(scale, torch.float32, device),
        softcap=None if softcap is None else _scalar(softcap, torch.float32, device),
        blocks=blocks,
    )


def _kind(attn_mask: Mask) -> str:
    if attn_mask is None:
        return "none"
    if isinstance(attn_mask, torch.Tensor):
        return "bool" if attn_mask.dtype == torch.bool else "float"
    return attn_mask.kind


def _dense_operand(attn_mask: Mask, key_length: int) -> tuple[tuple[bool, ...], torch.Tensor | None]:
    """Which of (B, Hq, Sq, Skv) a mask is indexed by, and the mask with only those."""
    if isinstance(attn_mask, KeyPadding):
        return (True, False, False, True), attn_mask.keep.contiguous()
    if not isinstance(attn_mask, torch.Tensor):
        return (), None
    if attn_mask.requires_grad:  # its gradient is summed over whatever it is broadcast to, in its dtype
        attn_mask = attn_mask.float()
    indexed = tuple(size != 1 for size in attn_mask.shape)
    if not any(indexed):
        return (False, False, False, True), attn_mask.reshape(1).expand(key_length).contiguous()
    kept = attn_mask.reshape([size for size in attn_mask.shape if size != 1])
    return indexed, kept.contiguous()


def _hidden(
    form: Form, attn_mask: Mask, query_length: int, key_length: int, low: int, high: int, device: torch.device
) -> tuple[Documents | None, Blocks | None]:
    """The packed documents, and the block mask, made once for lengths and limits and once for a description."""
    if not form.hides:
        return None, None
    sizes = (query_length, key_length, low, high)
    if isinstance(attn_mask, Packed):
        packed = attn_mask
        documents: Documents = packed.prepared(
            ("flex_documents", query_length, key_length), lambda: flex_blocks.documents_of(packed, query_length, key_length)
        )
        return documents, packed.prepared(
            ("flex_blocks", *sizes), lambda: flex_blocks.blocks(flex_blocks.diagonal(*sizes, device, documents))
        )
    if isinstance(attn_mask, KeyPadding):
        keep = attn_mask.keep[:, None, None, :]
        return None, attn_mask.prepared(("flex_blocks", *sizes), lambda: _with_dense(sizes, device, keep))
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        return None, _with_dense(sizes, device, attn_mask)  # a tensor can change unseen, so nothing of it is kept
    return None, _kept(_diagonal_blocks, *sizes, device)


def _with_dense(sizes: tuple[int, int, int, int], device: torch.device, mask: torch.Tensor) -> Blocks:
    return flex_blocks.blocks(flex_blocks.both(flex_blocks.diagonal(*sizes, device), flex_blocks.dense(mask)))


def _diagonal_blocks(query_length: int, key_length: int, low: int, high: int, device: torch.device) -> Blocks:
    return flex_blocks.blocks(flex_blocks.diagonal(query_length, key_length, low, high, device))


def _scalar(number: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return _kept(_filled, number, dtype, device)


def _filled(number: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), number, dtype=dtype, device=device)


def _kept(make: Callable[..., Any], *arguments: Any) -> Any:
    """What ``make`` makes of plain numbers, kept unless it is traced or belongs to a CUDA graph."""
    if _traced() or (arguments[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return make(*arguments)
    return _made(make, *arguments)


@lru_cache(maxsize=512)
def _made(make: Callable[..., Any], *arguments: Any) -> Any:
    with torch.inference_mode(mode=False):  # kept tensors are saved by later calls that have a graph
        made = make(*arguments)
    if arguments[-1].type == "cuda":  # a later call may come on another stream
        torch.cuda.current_stream(arguments[-1]).synchronize()
    return made


# --- one opaque operator for traced code on CPU -------------------------------------------------------------------------


def _opaque(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Mask,
    scale: float, left: int, right: int, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    tensors: list[torch.Tensor] = []
    if isinstance(attn_mask, KeyPadding):
        tensors = [attn_mask.keep]
    elif isinstance(attn_mask, Packed):
        tensors = [attn_mask.cu_seqlens_q, attn_mask.cu_seqlens_k]
    elif isinstance(attn_mask, torch.Tensor):
        tensors = [attn_mask]
    result: torch.Tensor = _flex_cpu(query, key, value, tensors, _kind(attn_mask), scale, left, right, softcap)
    return result


@torch.library.custom_op("attn_native::flex_cpu", mutates_args=())
def _flex_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: list[torch.Tensor],
    kind: str,
    scale: float,
    left: int,
    right: int,
    softcap: float | None,
) -> torch.Tensor:
    attn_mask: Mask = mask[0] if mask else None
    if kind == "key_padding":
        attn_mask = KeyPadding(mask[0])
    elif kind == "packed":
        attn_mask = Packed(mask[0], mask[1])
    out: torch.Tensor = _eager(query, key, value, attn_mask, scale, left, right, softcap, lse=False)
    return out.contiguous()


@_flex_cpu.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: list[torch.Tensor],  # noqa: ARG001
    kind: str, scale: float, left: int, right: int, softcap: float | None,  # noqa: ARG001
) -> torch.Tensor:  # fmt: skip
    return query.new_empty((*query.shape[:3], value.shape[3]))
