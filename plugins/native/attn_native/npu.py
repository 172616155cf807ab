"""Attention on ``torch_npu.npu_fusion_attention``.

Its convention, as its documentation has it:

- True in ``atten_mask`` is hidden; the scale is 1 unless given; ``sparse_mode=3`` is the bottom-right diagonal, with a
  triangle of 2048 by 2048 as its mask, and ``sparse_mode=0`` a mask of the whole;
- packed sequences are ``TND`` with the ends of the sequences, as numbers on the host;
- beside the result come the maximum and the sum of each query's softmax, eight times each: (B, H, Sq, 8) or (T, H, 8);
- there are 256 query heads at most, and 2048 packed sequences.

Its operator takes lengths as numbers, which can't be read in traced code. There, operators made here stand for it and for its
backward, ``npu_fusion_attention_grad``, and read them when they are run.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch_npu import npu_fusion_attention, npu_fusion_attention_grad

from attn_core.errors import CallRefused
from attn_core.masks import Packed, traced, visible_mask
from attn_core.shaping import positive_scale

if TYPE_CHECKING:
    from attn_core.shaping import Tensors

TRIANGLE = 2048
SEQUENCES = 2048
DIAGONAL = 3
"""The sparse mode whose mask is the triangle."""


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: torch.Tensor | Packed | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend on an NPU.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, D).
        scale: of the scores.
        attn_mask: bool, 4-D, or packed sequences.
        causal: bottom-right.
        return_lse: also return the log-sum-exp.
    """
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
    if isinstance(attn_mask, Packed):
        return _packed(query, key, value, scale, attn_mask, return_lse=return_lse)
    hidden, blind, mode = _hidden(query, key, attn_mask, causal=causal)
    if traced(query):
        out, *softmax = _FORWARD(query, key, value, hidden, None, None, scale, mode)
    else:
        out, *softmax = _run(query, key, value, _Given(hidden, None, scale, mode))
    lse = _lse(*softmax) if return_lse else None
    if blind is not None:
        out = out.masked_fill(blind.transpose(1, 2), 0.0)
        lse = None if lse is None else lse.masked_fill(blind[..., 0], float("-inf"))
    return out if lse is None else (out, lse)


