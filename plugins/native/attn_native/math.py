"""Attention in plain torch operations: any device, any dtype, every option; the fallback and the debugging aid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attn_core.masks import visible_mask
from attn_core.offset import without_offset

if TYPE_CHECKING:
    from attn_core.masks import Description

_HIDES = float("-inf")


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
    dropout_p: float = 0.0,
    deterministic: bool = False,  # noqa: ARG001 - every operation here is
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute attention with the scores written out, in float32 (float64 for float64).

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        scale: of the scores.
        attn_mask: bool or float, 4-D, or described.
        causal: bottom-right.
        window_size: (left, right) in keys, -1 unlimited.
        softcap: c of ``c * tanh(scores / c)``.
        dropout_p: probability to drop.
        deterministic: always so.
        return_lse: also return the log-sum-exp, detached.

    Returns:
        (B, Sq, Hq, Dv) in query's dtype, and the log-sum-exp (B, Hq, Sq) where asked.

    Example:
        >>> import torch
        >>> q = torch.zeros(1, 2, 1, 4)
        >>> v = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
        >>> forward(q, q, v, scale=0.5, causal=True).flatten().tolist()
        [1.0, 2.0]
    """
    attn_mask, offset = without_offset(
        attn_mask, query.shape[1], key.shape[1], causal=causal, window_size=window_size, dtype=query.dtype
    )
    visible, blind = _visible(query, key, attn_mask, causal=causal, window_size=window_size)
    query = _seeing(query, blind)
    scores = _scores(query, key, scale)
    if softcap is not None:
        softcap = _finite_cap(softcap, scores.dtype)
        scores = softcap * torch.tanh(scores / softcap)
    scores = _masked(scores, attn_mask, visible, blind)
    probabilities = torch.softmax(scores, -1)
    if blind is not None:
        probabilities = probabilities.masked_fill(blind, 0.0)
    if dropout_p > 0.0:
        probabilities = torch.nn.functional.dropout(probabilities, dropout_p)
    out = _by_key_head(probabilities, value.shape[2]) @ _heads_first(value)
    out = out.reshape(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2).to(query.dtype)
    if not return_lse:
        return out
    lse = torch.logsumexp(scores.detach(), -1)
    lse = lse if offset is None else lse + offset
    return out, lse if blind is None else lse.masked_fill(blind[..., 0], _HIDES)


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
    deterministic: bool = False,  # noqa: ARG001 - every operation here is
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of query, key and value from the result and its log-sum-exp.

    ``out`` and ``lse`` may be those over more keys than are given here: the gradients are then the share of these keys.
    The recomputation is that of FlashAttention (arXiv:2205.14135, appendix B.4): P = exp(S - lse),
    dS = P * (dO V^T - rowsum(dO * O)).

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
    visible, blind = _visible(query, key, attn_mask, causal=causal, window_size=window_size)
    query = _seeing(query, blind)
    scores = _scores(query, key, scale)
    bent = None
    if softcap is not None:
        softcap = _finite_cap(softcap, scores.dtype)
        bent = torch.tanh(scores / softcap)
        scores = softcap * bent
    scores = _masked(scores, attn_mask, visible, blind)
    probabilities = torch.exp(scores - lse[..., None].to(scores.dtype))
    if blind is not None:
        probabilities = probabilities.masked_fill(blind, 0.0)
    key_heads = key.shape[2]
    grad_rows = _rows(grad_out, key_heads)
    delta = (_heads_first(grad_out) * _heads_first(out)).sum(-1, keepdim=True)
    grad_probabilities = (grad_rows @ _heads_first(value).transpose(-1, -2)).reshape(scores.shape)
    grad_scores = probabilities * (grad_probabilities - delta)
    if bent is not None:
        grad_scores = grad_scores * (1.0 - bent * bent)
    grad_scores = _by_key_head(grad_scores, key_heads) * scale
    grad_query = (grad_scores @ _heads_first(key)).reshape(
        query.shape[0], query.shape[2], query.shape[1], query.shape[3]
    )
    grad_key = grad_scores.transpose(-1, -2) @ _rows(query, key_heads)
    grad_value = _by_key_head(probabilities, key_heads).transpose(-1, -2) @ grad_rows
    return (
        grad_query.transpose(1, 2).to(query.dtype),
        grad_key.transpose(1, 2).to(key.dtype),
        grad_value.transpose(1, 2).to(value.dtype),
    )


