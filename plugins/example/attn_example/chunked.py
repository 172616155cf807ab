"""Attention chunk by chunk: never more than a tile of the scores at a time, forward and backward.

The online softmax is that of Milakov & Gimelshein (arXiv:1805.02867), its use for attention in little memory that of
Rabe & Staats (arXiv:2112.05682), and the backward from the log-sum-exp that of FlashAttention (arXiv:2205.14135,
appendix B.4): P = exp(S - lse), dS = P * (dO V^T - rowsum(dO * O)).

In the letters of the products, b is the batch, q and k are queries and keys of a tile, h is the key head, g the query head
within the group that shares it, d and e are the head dims of key and value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from attn_example.sight import Sight

QUERIES = 512
"""Queries of a tile. The largest thing that is made beside results is a tile of each head."""

KEYS = 512
"""Keys of a tile."""

_HIDDEN = float("-inf")


class Call(NamedTuple):
    """What is computed, of which the parts need to know this much."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    softcap: float | None
    sight: Sight

    def rows(self, tensor: torch.Tensor, queries: slice) -> torch.Tensor:
        """Bring a chunk of (B, Sq, Hq, N) to (B, q, Hkv, g, N), in the dtype that is computed in."""
        heads, key_heads = tensor.shape[2], self.key.shape[2]
        rows: torch.Tensor = _wide(tensor[:, queries]).unflatten(2, (key_heads, heads // key_heads))
        return rows

    def keys(self, queries: slice) -> list[slice]:
        """The chunks of keys that a chunk of queries may see."""
        return _chunks(*self.sight.reach(queries, self.key.shape[1]), KEYS)


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result (B, Sq, Hq, Dv) in query's dtype, and the log-sum-exp (B, Hq, Sq)."""
    query = call.query
    out = query.new_empty(*query.shape[:3], call.value.shape[3])
    lse = query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=computed_in(query))
    for queries in _chunks(0, query.shape[1], QUERIES):
        result, result_lse = _attend_rows(call, queries)
        out[:, queries] = result.flatten(2, 3)
        lse[:, :, queries] = result_lse.flatten(1, 2)
    return out, lse


def gradients(
    call: Call, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. ``out`` and ``lse`` may be those over more keys than the call has."""
    query, key, value = call.query, call.key, call.value
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = (query.new_zeros(tensor.shape, dtype=computed_in(query)) for tensor in (key, value))
    for queries in _chunks(0, query.shape[1], QUERIES):
        rows, grad_rows = call.rows(query, queries), call.rows(grad_out, queries)
        delta = torch.einsum("bqhge,bqhge->bhgq", grad_rows, call.rows(out, queries))[..., None]
        rows_lse = lse[:, :, queries].unflatten(1, delta.shape[1:3])[..., None].to(delta.dtype)
        grad_of_rows = torch.zeros_like(rows)
        for keys in call.keys(queries):
            scores, visible, slope = _tile(call, rows, queries, keys)
            weights = torch.exp(scores - rows_lse)
            if visible is not None:  # where a query sees nothing, -inf was taken from -inf
                weights = weights.masked_fill(~visible, 0.0)
            grad_scores = weights * (torch.einsum("bqhge,bkhe->bhgqk", grad_rows, _wide(value[:, keys])) - delta)
            if slope is not None:
                grad_scores = grad_scores * slope
            grad_of_rows += torch.einsum("bhgqk,bkhd->bqhgd", grad_scores, _wide(key[:, keys]))
            grad_key[:, keys] += torch.einsum("bhgqk,bqhgd->bkhd", grad_scores, rows)
            grad_value[:, keys] += torch.einsum("bhgqk,bqhge->bkhe", weights, grad_rows)
        grad_query[:, queries] = (grad_of_rows * call.scale).flatten(2, 3)
    return grad_query, (grad_key * call.scale).to(key.dtype), grad_value.to(value.dtype)


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    """float64 for itself, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _attend_rows(call: Call, queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of a chunk of queries, (B, q, Hkv, g, Dv), and its log-sum-exp, (B, Hkv, g, q)."""
    rows = call.rows(call.query, queries)
    batch, length, *heads, _ = rows.shape
    best = rows.new_full((batch, *heads, length, 1), _HIDDEN)
    total = torch.zeros_like(best)
    sees = torch.zeros_like(best, dtype=torch.bool)
    result = rows.new_zeros(batch, *heads, length, call.value.shape[3])
    for keys in call.keys(queries):
        scores, visible, _ = _tile(call, rows, queries, keys)
        best, before = torch.maximum(best, scores.amax(-1, keepdim=True)), best
        weights, shrink = torch.exp(scores - _finite(best)), torch.exp(before - _finite(best))
        total = total * shrink + weights.sum(-1, keepdim=True)
        result = result * shrink + torch.einsum("bhgqk,bkhe->bhgqe", weights, _wide(call.value[:, keys]))
        sees |= True if visible is None else visible.any(-1, keepdim=True)
    result = (result / total).masked_fill(~sees, 0.0)
    return result.permute(0, 3, 1, 2, 4), (_finite(best) + torch.log(total)).squeeze(-1)


def _tile(
    call: Call, rows: torch.Tensor, queries: slice, keys: slice
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The masked scores, which are visible (None: all), and what the softcap leaves of their gradients (None: all)."""
    scores = torch.einsum("bqhgd,bkhd->bhgqk", rows * call.scale, _wide(call.key[:, keys]))
    slope = None
    if call.softcap is not None:
        softcap = max(call.softcap, torch.finfo(scores.dtype).tiny)  # less would be 0, and 0 / 0
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1.0 - bent * bent
    added, visible = call.sight.tile(scores, queries, keys)
    if added is not None:
        scores = scores + added
    if visible is not None:
        scores = scores.masked_fill(~visible, _HIDDEN)
    return scores, visible, slope


def _finite(best: torch.Tensor) -> torch.Tensor:
    """What to take from scores before the exponential: to take infinity from itself would make a NaN of it."""
    return best.masked_fill(best.isinf(), 0.0)


def _chunks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(computed_in(tensor))
