"""What is computed piece by piece for some rows, and put together."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from attn_core.parallel.layout import Segment
from attn_core.parallel.merge import NOTHING, add, at_once, merge, wide

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Cut = Callable[[Segment], tuple[torch.Tensor, ...]]

_LENGTHS = 1, 2  # the dimensions of the sequence of a result and of its lse


class Rows:
    """What pieces of the work give for this rank's queries. A few are kept, then put together in one pass over memory.

    Args:
        query: this rank's.
        dim: of what is put together.
        weighted: by an lse that comes with each; else they are added.
    """

    def __init__(self, query: torch.Tensor, dim: int, *, weighted: bool) -> None:
        self._query = query
        self._shape = (*query.shape[:3], dim)
        self._weighted = weighted
        self._whole = Segment(0, query.shape[1])
        self._at_once = at_once(query)
        self._kept: list[tuple[Segment, tuple[torch.Tensor, ...]]] = []
        self._sum: tuple[torch.Tensor, ...] = ()  # of what came before, all rows of it
        self._cut: Cut = cutter()

    def add(self, rows: Segment, part: tuple[torch.Tensor, ...]) -> None:
        """Take what a piece has given for some rows."""
        self._kept.append((rows, part))
        if len(self._kept) + bool(self._sum) == self._at_once:
            self._put_together(wide(self._query.dtype))

    def finished(self) -> tuple[torch.Tensor, ...]:
        """The whole in the dtype of the query, and its lse, contiguous: 0 and -inf where nothing was given."""
        dtype = self._query.dtype
        if self._kept or not self._sum or self._sum[0].dtype != dtype:
            self._put_together(dtype)
        return self._sum

    def _put_together(self, dtype: torch.dtype) -> None:
        given, self._kept, before = self._kept, [], self._sum
        if not before and len(given) == 1 and given[0][0] == self._whole:
            ((_, (one, *lse)),) = given
            self._sum = _own(one.to(dtype)), *(_own(level.to(wide(dtype))) for level in lse)
            return
        edges = {edge for rows, _ in given for edge in rows}
        in_place = bool(before) and before[0].dtype == dtype
        if not in_place:
            self._sum = self._room(dtype)
            self._cut = cutter(*zip(self._sum, _LENGTHS, strict=False))
            given = [(self._whole, before), *given] if before else given
            edges |= set(self._whole)
        for start, stop in pairwise(sorted(edges)):
            parts = [
                _cut_out(rows, part, start, stop) for rows, part in given if rows.start <= start < stop <= rows.stop
            ]
            target = self._cut(Segment(start, stop))
            if not in_place:
                self._write(parts, target)
            elif parts:
                self._write([target, *parts], target)

    def _room(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        out = self._query.new_empty(self._shape, dtype=dtype)
        batch, length, heads, _ = self._shape
        return (out, out.new_empty(batch, heads, length, dtype=wide(dtype))) if self._weighted else (out,)

    def _write(self, parts: list[tuple[torch.Tensor, ...]], target: tuple[torch.Tensor, ...]) -> None:
        if not parts:
            for tensor, nothing in zip(target, (0.0, NOTHING), strict=False):
                tensor.fill_(nothing)
        elif self._weighted:
            merge(parts, *target)
        else:
            add([part for (part,) in parts], *target)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and not in memory that is kept for more than it."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _cut_out(rows: Segment, part: tuple[torch.Tensor, ...], start: int, stop: int) -> tuple[torch.Tensor, ...]:
    if rows == (start, stop):
        return part
    return tuple(
        tensor.narrow(dim, start - rows.start, stop - start) for tensor, dim in zip(part, _LENGTHS, strict=False)
    )


def cutter(*tensors: tuple[torch.Tensor, int]) -> Cut:
    """Takes positions of tensors, each given with its dimension of the sequence, the same positions only once."""
    return cache(lambda part: tuple(tensor.narrow(dim, part.start, part.length) for tensor, dim in tensors))
