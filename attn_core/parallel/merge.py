"""Puts partial results together by their log-sum-exp."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

NOTHING = float("-inf")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results are put together: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def merge_(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Add to a result over some keys, in place, the result of the same queries over further keys.

    Exact: the weights are ``exp(lse_i - logaddexp(lse_1, lse_2))``, without the rounding of that sum. A side that sees
    nothing (lse -inf) has weight 0, and where both see nothing the result stays 0 and the lse -inf. On a GPU with Triton it
    is one pass over memory.

    Args:
        out: (B, S, H, Dv), float32 or better.
        lse: (B, H, S), as wide as out.
        part: as out, in any dtype.
        part_lse: as lse, in any dtype.

    >>> out, lse = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), -torch.inf)
    >>> merge_(out, lse, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1))
    >>> out.item(), lse.item()
    (1.0, 0.0)
    """
    merge = _fused() if out.is_cuda and out.dtype == torch.float32 else _eager
    merge(out, lse, part, part_lse)


def _eager(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    part_lse = part_lse.to(lse.dtype)
    # two products and no lerp, whose difference of an infinite result and a finite one is NaN
    out.mul_(_weight(lse, part_lse)).addcmul_(part.to(out.dtype), _weight(part_lse, lse))
    torch.logaddexp(lse, part_lse, out=lse)


def _weight(lse: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """What the one side weighs beside the other, laid out as a result is; -inf - -inf would be NaN."""
    return torch.sigmoid(lse - other).masked_fill_(lse == NOTHING, 0.0).transpose(1, 2).unsqueeze(-1)


@cache
def _fused() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """The kernel of one pass; the form of several where Triton is missing or can't compile, as without a C compiler."""
    try:
        from attn_core.parallel import fused

        out = torch.zeros(1, 1, 1, 1, device="cuda")
        fused.merge_(out, out[0], out, out[0])
    except ImportError:
        return _eager
    except Exception as error:  # noqa: BLE001 - whatever keeps Triton from compiling, torch computes the same
        warnings.warn(
            f"attn: partial results are merged in several passes, as Triton fails here: {error}", stacklevel=2
        )
        return _eager
    return fused.merge_
