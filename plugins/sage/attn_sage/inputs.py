"""What every kernel of sageattention needs done around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from attn_core.errors import CallRefused

GRID = 65_535
"""The largest second and third dimension of a CUDA grid; batch and heads go there."""
OFFSETS = 2**31
"""The kernels count the numbers of a tensor in 32 bits."""
_KINDS_KEPT = 4096

_ran: set[Any] = set()


def traced(*tensors: torch.Tensor) -> bool:
    """Whether these are traced (torch.compile, export, fake tensors): an operator stands for the kernel then."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0  # noqa: SLF001 (no public name)
        or any(type(tensor) is not torch.Tensor for tensor in tensors)
    )


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one, on which Triton launches, and put back the one that was.

    sageattention 2 changes the current device of the process by itself; this undoes it.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_sizes(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse what the kernels can't count: they do not check, and would read from the wrong place.

    Raises:
        CallRefused: too many sequences or heads for a grid, or too many numbers for 32 bits.
    """
    batch, _, heads, head_dim = query.shape
    rows = max(batch * heads if head_dim == 96 else batch, heads)  # one kernel has both in one dimension of its grid
    if rows > GRID:
        msg = f"{name}: found a batch of {batch} with {heads} heads; accepted: up to {GRID} of each. Next: split the batch"
        raise CallRefused(msg)
    for label, tensor in (("query", query), ("key", key), ("value", value)):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if max(last, tensor.numel()) >= OFFSETS:
            msg = f"{name}: {label} spans {last + 1} numbers; accepted: up to {OFFSETS}. Next: split the batch or the heads"
            raise CallRefused(msg)


def smooth(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The key less its mean over the sequence, a copy, and that mean (B, 1, Hkv, D).

    The kernels turn NaN into 0 when they quantise, and so hide it. An infinity in the first key makes the scale of its
    block infinite, and every score in it NaN; each query sees that block. So it stands for whatever is not finite in the
    queries and keys of a head.
    """
    mean = key.mean(1, keepdim=True)
    smoothed = key - mean
    groups = query.shape[2] // key.shape[2]
    of_query = query.sum((1, 3), dtype=torch.float32).unflatten(1, (key.shape[2], groups)).sum(-1)
    finite = (of_query + mean.sum((1, 3), dtype=torch.float32)).isfinite()
    smoothed[:, 0, :, 0] = torch.where(finite, smoothed[:, 0, :, 0], float("inf"))
    return smoothed, mean


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Lay the last dimension out densely, as the kernels insist on."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def refuse_cold_capture(name: str, *kind: Any) -> Any:
    """What is to be handed to ``warm`` after the call.

    Raises:
        CallRefused: a CUDA graph is being captured, and a call of this kind would have to compile its kernel in it.
    """
    shown = tuple(
        (item.shape, item.stride(), item.dtype, item.device, item.storage_offset() % 8)
        if isinstance(item, torch.Tensor)
        else item
        for item in kind
    )
    if shown not in _ran and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        msg = (
            f"{name}: a CUDA graph is being captured, and the kernel for a call of these shapes is not compiled yet. "
            "Next: make the same call once before the capture"
        )
        raise CallRefused(msg)
    return shown


def warm(kind: Any) -> None:
    """Remember that a call of a kind has run, so that its kernel is compiled."""
    if len(_ran) >= _KINDS_KEPT:
        _ran.clear()
    _ran.add(kind)
