"""Attention written plainly in float64 from the table of meanings: what every backend is measured against.

Slow and memory-hungry on purpose: each line can be checked by eye. It shares no mask logic with ``attn_core.masks``, so
that the two check each other; of a described mask only the data is read.
"""

from __future__ import annotations

from math import sqrt

import torch

from attn_core.masks import Description, KeyPadding, Packed


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | Description | None = None,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64, differentiable in query, key, value and a float mask.

    Args:
        query: (B, Sq, Hq, D), any dtype; converted to float64 first, as are all others.
        key: (B, Skv, Hkv, D), Hq a multiple of Hkv.
        value: (B, Skv, Hkv, Dv).
        attn_mask: as in ``attention``.
        causal: query i sees key j where j <= i + Skv - Sq.
        scale: None is 1/sqrt(D).
        window_size: (left, right) in keys around the same diagonal, -1 unlimited.
        softcap: scores become c * tanh(scores / c).
        dropout_p: with ``kept``: kept probabilities are scaled by 1/(1 - dropout_p).
        kept: bool (B, Hq, Sq, Skv), which probabilities a given draw of dropout kept.

    Returns:
        The result (B, Sq, Hq, Dv) and the natural log-sum-exp of the scaled, capped, masked scores (B, Hq, Sq), detached,
        both float64. A query that sees nothing has result 0, lse -inf and gradients 0.

    Example:
        >>> import torch
        >>> same = torch.ones(1, 2, 1, 4)
        >>> value = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
        >>> reference(same, same, value, causal=True)[0].flatten().tolist()
        [1.0, 2.0]
    """
    probabilities, lse = weights(
        query, key, attn_mask=attn_mask, causal=causal, scale=scale, window_size=window_size, softcap=softcap
    )
    if kept is not None:
        probabilities = probabilities * kept / (1 - dropout_p)
    value = value.double().repeat_interleave(query.shape[2] // value.shape[2], dim=2)
    return torch.einsum("bhij,bjhd->bihd", probabilities, value), lse


def weights(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    attn_mask: torch.Tensor | Description | None = None,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of each value each query takes.

    Args:
        query: as of ``reference``, and so are all others.
        key: (B, Skv, Hkv, D).
        attn_mask: as in ``attention``.
        causal: bottom-right.
        scale: None is 1/sqrt(D).
        window_size: (left, right) in keys.
        softcap: c.

    Returns:
        The probabilities (B, Hq, Sq, Skv) and the lse (B, Hq, Sq), detached, both float64.

    Example:
        >>> import torch
        >>> same = torch.ones(1, 2, 1, 4)
        >>> weights(same, same, causal=True)[0].tolist()
        [[[[1.0, 0.0], [0.5, 0.5]]]]
    """
    query, key = query.double(), key.double()
    queries, keys, head_dim = query.shape[1], key.shape[1], query.shape[3]
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)

    scores = torch.einsum("bihd,bjhd->bhij", query, key) * (1 / sqrt(head_dim) if scale is None else float(scale))
    if softcap is not None:
        scores = float(softcap) * torch.tanh(scores / float(softcap))

    visible = _around_diagonal(queries, keys, causal, window_size).to(query.device).expand(scores.shape)
    common = torch.zeros(*scores.shape[:-1], 1, dtype=scores.dtype, device=scores.device)
    if isinstance(attn_mask, KeyPadding):
        visible = visible & attn_mask.keep[:, None, None, :]
    elif isinstance(attn_mask, Packed):
        visible = _inside_documents(attn_mask, queries, keys, causal, window_size).to(query.device).expand(scores.shape)
    elif isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif isinstance(attn_mask, torch.Tensor):
        visible = visible & (attn_mask != -torch.inf)
        mask = attn_mask.double().expand(scores.shape)
        # what a whole row has in common changes no probability, and as a large number it would swallow the scores
        seen = mask.detach().masked_fill(~visible, -torch.inf)
        common = seen.amax(dim=-1, keepdim=True).nan_to_num(0, 0, 0) if keys else common
        scores = scores + (mask - common)

    sees_nothing = ~visible.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.detach().logsumexp(dim=-1) + common[..., 0]
    # softmax of nothing but -inf is NaN, and so is its gradient: such rows get scores of 0 first and are cleared afterwards.
    probabilities = scores.masked_fill(sees_nothing, 0).softmax(dim=-1).masked_fill(sees_nothing, 0)
    return probabilities, lse


def _around_diagonal(queries: int, keys: int, causal: bool, window_size: tuple[int, int] | None) -> torch.Tensor:
    """Which of ``keys`` each of ``queries`` sees: bool (queries, keys), all True without causal and window."""
    i = torch.arange(queries)[:, None]
    j = torch.arange(keys)[None, :]
    diagonal = i + keys - queries
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        visible = visible & (j <= diagonal)
    if window_size is not None:
        left, right = window_size
        if left != -1:
            visible = visible & (diagonal - j <= left)
        if right != -1:
            visible = visible & (j - diagonal <= right)
    return visible


def _inside_documents(
    packed: Packed, queries: int, keys: int, causal: bool, window_size: tuple[int, int] | None
) -> torch.Tensor:
    """The same where each document is alone with itself."""
    visible = torch.zeros(queries, keys, dtype=torch.bool)
    ends_q, ends_k = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_k.tolist()
    for n in range(len(ends_q) - 1):
        from_q, to_q, from_k, to_k = ends_q[n], ends_q[n + 1], ends_k[n], ends_k[n + 1]
        visible[from_q:to_q, from_k:to_k] = _around_diagonal(to_q - from_q, to_k - from_k, causal, window_size)
    return visible