def narrowed(
    query_length: int, key_length: int, *, causal: bool, window_size: tuple[int, int] | None
) -> tuple[bool, tuple[int, int] | None]:
    """Leave out of causal and window what hides nothing at these lengths, as causal for a single query.

    >>> narrowed(1, 8, causal=True, window_size=None), narrowed(4, 8, causal=True, window_size=(7, 0))
    ((False, None), (True, None))
    """
    left, right = window_size or (-1, -1)
    if left >= key_length - 1:
        left = -1
    if right >= query_length - 1:
        right = -1
    if query_length == 1:
        causal = False
    if causal and left < 0:
        return True, None
    return causal, None if left < 0 and right < 0 else (left, right)


def blind_queries(visible: torch.Tensor) -> torch.Tensor:
    """Which queries see nothing, (..., Sq or 1, 1), from what each sees."""
    return ~visible.any(-1, keepdim=True)


def _visible(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | Description | None,
    *,
    causal: bool,
    window_size: tuple[int, int] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which keys each query sees (None: all), and which queries see nothing (None: none does)."""
    visible = visible_mask(query, key, attn_mask=attn_mask, causal=causal, window_size=window_size)
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype != torch.bool:
        unhidden = attn_mask.detach() != _HIDES
        visible = unhidden if visible is None else visible & unhidden
    if visible is None or (attn_mask is None and query.shape[1] <= key.shape[1]):
        return visible, None
    return visible, blind_queries(visible)


def _seeing(query: torch.Tensor, blind: torch.Tensor | None) -> torch.Tensor:
    """Without what is in queries that see nothing: a NaN of theirs would be in the gradients of all keys."""
    return query if blind is None else query.masked_fill(blind.transpose(1, 2), 0.0)


def _masked(
    scores: torch.Tensor,
    attn_mask: torch.Tensor | Description | None,
    visible: torch.Tensor | None,
    blind: torch.Tensor | None,
) -> torch.Tensor:
    """Mask the scores; those of a query that sees nothing become 0."""
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    if visible is None:
        return scores
    if blind is None:
        return scores.masked_fill(~visible, _HIDES)
    filling = torch.zeros_like(blind, dtype=scores.dtype).masked_fill(~blind, _HIDES)
    # ~visible is made here: the mask itself may be an inference tensor, which no graph can save
    return torch.where(~visible, filling, scores)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """The scaled scores, (B, Hq, Sq, Skv)."""
    scores = (_rows(query, key.shape[2]) * scale) @ _heads_first(key).transpose(-1, -2)
    return scores.reshape(query.shape[0], query.shape[2], query.shape[1], key.shape[1])


def _finite_cap(softcap: float, dtype: torch.dtype) -> float:
    """A cap that changes no score, in place of one that overflows in ``dtype`` or becomes 0, or would times a gradient."""
    return max(torch.finfo(dtype).tiny, min(softcap, 1e150 if dtype == torch.float64 else 1e30))


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """Bring (B, S, H, D) to (B, H, S, D) in the dtype that is computed in."""
    return tensor.transpose(1, 2).to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _rows(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Bring (B, Sq, Hq, D) to (B, Hkv, Hq / Hkv * Sq, D): the queries that share a key head under one another."""
    return _by_key_head(_heads_first(tensor), key_heads)


def _by_key_head(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Bring (B, Hq, Sq, N) to (B, Hkv, Hq / Hkv * Sq, N)."""
    batch, heads, length, width = tensor.shape
    return tensor.reshape(batch, key_heads, heads // key_heads * length, width)
