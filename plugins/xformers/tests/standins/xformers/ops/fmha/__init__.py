"""The functions of ``xformers.ops.fmha`` that the adapter uses."""

from __future__ import annotations

from types import SimpleNamespace

from . import attn_bias
from . import operators as _operators

cutlass = SimpleNamespace(FwOp=_operators.CutlassFw, BwOp=_operators.CutlassBw)
flash = SimpleNamespace(FwOp=_operators.FlashFw, BwOp=_operators.FlashBw)
triton_splitk = SimpleNamespace(FwOp=_operators.SplitK)

__all__ = ["attn_bias", "cutlass", "flash", "triton_splitk"]


def _chosen(op, priority, tensors, bias):
    if op is not None:
        return op
    for candidate in priority:
        try:
            candidate.check(*tensors, bias)
        except ValueError:
            continue
        return candidate
    raise NotImplementedError(f"No operator found for {bias}")


def memory_efficient_attention_forward(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    return memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias, p, scale, op=op)[0]


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    assert p == 0.0
    op = _chosen(op, (_operators.FlashFw, _operators.CutlassFw), (query, key, value), attn_bias)
    return _operators.forward(op, query, key, value, attn_bias, scale)


def memory_efficient_attention_partial(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    return memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias, p, scale, op=op)


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    op = _chosen(op, (_operators.FlashBw, _operators.CutlassBw), (query, key, value), attn_bias)
    return _operators.backward(op, grad, output, lse, query, key, value, attn_bias, scale)
