"""Puts partial results together: those over some keys by their log-sum-exp, gradients by adding them."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    Part = tuple[torch.Tensor, ...]  # a result and its lse

NOTHING = float("-inf")
AT_ONCE = 4  # parts that one pass of the kernel reads


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results are put together: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def at_once(tensor: torch.Tensor) -> int:
    """How many parts are worth waiting for, to put them together in one pass over memory; others take a pass each."""
    return AT_ONCE if _fused_for(tensor) is not None else 2


def merge(parts: Sequence[Part], out: torch.Tensor, lse: torch.Tensor) -> None:
    """Write the result of the same queries over the keys of all parts.

    Exact: the weights are ``exp(lse_i - lse)`` over their sum, without the rounding of ``lse``. A part that sees nothing (lse
    -inf) has weight 0, and where none sees anything the result is 0 and the lse -inf. On a GPU with Triton it is one pass over
    memory.

    Args:
        parts: at most ``AT_ONCE``: the result (B, S, H, Dv) over some keys, in any dtype, and its lse (B, H, S).
        out: where to; may be that of the first part. Sums are made in float32 or better, whatever its dtype.
        lse: where to; float32 or better. May be that of the first part.

    >>> one, other = (torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), -torch.inf)), (torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1))
    >>> merge([one, other], *one)
    >>> one[0].item(), one[1].item()
    (1.0, 0.0)
    """
    if (fused := _fused_for(out)) is not None:
        fused.merge(parts, out, lse)
        return
    (first, first_lse), *others = parts
    whole = _widened(first, out)
    lse.copy_(first_lse)
    for part, narrow_lse in others:
        part_lse = narrow_lse.to(lse.dtype)
        # two products and no lerp, whose difference of an infinite result and a finite one is NaN
        whole.mul_(_weight(lse, part_lse)).addcmul_(part.to(whole.dtype), _weight(part_lse, lse))
        torch.logaddexp(lse, part_lse, out=lse)
    out.copy_(whole)


def add(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Write the sum of parts, made in float32 or better.

    Args:
        parts: at most ``AT_ONCE`` of (B, S, H, D), in any dtype.
        out: where to; may be the first part.

    >>> found = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    >>> add([torch.full_like(found, 256.0), torch.ones_like(found), torch.ones_like(found)], found)
    >>> found.item()
    258.0
    """
    if (fused := _fused_for(out)) is not None:
        fused.add(parts, out)
        return
    first, *others = parts
    whole = _widened(first, out)
    for part in others:
        whole.add_(part)
    out.copy_(whole)


def _widened(first: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The first part, where the others can be added: in the result itself if it is wide enough."""
    whole = out if out.dtype == wide(out.dtype) else torch.empty_like(out, dtype=wide(out.dtype))
    return whole.copy_(first)


def _weight(lse: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """What the one side weighs beside the other, laid out as a result is; -inf - -inf would be NaN."""
    return torch.sigmoid(lse - other).masked_fill_(lse == NOTHING, 0.0).transpose(1, 2).unsqueeze(-1)


def _fused_for(out: torch.Tensor) -> ModuleType | None:
    """The kernels of one pass, if such a result can be made with them."""
    return _fused() if out.is_cuda and wide(out.dtype) == torch.float32 else None


@cache
def _fused() -> ModuleType | None:
    """The kernels of one pass; None where Triton is missing or can't compile, as without a C compiler."""
    try:
        from attn_core.parallel import fused

        out = torch.zeros(1, 1, 1, 1, device="cuda")
        fused.merge([(out, out[0])], out, out[0])
    except ImportError:
        return None
    except Exception as error:  # noqa: BLE001 - whatever keeps Triton from compiling, torch computes the same
        warnings.warn(
            f"attn: partial results are merged in several passes, as Triton fails here: {error}", stacklevel=2
        )
        return None
    return fused
