"""The functions of ``xformers.ops.fmha`` that the adapter uses."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from . import attn_bias
from . import operators as _operators

cutlass = SimpleNamespace(FwOp=_operators.CutlassFw, BwOp=_operators.CutlassBw)
flash = SimpleNamespace(FwOp=_operators.FlashFw, BwOp=_operators.FlashBw)
flash3 = SimpleNamespace(FwOp=SimpleNamespace(is_available=lambda: False))
triton_splitk = SimpleNamespace(FwOp=_operators.SplitK)

__all__ = ["Inputs", "attn_bias", "cutlass", "flash", "flash3", "triton_splitk"]


@dataclass
class Inputs:
    """One call, as operators take it."""

    query: Any
    key: Any
    value: Any
    attn_bias: Any = None
    p: float = 0.0
    scale: float | None = None
    output_dtype: Any = None
    is_partial: bool = False


def _get_use_fa3():
    return True


def _chosen(priority, tensors, bias):
    for candidate in priority:
        try:
            candidate.check(*tensors, bias)
        except ValueError:
            continue
        return candidate
    raise NotImplementedError(f"No operator found for {bias}")


def _dispatch_fw(inp, needs_gradient):
    priority = (_operators.FlashFw, _operators.CutlassFw)
    return _chosen(priority, (inp.query, inp.key, inp.value), inp.attn_bias)


def _ensure_op_supports_or_raise(exc_type, name, op, inp):
    try:
        op.check(inp.query, inp.key, inp.value, inp.attn_bias)
    except ValueError as error:
        raise exc_type(f"Operator `{name}` does not support inputs: {error}") from error


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    assert p == 0.0
    op = op or _chosen((_operators.FlashBw, _operators.CutlassBw), (query, key, value), attn_bias)
    return _operators.backward(op, grad, output, lse, query, key, value, attn_bias, scale)
