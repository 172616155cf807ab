"""The same two computations as operators of torch, for traced code.

torch.compile would unroll every tile into one graph, which takes minutes for a few dozen of them. An operator stands in its
graph as a single node, whatever the lengths. Code that is not traced has no need of the detour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_example import chunked
from attn_example.chunked import Call
from attn_example.sight import Sight

if TYPE_CHECKING:
    from collections.abc import Callable

_CALL = (
    "Tensor query, Tensor key, Tensor value, float scale, float? softcap, SymInt left, SymInt right, bool sequences, "
    "Tensor? first, Tensor? last, Tensor? keep, Tensor? mask"
)


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``chunked.attend``."""
    out, lse = _attend(*_flat(call))
    return out, lse


def gradients(
    call: Call, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``chunked.gradients``."""
    grad_query, grad_key, grad_value = _gradients(grad_out, out, lse, *_flat(call))
    return grad_query, grad_key, grad_value


def _flat(call: Call) -> tuple[Any, ...]:
    """A call as arguments of an operator, which takes tensors and numbers only."""
    left, right, ends, *tensors = call.sight
    *given, _ = call  # not a slice, which torch 2.6 does not trace of a named tuple
    return (*given, left, right, ends is None, *tensors)


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None,
    left: int,
    right: int,
    sequences: bool,
    *tensors: torch.Tensor | None,
) -> Call:
    """The call again. Where several sequences end is not read from the device."""
    ends = None if sequences else ([query.shape[1]], [key.shape[1]])
    return Call(query, key, value, scale, softcap, Sight(left, right, ends, *tensors))


def _operator(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        # compiled code may run inside an autocast that was not open where it was traced
        with torch.autocast(arguments[0].device.type, enabled=False):
            return function(*arguments)

    operator = torch.library.custom_op(f"attn_example::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def _run_attend(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return chunked.attend(_call(*arguments))


def _run_gradients(
    grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return chunked.gradients(_call(*arguments), grad_out, out, lse)


def _fake_attend(
    query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _dim = query.shape
    lse = query.new_empty(batch, heads, length, dtype=chunked.computed_in(query))
    return query.new_empty(batch, length, heads, value.shape[3]), lse


def _fake_gradients(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in arguments[3:6])


_attend = _operator("attend", f"({_CALL}) -> (Tensor, Tensor)", _run_attend, _fake_attend)
_gradients = _operator(
    "gradients",
    f"(Tensor grad_out, Tensor out, Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor)",
    _run_gradients,
    _fake_gradients,
)
