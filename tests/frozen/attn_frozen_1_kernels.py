"""Never edited: see README.md."""

import torch
from attn_core import KeyPadding


def scores_of(query, key, scale, attn_mask, causal, softcap):
    groups = query.shape[2] // key.shape[2]
    scores = torch.einsum("bihd,bjhd->bhij", query, key.repeat_interleave(groups, 2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if isinstance(attn_mask, KeyPadding):
        scores = scores.masked_fill(~attn_mask.keep[:, None, None, :], -torch.inf)
    elif attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    if causal:
        queries, keys = scores.shape[2:]
        seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores


def forward(query, key, value, *, scale, attn_mask=None, causal=False, softcap=None, deterministic=False, return_lse=False):
    scores = scores_of(query, key, scale, attn_mask, causal, softcap)
    lse = scores.logsumexp(-1)
    probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    groups = query.shape[2] // key.shape[2]
    out = torch.einsum("bhij,bjhd->bihd", probabilities, value.repeat_interleave(groups, 2)).contiguous()
    return (out, lse) if return_lse else out


def backward(grad_out, query, key, value, out, lse, *, scale, attn_mask=None, causal=False, deterministic=False):
    groups = query.shape[2] // key.shape[2]
    wide_key, wide_value = (tensor.repeat_interleave(groups, 2) for tensor in (key, value))
    scores = scores_of(query, key, scale, attn_mask, causal, None)
    probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    of_probabilities = torch.einsum("bihd,bjhd->bhij", grad_out, wide_value)
    rows = (grad_out * out).sum(-1).transpose(1, 2)[..., None]
    of_scores = probabilities * (of_probabilities - rows) * scale
    of_query = torch.einsum("bhij,bjhd->bihd", of_scores, wide_key)
    of_key = torch.einsum("bhij,bihd->bjhd", of_scores, query)
    of_value = torch.einsum("bhij,bihd->bjhd", probabilities, grad_out)
    of_key, of_value = (part.unflatten(2, (key.shape[2], groups)).sum(3) for part in (of_key, of_value))
    return of_query, of_key, of_value
