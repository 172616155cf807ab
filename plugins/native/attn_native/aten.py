"""One torch kernel each, called through its aten op: flash, memory-efficient, cuDNN. No ``sdpa_kernel`` is entered.

The functions here are what the declarations name. A plain call costs the op and little else; the op's own graph is used
wherever it is right, and where it is not (a merge of two parts) a graph is made from the op's backward.
"""

from __future__ import annotations

from typing import Any

from attn_native import aten_cpu, aten_flash
from attn_native.aten_cudnn import backward as cudnn_backward
from attn_native.aten_cudnn import forward as cudnn_forward
from attn_native.aten_efficient import backward as efficient_backward
from attn_native.aten_efficient import forward as efficient_forward

__all__ = [
    "cudnn_backward",
    "cudnn_forward",
    "efficient_backward",
    "efficient_forward",
    "flash_backward",
    "flash_forward",
]


def flash_forward(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """Attention on torch's flash kernel of the query's device.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        **options: as ``attn_native.aten_cpu.forward`` or ``attn_native.aten_flash.forward`` (CUDA) have them.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 3, 2, 8)
        >>> flash_forward(q, q, q, scale=0.5, causal=True).shape
        torch.Size([1, 3, 2, 8])
    """
    if query.is_cuda:
        return aten_flash.forward(query, key, value, **options)
    return aten_cpu.forward(query, key, value, **options)


def flash_backward(grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, **options: Any) -> Any:
    """Gradients of query, key and value; ``out`` and ``lse`` may be those of a longer key sequence than ``key``'s.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 3, 2, 8)
        >>> out, lse = flash_forward(q, q, q, scale=0.5, return_lse=True)
        >>> [grad.shape for grad in flash_backward(torch.ones_like(out), q, q, q, out, lse, scale=0.5)] == [q.shape] * 3
        True
    """
    if query.is_cuda:
        return aten_flash.backward(grad_out, query, key, value, out, lse, **options)
    return aten_cpu.backward(grad_out, query, key, value, out, lse, **options)