def _hidden(
    query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, *, causal: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """The mask in the kernel's words, which queries see nothing, (B, Hq, Sq, 1) or broadcastable to it, and its mode."""
    if attn_mask is None:
        return None, None, DIAGONAL if causal else 0
    visible = visible_mask(query, key, attn_mask=attn_mask, causal=causal)
    assert visible is not None  # noqa: S101 - there is a mask
    batch, heads, _, _ = visible.shape
    if heads > 1 and batch == 1:
        batch = query.shape[0]  # masks are (B, H, Sq, Skv), (B, 1, Sq, Skv) or (1, 1, Sq, Skv)
    whole = visible.expand(batch, heads, query.shape[1], key.shape[1])
    return ~whole, ~visible.any(-1, keepdim=True), 0


def _packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, packed: Packed, *, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    tensors, starts = (query[0], key[0], value[0]), (packed.cu_seqlens_q, packed.cu_seqlens_k)
    lengths_q, lengths_k = packed.lengths_q, packed.lengths_k
    if lengths_q is None or lengths_k is None:
        out, *softmax = _FORWARD(*tensors, None, *starts, scale, 0)
    else:
        out, *softmax = _run(*tensors, _Given(None, _ends(lengths_q, lengths_k), scale, 0))
    out = out.unsqueeze(0)
    return (out, _lse(*softmax).transpose(0, 1).unsqueeze(0)) if return_lse else out


def _ends(lengths_q: list[int], lengths_k: list[int]) -> tuple[list[int], list[int]]:
    """Where the sequences end, of as many and such ones as the kernel takes."""
    if len(lengths_q) > SEQUENCES:
        msg = f"native_npu: found {len(lengths_q)} packed sequences; accepted: up to {SEQUENCES}. Next: make several calls"
        raise CallRefused(msg)
    if 0 in lengths_q or 0 in lengths_k:
        msg = "native_npu: found an empty sequence among the packed ones; accepted: sequences of one token and more"
        raise CallRefused(msg)
    return list(accumulate(lengths_q)), list(accumulate(lengths_k))


def _lse(largest: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    lse: torch.Tensor = (largest[..., 0] + total[..., 0].log()).float().detach()
    return lse


# --- the kernel ---------------------------------------------------------------------------------------------------------


class _Given(NamedTuple):
    """Everything of a call but its tensors of numbers.

    Attributes:
        hidden: what is hidden, or None.
        ends: where packed sequences end, or None for a dense call.
        scale: of the scores.
        mode: the sparse mode.
    """

    hidden: torch.Tensor | None
    ends: tuple[list[int], list[int]] | None
    scale: float
    mode: int

    def options(self, query: torch.Tensor) -> dict[str, Any]:
        """What forward and backward call alike."""
        hidden = _triangle(query.device) if self.mode == DIAGONAL else self.hidden
        found: dict[str, Any] = {"head_num": query.shape[-2], "atten_mask": hidden, "sparse_mode": self.mode}
        if self.ends is None:
            return {**found, "input_layout": "BSND"}
        ends_q, ends_k = self.ends
        return {**found, "input_layout": "TND", "actual_seq_qlen": ends_q, "actual_seq_kvlen": ends_k}


@lru_cache(maxsize=8)
def _triangle(device: torch.device) -> torch.Tensor:
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu(1)


def _run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, given: _Given) -> Tensors:
    """Result with its graph, and the maximum and the sum of each query's softmax."""
    out, largest, total, *_ = npu_fusion_attention(query, key, value, scale=given.scale, **given.options(query))
    return out, largest, total


def _run_backward(given: _Given, grad_out: torch.Tensor, *saved: torch.Tensor) -> Tensors:
    query, key, value, out, largest, total = saved
    dq, dk, dv, *_ = npu_fusion_attention_grad(
        query, key, value, grad_out.contiguous(), softmax_max=largest, softmax_sum=total, attention_in=out,
        scale_value=given.scale, **given.options(query),
    )  # fmt: skip
    return dq, dk, dv


# --- operators for traced code ------------------------------------------------------------------------------------------

_SCHEMA = "Tensor? hidden, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, int mode"


def _read(hidden: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, scale: float, mode: int) -> _Given:
    """What an operator was given, with lengths as numbers."""
    if cu_seqlens_q is None:
        return _Given(hidden, None, scale, mode)
    lengths_q, lengths_k = (starts.diff().tolist() for starts in (cu_seqlens_q, cu_seqlens_k))
    return _Given(hidden, _ends(lengths_q, lengths_k), scale, mode)


@torch.library.custom_op(
    "attn_native::npu_forward",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _FORWARD(query: Any, key: Any, value: Any, *given: Any) -> Any:  # noqa: N802 - an operator
    return tuple(item.contiguous() for item in _run(query, key, value, _read(*given)))


@_FORWARD.register_fake
def _(query: torch.Tensor, *_: Any) -> Tensors:
    rows = (*query.shape[:-3], query.shape[-2], query.shape[-3]) if query.ndim == 4 else query.shape[:-1]
    largest, total = (query.new_empty((*rows, 8), dtype=torch.float32) for _ in range(2))
    return query.new_empty(query.shape), largest, total


@torch.library.custom_op(
    "attn_native::npu_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor largest, Tensor total, "
    f"{_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _BACKWARD(*given: Any) -> Any:  # noqa: N802 - an operator
    return tuple(item.contiguous() for item in _run_backward(_read(*given[7:]), *given[:7]))


@_BACKWARD.register_fake
def _(_: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any) -> Tensors:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    query, key, value, hidden, cu_seqlens_q, cu_seqlens_k, ctx.scale, ctx.mode = inputs
    ctx.save_for_backward(query, key, value, *output, hidden, cu_seqlens_q, cu_seqlens_k)


def _differentiate(ctx: Any, grad_out: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    dq, dk, dv = _BACKWARD(grad_out, *ctx.saved_tensors, ctx.scale, ctx.mode)
    return dq, dk, dv, *(None,) * 5


_FORWARD.register_autograd(_differentiate, setup_context=_keep)
