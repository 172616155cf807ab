"""What attn calls: its options turned into a call of ``attn_example.chunked``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attn_example import chunked, traced
from attn_example.chunked import Call
from attn_example.sight import Sight

if TYPE_CHECKING:
    from attn_core.masks import Description


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: torch.Tensor | Description | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    deterministic: bool = False,  # noqa: ARG001 - every operation is
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute attention in float32 (float64 for float64).

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        scale: of the scores.
        attn_mask: bool or float, 4-D, or described.
        causal: bottom-right.
        window_size: (left, right) in keys, -1 unlimited.
        softcap: c of ``c * tanh(scores / c)``.
        deterministic: always so.
        return_lse: also return the log-sum-exp.

    Returns:
        (B, Sq, Hq, Dv) in query's dtype, and the log-sum-exp (B, Hq, Sq) where asked.

    Example:
        >>> import torch
        >>> q = torch.zeros(1, 2, 1, 4)
        >>> v = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
        >>> forward(q, q, v, scale=0.5, causal=True).flatten().tolist()
        [1.0, 2.0]
    """
    sight = Sight.of(query, key, attn_mask, causal=causal, window_size=window_size)
    attend = traced.attend if torch.compiler.is_compiling() else chunked.attend
    out, lse = attend(Call(query, key, value, scale, softcap, sight))
    return (out, lse) if return_lse else out


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
    softcap: float | None = None,
    deterministic: bool = False,  # noqa: ARG001 - every operation is
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of query, key and value from the result and its log-sum-exp.

    ``out`` and ``lse`` may be those over more keys than are given here: the gradients are then the share of these keys.

    Args:
        grad_out: gradient of the result, (B, Sq, Hq, Dv).
        query: as in ``forward``, and so are key, value and the options.
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        out: the result, (B, Sq, Hq, Dv).
        lse: its log-sum-exp, (B, Hq, Sq).
        scale: of the scores.
        attn_mask: bool or float, 4-D, or described.
        causal: bottom-right.
        window_size: (left, right) in keys, -1 unlimited.
        softcap: c of ``c * tanh(scores / c)``.
        deterministic: always so.

    Returns:
        Gradients of query, key and value, each in the shape and dtype of its tensor.
    """
    sight = Sight.of(query, key, attn_mask, causal=causal, window_size=window_size)
    gradients = traced.gradients if torch.compiler.is_compiling() else chunked.gradients
    return gradients(Call(query, key, value, scale, softcap, sight), grad_out, out, lse)
