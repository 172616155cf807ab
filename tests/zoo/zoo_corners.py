"""Kernels that lie where few people look: usual masks in unusual forms, wide models, compiled code. As in ``zoo_kernels``."""

from __future__ import annotations

import torch
from zoo_kernels import honest, lie

from attn_core import KeyPadding, Packed
from attn_core.masks import visible_mask

# --- masks ----------------------------------------------------------------------------------------------------------------


@lie("masks[bool]")
def padding_written_out_read_as_lengths(query, key, value, *, attn_mask=None, **options):
    written_out = isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool
    if written_out and attn_mask.shape[1:3] == (1, 1) and query.shape[1] > 1 < query.shape[0] == attn_mask.shape[0]:
        lengths = attn_mask.sum(-1, keepdim=True)
        attn_mask = torch.arange(key.shape[1], device=key.device) < lengths
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[bool]")
def mask_for_the_whole_batch_read_for_one_head(query, key, value, *, attn_mask=None, **options):
    written_out = isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool
    if written_out and attn_mask.shape[0] == 1 < query.shape[0] and attn_mask.shape[1] > 1 < attn_mask.shape[2]:
        attn_mask = attn_mask[:, :1]
    return honest(query, key, value, attn_mask=attn_mask, **options)


def _prepared(kind, query, key, attn_mask, causal, window_size):
    """The dense form, kept with the description under a name that does not tell the diagonal."""
    if not isinstance(attn_mask, kind):
        return {"attn_mask": attn_mask, "causal": causal, "window_size": window_size}

    def dense():
        return visible_mask(query, key, attn_mask=attn_mask, causal=causal, window_size=window_size)

    return {"attn_mask": attn_mask.prepared(("zoo", query.shape[1]), dense)}


@lie("copied-masks")
def padding_prepared_for_the_first_diagonal(
    query, key, value, *, attn_mask=None, causal=False, window_size=None, **options
):
    sight = _prepared(KeyPadding, query, key, attn_mask, causal, window_size)
    return honest(query, key, value, **sight, **options)


@lie("copied-masks")
def packed_prepared_for_the_first_diagonal(
    query, key, value, *, attn_mask=None, causal=False, window_size=None, **options
):
    sight = _prepared(Packed, query, key, attn_mask, causal, window_size)
    return honest(query, key, value, **sight, **options)
