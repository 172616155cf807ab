"""A backend of ``torch.compile`` that runs operator by operator, and holds each to what was planned of it.

A compiler plans with shapes and strides that fake tensors have, and code that it makes reads what an operator returns by
them, so that an operator whose fake has other strides than it returns gives wrong numbers, and none in eager code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from functorch.compile import (  # type: ignore[import-untyped]
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch._dynamo.backends.common import aot_autograd

from attn_core.testing.comparing import expect

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Run(torch.fx.Interpreter):
    """Runs a graph, and looks at what each operator returns."""

    def run_node(self, node: torch.fx.Node) -> Any:
        found = super().run_node(node)
        if isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001 (no public name)
            for planned, made in zip(_tensors(node.meta.get("val")), _tensors(found), strict=False):
                _hold(str(node.target), planned, made)
        return found


def _tensors(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _hold(operator: str, planned: Any, made: Any) -> None:
    if not (isinstance(planned, torch.Tensor) and isinstance(made, torch.Tensor)):
        return
    plan, real = kind(planned, made), kind(made, made)
    expect(f"{operator} is planned to return {plan}, and returns {real}", holds=plan == real)


def kind(tensor: torch.Tensor, like: torch.Tensor) -> str:
    """Shape, strides, dtype and device, as text; a length that is planned for any number is that of ``like``.

    The stride of a dimension of one element, or of an empty tensor, is never used, and a tensor of one number may be on a CPU
    wherever it is used: torch plans the seeds of its own kernels elsewhere than they come.
    """
    sizes = [_number(size, own) for size, own in zip(tensor.shape, like.shape, strict=False)]
    strides = [_number(stride, own) for stride, own in zip(tensor.stride(), like.stride(), strict=False)]
    used = [stride for size, stride in zip(sizes, strides, strict=True) if size > 1 and all(sizes)]
    place = f", {tensor.device}" if tensor.ndim else ""
    return f"{sizes} with strides {used}, {tensor.dtype}{place}"


def _number(planned: Any, real: int) -> int:
    return planned if type(planned) is int else real


def _compiled(graph: torch.fx.GraphModule, _: Any) -> Any:
    run = _Run(graph)
    run.extra_traceback = False  # of what is said here, not where the graph comes from
    return make_boxed_func(run.run)


held_to_plan = aot_autograd(
    fw_compiler=_compiled, bw_compiler=_compiled, partition_fn=min_cut_rematerialization_partition
)
"""To be given to ``torch.compile`` as its backend."""
