"""How far from the reference a backend may be that declares an error, as a whole, in each head and in each row.

What a row's error is depends on chance: it is a sum of rounding errors, weighted by the probabilities of the keys that the row
sees. With ``error`` the root mean square of it over all rows, relative to them, what is held to is

- the whole: ``error`` times the root mean square of the rows;
- each head of each sequence, of n rows: ``error (1 + 3 / sqrt(n))`` times that of the head's rows, since the mean of n squares
  strays by a share of 1 / sqrt(n);
- each row: ``4 error`` times its own size, or that of the head's rows where it is smaller, since the terms of a small row cancel
  and their errors do not. One number strays by more than four times its root mean square once in 16,000; a row has many numbers.
  The largest row of 300 by 300 keys, of queries and keys rounded to int8 in blocks of 64 and 128, is off by 2.8 times the whole.

A row is what one query gets, or one key's gradient. One that is exactly zero, as of a query that sees nothing, is zero up to
rounding. An error of the log-sum-exp is an absolute one, since it is a relative one of the sum, and a row is one number.
The rounding error of an exact kernel is allowed on top.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attn_core.declaration import Approximate

STRAYS = 4
"""How many times the declared error the error of a single row may be."""


def error_at(numerics: Approximate, query: torch.Tensor, key: torch.Tensor, scale: float | None = None) -> float:
    """The relative error that an approximate backend is held to in a call: what it declares, or in proportion to the scores.

    Example:
        >>> import torch
        >>> from attn_core.plugin import Approximate
        >>> q = torch.ones(1, 2, 1, 4)
        >>> error_at(Approximate(0.02, scores=1.0), q, q), error_at(Approximate(0.02, scores=1.0), q, 3 * q)
        (0.02, 0.06)
    """
    if numerics.scores is None or not (query.numel() and key.numel()):
        return numerics.error
    longest = [float(tensor.detach().double().norm(dim=-1).nan_to_num(posinf=0).max()) for tensor in (query, key)]
    head_dim = query.shape[-1]
    size = (head_dim**-0.5 if scale is None else abs(float(scale))) * longest[0] * longest[1] / sqrt(head_dim)
    return numerics.error * max(1.0, size / numerics.scores)


def assert_near(found: torch.Tensor, expected: torch.Tensor, *, what: str, bound: torch.Tensor, error: float) -> None:
    """Raise an AssertionError where an approximate backend's result is further from ``expected`` than it may be.

    Infinities have to be where they are expected.

    Args:
        found: of the kernel: (..., S, H, D), or a log-sum-exp (..., H, S).
        expected: of the reference.
        what: what is compared, for the message; "lse" for the log-sum-exp.
        bound: the honest rounding error of each element.
        error: the relative error that it is held to, of ``error_at``.

    Example:
        >>> import torch
        >>> assert_near(torch.full((4, 1, 8), 1.01), torch.ones(4, 1, 8), what="result", bound=torch.zeros(()), error=0.02)
    """
    found, expected = found.detach().double(), expected.detach().double().to(found.device)
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite], expected[~finite]):
        msg = f"{what}: NaN or infinities are not where they are expected"
        raise AssertionError(msg)
    if not expected.numel():
        return
    off = (found - expected).abs().masked_fill(~finite, 0)
    bound = bound.to(found.device).expand(finite.shape).masked_fill(~finite, 0)
    parts = _parts_of_lse(off, bound) if what == "lse" else _parts(off, expected.masked_fill(~finite, 0), bound)
    for part, is_off, size, rounding, rows in parts:
        allowed = error * (1 + (STRAYS - 1) / sqrt(rows)) * size + rounding
        wrong = ~(is_off <= allowed)
        if bool(wrong.any()):
            place = tuple(
                int(i) for i in torch.unravel_index((is_off / allowed).nan_to_num(nan=inf).argmax(), wrong.shape)
            )
            where = f"{part} {place} " if place else ""
            msg = (
                f"{what}: {where}is off by {float(is_off[place]):.3g} (root mean square), allowed {float(allowed[place]):.3g}; "
                f"it is held to a relative error of {error:.3g}"
            )
            raise AssertionError(msg)


Part = tuple[str, torch.Tensor, "torch.Tensor | float", torch.Tensor, float]
"""What it is, and of each such part: how far it is off, its size, its rounding error, and how many rows it has."""


def _parts(off: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> Iterator[Part]:
    """The whole, the heads (..., H) and the rows (..., S, H) of a result."""
    off, size, bound = (tensor.square().mean(-1) for tensor in (off, expected, bound))
    yield "", off.mean().sqrt(), size.mean().sqrt(), bound.mean().sqrt(), inf
    head = size.mean(-2)
    yield "head", off.mean(-2).sqrt(), head.sqrt(), bound.mean(-2).sqrt(), off.shape[-2]
    size = torch.maximum(size, head.unsqueeze(-2)).masked_fill(size == 0, 0)
    yield "row", off.sqrt(), size.sqrt(), bound.sqrt(), 1


def _parts_of_lse(off: torch.Tensor, bound: torch.Tensor) -> Iterator[Part]:
    """The whole, the heads (..., H) and the rows (..., H, S) of a log-sum-exp."""
    excess = (off - bound).clamp(min=0)
    none = torch.zeros((), dtype=off.dtype, device=off.device)
    yield "", excess.square().mean().sqrt(), 1.0, none, inf
    heads = excess.square().mean(-1).sqrt()
    yield "head", heads, 1.0, none.expand_as(heads), off.shape[-1]
    yield "row", excess, 1.0, none.expand_as(excess), 1
