"""Masks as the ops take them, and which queries they leave without a key."""

from __future__ import annotations

import torch

from attn_core.masks import KeyPadding

Mask = torch.Tensor | KeyPadding | None

_FAR = -1e38


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


def brought_near(attn_mask: Mask, queries: int, keys: int, *, causal: bool = False) -> tuple[Mask, torch.Tensor | None]:
    """Bring rows of a float mask whose largest number is below -1e38 up to it, which changes no result.

    Masks hide by the smallest finite number, and where they hide a whole row that hides nothing: its keys are alike. CUDA's
    memory-efficient kernel multiplies by log2(e), which such numbers do not survive, and answers 0.

    Args:
        attn_mask: of a call, 4-D.
        queries: Sq.
        keys: Skv.
        causal: whether query i sees keys up to ``i + keys - queries`` only.

    Returns:
        The mask, and what is to be added to the lse, broadcastable to (B, H, Sq); None where nothing is.

    Example:
        >>> brought_near(torch.tensor([[[[-3e38, -3e38], [0.0, -3e38]]]]), 2, 2)
        (tensor([[[[-1.0000e+38, -1.0000e+38],
                  [ 0.0000e+00, -3.0000e+38]]]]), tensor([[[-2.0000e+38,  0.0000e+00]]]))
    """
    if not isinstance(attn_mask, torch.Tensor) or attn_mask.dtype not in (torch.float32, torch.bfloat16):
        return attn_mask, None
    largest = attn_mask.detach()
    if causal and largest.shape[3] > 1:
        last = torch.arange(keys - queries, keys, device=largest.device).clamp(min=0)
        largest = largest.cummax(-1).values.expand(-1, -1, queries, -1)
        largest = largest.gather(-1, last[:, None].expand(*largest.shape[:2], -1, -1))
    else:
        largest = largest.amax(-1, keepdim=True)
    far = (largest - _FAR).clamp(max=0.0).masked_fill(largest == float("-inf"), 0.0)
    return attn_mask - far, far[..., 0]


def hide_blind(lse: torch.Tensor, attn_mask: Mask, *, keys: int, causal: bool) -> torch.Tensor:
    """Put -inf where a query sees nothing: with a mask, the kernels report an lse of 0 there.

    Args:
        lse: (B, H, Sq), Sq up to ``keys`` where ``causal``.
        attn_mask: the mask of the call.
        keys: how many keys there are.
        causal: whether query i sees keys up to ``i + keys - Sq`` only.
    """
    if attn_mask is None:
        return lse
    if isinstance(attn_mask, KeyPadding):
        visible = attn_mask.keep[:, None, None, :]
    else:
        visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask != float("-inf")
    sees = visible.any(-1)
    if causal:
        first = visible.to(torch.uint8).argmax(-1)
        queries = lse.shape[2]
        sees = sees & (first <= torch.arange(keys - queries, keys, device=lse.device))
    return lse.masked_fill(~sees, float("-inf"))


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
