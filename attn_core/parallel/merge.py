"""Puts partial results together by their log-sum-exp."""

from __future__ import annotations

import torch

NOTHING = float("-inf")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results are put together: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def merge_(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Add to a result over some keys, in place, the result of the same queries over further keys.

    Exact: the weights are ``exp(lse_i - logaddexp(lse_1, lse_2))``. A side that sees nothing (lse -inf) has weight 0, and
    where both see nothing the result stays 0 and the lse -inf.

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
    part_lse = part_lse.to(lse.dtype)
    both = torch.logaddexp(lse, part_lse)
    level = both.masked_fill(both == NOTHING, 0.0)
    out.mul_(_weights(lse, level)).addcmul_(part.to(out.dtype), _weights(part_lse, level))
    lse.copy_(both)


def _weights(lse: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Of each query and head, laid out as the result is."""
    return (lse - level).exp().transpose(1, 2).unsqueeze(-1)
