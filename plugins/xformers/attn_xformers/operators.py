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

_FORWARDS = {"cutlass": fmha.cutlass.FwOp, "flash": fmha.flash.FwOp, "splitk": fmha.triton_splitk.FwOp}
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

    def all_see(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether it is known without reading anything that each query sees a key."""
        if self.bias is not None or self.cu_seqlens_q is not None:
            return False
        return query.shape[1] <= key.shape[1] or not (self.causal or self.left >= 0 or self.right >= 0)


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
    partial = given.which == "splitk" and lse
    inputs = fmha.Inputs(query, key, value, bias, 0.0, given.scale, query.dtype if partial else None, partial)
    operator = _operator(given.which, inputs, lse)
    out, context = operator.apply(inputs, needs_gradient=lse)
    if query.ndim == 5:
        out = out.flatten(2, 3)
    if not lse:
        return out, None
    found = context.lse.flatten(1, 2) if query.ndim == 5 else context.lse
    nothing = float("-inf") if operator is fmha.flash3.FwOp else float("inf")
    found = found[..., : out.shape[1]]  # cutlass rounds its rows up to 32
    return out, natural_lse(found, out, nothing, all_see=given.all_see(query, key))


_FUNCTION = "memory_efficient_attention"
_MOST_KINDS = 1024
_kinds: dict[Any, Any] = {}


def _operator(which: str, inputs: Any, needs_gradient: bool) -> Any:
    """The operator, which xformers chooses or checks once for each kind of call, as what it looks at costs some microseconds.

    It looks at shapes, dtype, device, strides (rows that kernels can read, which they are here; and whether heads of key repeat),
    at the class of a bias and at its strides (which ``bias`` sees to), and at whether FlashAttention-3 may be used.
    """
    query, key = inputs.query, inputs.key
    kind = (
        which, needs_gradient, query.shape, key.shape, inputs.value.shape, key.stride(-2) == 0, query.dtype, query.device,
        type(inputs.attn_bias), fmha._get_use_fa3(),  # noqa: SLF001 - as its functions do
    )  # fmt: skip
    operator = _kinds.get(kind)
    if operator is None:
        if which == "auto":
            operator = fmha._dispatch_fw(inputs, needs_gradient)  # noqa: SLF001
        else:
            operator = _FORWARDS[which]
            fmha._ensure_op_supports_or_raise(ValueError, _FUNCTION, operator, inputs)  # noqa: SLF001
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        _kinds[kind] = operator
    return operator


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
    if not given.all_see(query, key):
        lse = infinite_lse(lse)
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        grad_out, out.contiguous(), lse.contiguous(), query, key, value,
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
