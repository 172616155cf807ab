"""Masks as the ops take them, and which queries they leave without a key."""

from __future__ import annotations

import torch

from attn_core.masks import KeyPadding

Mask = torch.Tensor | KeyPadding | None


def additive(attn_mask: Mask, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask as a 4-D tensor to add to the scores: 0 where a bool or described mask is visible, -inf where it is not.

    No dimension is expanded: key padding stays (B, 1, 1, Skv). A float mask is never made less precise.

    Example:
        >>> additive(torch.tensor([[[[True, False]]]]), torch.float32)
        tensor([[[[0., -inf]]]])
    """
    if attn_mask is None:
        return None
    if isinstance(attn_mask, KeyPadding):
        padding = attn_mask
        return padding.prepared(("additive", dtype), lambda: _hidden(padding.keep[:, None, None, :], dtype))
    if attn_mask.dtype == torch.bool:
        return _hidden(attn_mask, dtype)
    return attn_mask if attn_mask.dtype in (dtype, torch.float32) and dtype != torch.float64 else attn_mask.to(dtype)


def _hidden(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))


def hide_blind(lse: torch.Tensor, attn_mask: Mask, *, keys: int, causal: bool) -> torch.Tensor:
    """Put -inf where a query sees nothing: with a mask, the kernels report an lse of 0 there.

    Args:
        lse: (B, H, Sq), Sq up to ``keys`` where ``causal``.
        attn_mask: the mask of the call.
        keys: how many keys there are.
        causal: whether query i sees keys up to ``i + keys - Sq`` only.
    """
    sees = seeing(attn_mask, lse.shape[2], keys, causal=causal, device=lse.device) if attn_mask is not None else None
    return lse if sees is None else lse.masked_fill(~sees, float("-inf"))


def seeing(attn_mask: Mask, queries: int, keys: int, *, causal: bool, device: torch.device) -> torch.Tensor | None:
    """Which queries see any key, broadcastable to (B, H, Sq); None where all do.

    Example:
        >>> seeing(torch.tensor([[[[True, False], [False, False]]]]), 2, 2, causal=False, device=torch.device("cpu"))
        tensor([[[ True, False]]])
    """
    if attn_mask is None:
        return torch.arange(keys - queries, keys, device=device) >= 0 if causal and queries > keys else None
    if isinstance(attn_mask, KeyPadding):
        visible = attn_mask.keep[:, None, None, :]
    else:
        visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask != float("-inf")
    sees = visible.any(-1)
    if not causal:
        return sees
    first = visible.to(torch.uint8).argmax(-1)
    return sees & (first <= torch.arange(keys - queries, keys, device=device))


def rows(attn_mask: Mask, start: int) -> Mask:
    """The mask of the queries from ``start`` on."""
    if isinstance(attn_mask, torch.Tensor) and attn_mask.shape[2] > 1:
        return attn_mask[:, :, start:]
    return attn_mask


def columns(attn_mask: torch.Tensor | None, start: int, end: int | None) -> torch.Tensor | None:
    """The mask of the keys from ``start`` to before ``end``."""
    if attn_mask is None or attn_mask.shape[3] == 1:
        return attn_mask
    return attn_mask[..., start:end]
