"""Float masks without what all keys of a row have in common, for what computes in float32.

Masks hide by large negative numbers, -1e9 or the smallest that there is. Where every key that a query sees has one, it hides
nothing; but a log-sum-exp of -1e9 has lost the scores and how many keys there are, and with it go merges of partial results
and each backward that recomputes ``P = exp(scores - lse)``. Taking a number from a whole row changes no probability.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_core.masks import diagonal_mask

_NEAR = 32.0  # up to here a log-sum-exp in float32 keeps its scores to six digits
_NEAR_IN_HALF = (
    256.0  # from here on a difference that half precision can't have exactly is of a key that weighs nothing
)

_TAKEN = "attn_offset_taken"
"""Attribute of a mask that was returned here, which the core may give to an adapter that asks for the same."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # of others, as fake ones, nobody knows
_is_traced = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_are_transformed = torch._C._are_functorch_transforms_active


def without_offset(
    attn_mask: Any,
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, torch.Tensor | None]:
    """Take the largest number among the keys that a query sees from its row of a float mask, where it is far from 0.

    Rows that are hidden altogether, and those with NaN or +inf, stay as they are. Gradients of the mask pass. On CPU a mask of
    which no row is far is returned itself; elsewhere, and in traced code, nobody asks, and it is copied.

    Args:
        attn_mask: of a call; whatever is no float tensor is returned as it is.
        queries: Sq.
        keys: Skv.
        causal: whether keys behind the bottom-right diagonal are not seen.
        window_size: (left, right) around it, -1 unlimited.
        dtype: of the query; for float64 nothing is rounded to float32.

    Returns:
        The mask, and what is to be added to the log-sum-exp, broadcastable to (B, H, Sq); None where nothing is.

    Example:
        >>> without_offset(torch.tensor([[[[-1e9, -1e9], [0.0, -1e9]]]]), 2, 2)
        (tensor([[[[ 0.0000e+00,  0.0000e+00],
                  [ 0.0000e+00, -1.0000e+09]]]]), tensor([[[-1.0000e+09,  0.0000e+00]]]))
    """
    if not isinstance(attn_mask, torch.Tensor) or not attn_mask.is_floating_point():
        return attn_mask, None
    if getattr(attn_mask, _TAKEN, False):
        return attn_mask, None
    known = attn_mask.detach()
    bounded = causal or window_size is not None
    if bounded and asks(known) and _near_on_diagonal(known, queries, keys):
        return attn_mask, None
    offset = offset_of(largest(known, queries, keys, causal=causal, window_size=window_size))
    if offset is None:
        return attn_mask, None
    if dtype == torch.float64:
        attn_mask, offset = attn_mask.double(), offset.double()
    near = attn_mask - offset
    if bounded:  # a key that is not seen may be so much larger that it overflows, and kernels add -inf to it
        near = near.masked_fill((near == float("inf")) & (offset != 0.0), 0.0)
    if not _is_traced():
        setattr(near, _TAKEN, True)
    return near, offset[..., 0]


def offset_of(largest: torch.Tensor) -> torch.Tensor | None:
    """What to take from rows with these largest numbers: 0 where they are near, NaN or infinite; None where all are."""
    may_ask, near = asks(largest), _near_in(largest.dtype)
    if may_ask and (not largest.numel() or _near(*largest.aminmax(), near)):
        return None
    offset = largest.masked_fill((largest.abs() > near).logical_and(largest.isfinite()).logical_not(), 0.0)
    return None if may_ask and not bool(offset.any()) else offset


def asks(mask: torch.Tensor) -> bool:
    """Whether a look at the numbers is to be had, and costs no wait for a device."""
    return mask.is_cpu and type(mask) in _PLAIN and not (_is_traced() or _dispatch_modes() or _are_transformed())


def _near_in(dtype: torch.dtype) -> float:
    return _NEAR if dtype in (torch.float32, torch.float64) else _NEAR_IN_HALF


def _near(low: torch.Tensor, high: torch.Tensor, near: float) -> bool:
    return low.item() >= -near and high.item() <= near


def _near_on_diagonal(mask: torch.Tensor, queries: int, keys: int) -> bool:
    """Whether the number of each query's own key, and all others' upper limit, tell that no row is far; a quick look."""
    if queries > keys:
        return False
    if mask.shape[3] == 1 or mask.shape[2] == 1:
        own = mask if mask.shape[3] == 1 else mask[..., keys - queries :]
    else:
        own = mask.diagonal(keys - queries, 2, 3)
    return _near(own.amin(), mask.amax(), _near_in(mask.dtype))


def largest(
    mask: torch.Tensor, queries: int, keys: int, *, causal: bool = False, window_size: tuple[int, int] | None = None
) -> torch.Tensor:
    """The largest number among the keys that each query sees, (., ., Sq or 1, 1); of a query that sees none, any.

    Args:
        mask: float, 4-D.
        queries: Sq.
        keys: Skv.
        causal: bottom-right.
        window_size: (left, right), -1 unlimited.
    """
    if mask.shape[3] == 1:
        return mask
    if causal and window_size is None and mask.shape[2] == 1:
        last = torch.arange(keys - queries, keys, device=mask.device).clamp(min=0)
        return mask.cummax(-1).values.index_select(-1, last).transpose(2, 3)
    visible = diagonal_mask(queries, keys, causal=causal, window_size=window_size, device=mask.device)
    seen = mask if visible is None else mask.masked_fill(~visible, float("-inf"))
    return seen.amax(-1, keepdim=True)
