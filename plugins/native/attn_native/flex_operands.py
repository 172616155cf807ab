"""What form a call of flex has, and the tensors that the form reads: kept where only lengths and options decide them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from attn_core.masks import Description, KeyPadding, Packed
from attn_native import flex_blocks
from attn_native.flex_blocks import NO_LIMIT, Documents
from attn_native.flex_forms import BLOCK, Blocks, Form, Operands

if TYPE_CHECKING:
    from collections.abc import Callable

Mask = torch.Tensor | Description | None

_TINY = torch.finfo(torch.float32).tiny


def traced() -> bool:
    """Whether the call is being traced, so that nothing may be kept and no other compiled code entered."""
    return torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: Mask,
    scale: float,
    left: int,
    right: int,
    softcap: float | None,
    *,
    lse: bool,
) -> tuple[Form, Operands]:
    """Find the form of a call and its tensors.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        attn_mask: as in the call.
        scale: the factor of the scores.
        left: keys seen before the query's position, -1 for all.
        right: the same after it.
        softcap: as in the call.
        lse: whether it is returned.
    """
    device, head_dim, groups = query.device, query.shape[3], query.shape[2] // key.shape[2]
    query_length, key_length = query.shape[1], key.shape[1]
    shift = 0 if isinstance(attn_mask, Packed) else key_length - query_length
    usual = scale == float(head_dim) ** -0.5
    on_diagonal = right >= 0 and shift + right == 0
    indexed, dense = _dense_operand(attn_mask, key_length)
    form = Form(
        scale=scale if usual else None,
        mask=kind_of(attn_mask),
        indexed=indexed,
        low=left >= 0,
        high=right >= 0 and not on_diagonal,
        diagonal=on_diagonal,
        softcap=softcap is not None,
        gqa=groups > 1,
        forced=groups & (groups - 1) != 0 or (groups > 1 and query_length * groups > BLOCK),
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
        # a cap above 1e30 changes no score, and may be too much for float32; too little for it would be 0
        softcap=None if softcap is None else _scalar(min(max(softcap, _TINY), 1e30), torch.float32, device),
        blocks=blocks,
    )


def kind_of(attn_mask: Mask) -> str:
    """The kind of a mask, as ``attn_core.facts.MASKS`` names it."""
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
    attn_mask = attn_mask.detach()
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
            ("flex_documents", query_length, key_length),
            lambda: flex_blocks.documents_of(packed, query_length, key_length),
        )
        return documents, packed.prepared(
            ("flex_blocks", *sizes), lambda: flex_blocks.blocks(flex_blocks.diagonal(*sizes, device, documents))
        )
    if isinstance(attn_mask, KeyPadding):
        keep = attn_mask.keep[:, None, None, :]
        blocks: Blocks = attn_mask.prepared(("flex_blocks", *sizes), lambda: _with_dense(sizes, device, keep))
        return None, blocks
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        return None, _with_dense(sizes, device, attn_mask)  # a tensor can change unseen, so nothing of it is kept
    return None, _kept(_diagonal_blocks, *sizes, device)


def _with_dense(sizes: tuple[int, int, int, int], device: torch.device, mask: torch.Tensor) -> Blocks:
    return flex_blocks.blocks(flex_blocks.both(flex_blocks.diagonal(*sizes, device), flex_blocks.dense(mask)))


def _diagonal_blocks(query_length: int, key_length: int, low: int, high: int, device: torch.device) -> Blocks:
    return flex_blocks.blocks(flex_blocks.diagonal(query_length, key_length, low, high, device))


def _scalar(number: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    scalar: torch.Tensor = _kept(_filled, number, dtype, device)
    return scalar


def _filled(number: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), number, dtype=dtype, device=device)


def _kept(make: Callable[..., Any], *arguments: Any) -> Any:
    """What ``make`` makes of plain numbers, kept unless it is traced or belongs to a CUDA graph."""
    if traced() or (arguments[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return make(*arguments)
    return _made(make, *arguments)


@lru_cache(maxsize=512)
def _made(make: Callable[..., Any], *arguments: Any) -> Any:
    with torch.inference_mode(mode=False):  # kept tensors are saved by later calls that have a graph
        made = make(*arguments)
    if arguments[-1].type == "cuda":  # a later call may come on another stream
        torch.cuda.current_stream(arguments[-1]).synchronize()
    return made
