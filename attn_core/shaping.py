"""Tensors as kernels want them: scales above 0, head dims of a width, rows that can be read 16 bytes at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from collections.abc import Callable

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_TRACES_STRIDES = torch.__version__ >= "2.8"
"""Whether code that is traced may look at the strides of a gradient; torch 2.6 and 2.7 forbid it in a backward."""


def positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Move a scale of 0 or below into the query: the kernels scale what they have masked with -inf already.

    Example:
        >>> positive_scale(torch.ones(1), -0.5)
        (tensor([-1.]), 0.5)
    """
    return (query * 0.0, 1.0) if scale == 0.0 else (-query, -scale)


def query_sign(scale: float) -> float:
    """The factor that ``positive_scale`` puts on the query, and so on its gradient."""
    return -1.0 if scale < 0.0 else 0.0


def widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Pad the head dim with zeros, which changes no score and adds columns of zeros to the result."""
    missing = width - tensor.shape[3]
    return pad(tensor, (0, missing)) if missing else tensor


def repeated_heads(key: torch.Tensor, heads: int) -> torch.Tensor:
    """Give each query head its own copy of its key head: (B, S, Hkv, D) to (B, S, Hq, D)."""
    groups = heads // key.shape[2]
    return key if groups == 1 else key.repeat_interleave(groups, dim=2)


def summed_heads(grad: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Undo ``repeated_heads`` in the backward: the gradient of a key head is the sum over its query heads."""
    groups = grad.shape[2] // key_heads
    return grad if groups == 1 else grad.unflatten(2, (key_heads, groups)).sum(3)


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Lay the last dimension out densely: the CPU kernel reads it as if it were, and the CUDA ones refuse."""
    if not _TRACES_STRIDES and torch.compiler.is_dynamo_compiling():
        return tensor.contiguous()
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def in_graph(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make an operator of a function of one tensor, which Dynamo puts into its graph unopened.

    Dynamo traces no question for a tensor's offset; what traces the operators of its graph does answer it.
    """
    _LIBRARY.define(f"{function.__name__}(Tensor tensor) -> Tensor")
    _LIBRARY.impl(function.__name__, function, "CompositeImplicitAutograd")
    operator: Callable[[torch.Tensor], torch.Tensor] = getattr(torch.ops.attn_core, function.__name__).default
    return operator


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy what CUDA kernels cannot read 16 bytes at a time; ops do not check, and a misaligned read ends the process."""
    if torch.compiler.is_dynamo_compiling():
        return _aligned_in_graph(tensor)
    batch, rows, heads, last = tensor.stride()
    if last == 1 and not (rows % 8 or heads % 8 or batch % 8 or tensor.storage_offset() % 8):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


_LIBRARY = torch.library.Library("attn_core", "DEF")
_aligned_in_graph = in_graph(aligned)


def infinite_lse(lse: torch.Tensor) -> torch.Tensor:
    """The lse as backward kernels want it: +inf, not -inf, for a query that sees nothing, so that exp gives 0."""
    return lse.nan_to_num(float("nan"), float("inf"), float("inf"))  # one launch


_SPLIT_QUERIES = 64 * 512
"""Up to how many queries, of all sequences and heads, keys may be split: two blocks of 64 to each multiprocessor of a GPU."""


def natural_lse(
    lse: torch.Tensor, out: torch.Tensor, nothing: float = float("inf"), *, all_see: bool = False
) -> torch.Tensor:
    """The lse of a kernel that gives one number to a query that sees nothing (result 0) and to one that met a NaN.

    Args:
        lse: (B, H, S), or (H, N) of a packed call.
        out: the result, (B, S, H, D) or (N, H, D).
        nothing: that number: +inf with FlashAttention-2, -inf with its successors.
        all_see: whether it is known that each query sees a key, so that the number is of NaN alone; takes one launch.

    Returns:
        -inf for a query that sees nothing, NaN for one that met a NaN, and the lse of the others.

    Where there are few blocks of queries, FlashAttention splits the keys, and puts the parts together as if one with a NaN
    in its scores had seen nothing: a finite lse. A NaN in scores is in each column of the result, so the two ends are asked;
    what has NaN in both of them alone, as values may, is taken for it.
    """
    if all_see:
        ends = (float("nan"), float("-inf")) if nothing > 0 else (float("inf"), float("nan"))
        lse = lse.nan_to_num(float("nan"), *ends)
    else:
        first = _column(out, 0)
        lse = torch.where(lse == nothing, first - lse if nothing > 0 else first + lse, lse)
    if lse.numel() > _SPLIT_QUERIES:
        return lse
    return lse.masked_fill(torch.fmax(_column(out, 0), _column(out, -1)).isnan(), float("nan"))


def _column(out: torch.Tensor, at: int) -> torch.Tensor:
    """One column of a result, laid out as its lse."""
    return out.detach()[..., at].transpose(-1, -2)


def needs_graph(*tensors: Any) -> bool:
    """Whether a gradient may be asked of any of these."""
    if not torch.is_grad_enabled():
        return False
    for item in tensors:  # noqa: SIM110 - a generator costs half a microsecond on the way of every call
        if isinstance(item, torch.Tensor) and item.requires_grad:
            return True
    return False
