"""The backward of native as a function of its own: that of the kernel which SDPA would choose for the forward.

SDPA itself has none that takes the log-sum-exp of more keys than it is given; the operators behind it do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_native import aten, sdpa
from attn_native.math import backward as math_backward
from attn_native.math import narrowed

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from attn_core.masks import Description

    Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    attn_mask: torch.Tensor | Description | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    deterministic: bool = False,  # noqa: ARG001 - declared where it holds of every kernel
) -> Gradients:
    """Compute the gradients of query, key and value; ``out`` and ``lse`` may be those of a longer key sequence than ``key``'s.

    Args:
        grad_out: (B, Sq, Hq, Dv).
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        out: (B, Sq, Hq, Dv).
        lse: (B, Hq, Sq), natural.
        scale: of the scores.
        attn_mask: bool or float, 4-D, or described.
        causal: bottom-right.
        window_size: (left, right) in keys, -1 unlimited.
        deterministic: asked for where the declaration has it.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 3, 2, 8)
        >>> out, lse = sdpa.forward(q, q, q, scale=0.5, return_lse=True)
        >>> [grad.shape for grad in backward(torch.ones_like(out), q, q, q, out, lse, scale=0.5)] == [q.shape] * 3
        True
    """
    causal, window_size = narrowed(query.shape[1], key.shape[1], causal=causal, window_size=window_size)
    mask = None
    if attn_mask is not None or window_size is not None:
        mask = sdpa.written_out(query, key, attn_mask, causal=causal, window_size=window_size)
        causal = False
    compute = aten.flash_backward if query.is_cpu else _elsewhere(query, key, value, mask, causal=causal, scale=scale)
    options: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
    if causal:
        options["causal"] = True
    found: Gradients = compute(grad_out, query, key, value, out, lse, scale=scale, **options)
    return found


def _elsewhere(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
) -> Callable[..., Any]:
    """Which kernel's: cuDNN's operator takes no mask, for which SDPA writes a bias out."""
    heads = query.shape[2]
    q, k, v = (
        tensor.transpose(1, 2)
        if tensor.shape[2] == heads
        else tensor[:, :, :1].expand(-1, -1, heads, -1).transpose(1, 2)
        for tensor in (query, key, value)
    )
    choice = sdpa.choice_of(q, k, v, mask, causal=causal, scale=abs(scale) or 1.0, dropout_p=0.0)
    if choice == sdpa.FLASH and mask is None:
        return aten.flash_backward
    if choice == sdpa.CUDNN and mask is None:
        return aten.cudnn_backward
    return aten.efficient_backward if choice in (sdpa.FLASH, sdpa.EFFICIENT, sdpa.CUDNN) else math_backward
