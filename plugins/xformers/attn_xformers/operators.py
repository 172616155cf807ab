"""One call of xformers, dense or packed, forward or backward; and operators that stand for them in traced code.

Written against xformers 0.0.35. Its functions dispatch in Python and can't be traced as they are. All tensors have as many
heads of key as of query, or (forward alone) key heads that are expanded in a fifth dimension, as it wants grouped queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from xformers.ops import fmha

from attn_core.shaping import infinite_lse, natural_lse, repeated_heads, summed_heads
from attn_xformers.bias import diagonal_bias, packed_bias

_FORWARDS = {"auto": None, "cutlass": fmha.cutlass.FwOp, "flash": fmha.flash.FwOp, "splitk": fmha.triton_splitk.FwOp}
_BACKWARDS = {"auto": None, "cutlass": fmha.cutlass.BwOp, "flash": fmha.flash.BwOp}
HAS_FLASH_3: bool = fmha.flash3.FwOp.is_available()
"""Whether xformers finds FlashAttention-3, which it prefers then."""


class Given(NamedTuple):
    """Everything of a call but its tensors of numbers."""

    which: str
    bias: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    causal: bool
    left: int
    right: int


def run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, given: Given, *, lse: bool
) -> tuple[torch.Tensor, Any]:
    """Result and lse (None where not asked), both as the operator leaves them where a query sees nothing.

    Args:
        query: (B, Sq, Hq, D), with a batch of one in a packed call.
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        given: the call.
        lse: whether the lse is asked for.
    """
    heads, key_heads = query.shape[2], key.shape[2]
    bias = _bias(query, key, given)
    if heads != key_heads:
        if (
            given.which == "cutlass" or given.bias is not None
        ):  # of five dimensions it would make a stream for each group
            key, value = repeated_heads(key, heads), repeated_heads(value, heads)
        else:
            groups = heads // key_heads
            query = query.unflatten(2, (key_heads, groups))
            key, value = (item.unsqueeze(3).expand(-1, -1, -1, groups, -1) for item in (key, value))
    operator = _FORWARDS[given.which]
    options: dict[str, Any] = {"attn_bias": bias, "scale": given.scale, "op": operator}
    if not lse:
        out, found = fmha.memory_efficient_attention_forward(query, key, value, **options), None
    elif given.which == "splitk":
        out, found = fmha.memory_efficient_attention_partial(query, key, value, output_dtype=query.dtype, **options)
    else:
        out, found = fmha.memory_efficient_attention_forward_requires_grad(query, key, value, **options)
    if query.ndim == 5:
        out, found = out.flatten(2, 3), None if found is None else found.flatten(1, 2)
    if found is not None:
        found = natural_lse(found[..., : out.shape[1]], out)  # cutlass rounds its rows up to 32
    return out, found


def run_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    given: Given,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value."""
    key_heads = key.shape[2]
    key, value = repeated_heads(key, query.shape[2]), repeated_heads(value, query.shape[2])
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        grad_out, out.contiguous(), infinite_lse(lse).contiguous(), query, key, value,
        attn_bias=_bias(query, key, given), scale=given.scale, op=_BACKWARDS[given.which],
    )  # fmt: skip
    return dq, summed_heads(dk, key_heads), summed_heads(dv, key_heads)


def _bias(query: torch.Tensor, key: torch.Tensor, given: Given) -> Any:
    if given.bias is not None:
        return given.bias
    if given.cu_seqlens_q is None or given.cu_seqlens_k is None:
        if not given.causal and given.left < 0 and given.right < 0:
            return None
        return diagonal_bias(query.shape[1], key.shape[1], given.left, given.right, given.causal)
    starts = given.cu_seqlens_q, given.cu_seqlens_k
    return packed_bias(*starts, given.max_seqlen_q, given.max_seqlen_k, given.left, given.causal)


# --- operators for traced code ------------------------------------------------------------------------------------------

_GIVEN = (
    "str which, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float scale, bool causal, SymInt left, SymInt right"
)


@torch.library.custom_op(
    "attn_xformers::forward",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_GIVEN}) -> (Tensor, Tensor)",
)
def traced_run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *given: Any) -> Any:
    """``run`` with the lse, in traced code."""
    out, lse = run(query, key, value, Given(*given), lse=True)
    return out.contiguous(), lse.contiguous()


@traced_run.register_fake
def _(query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *__: Any) -> Any:
    batch, queries, heads, _dim = query.shape
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    return query.new_empty((batch, queries, heads, value.shape[3])), lse


@torch.library.custom_op(
    "attn_xformers::backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_GIVEN}) "
    "-> (Tensor, Tensor, Tensor)",
)
def traced_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, *given: Any,
) -> Any:  # fmt: skip
    """``run_backward`` in traced code."""
    grads = run_backward(grad_out, query, key, value, out, lse, Given(*given))
    return tuple(grad.contiguous() for grad in grads)


@traced_backward.register_fake
def _(_: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any) -> Any:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
