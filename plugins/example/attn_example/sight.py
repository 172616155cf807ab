"""Which keys each query sees, without a matrix of queries and keys.

The diagonal, the window around it and packed sequences leave each query one stretch of keys: two numbers for each
query. Only a mask that came written out is a matrix, and of that a part is looked at at a time.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

from attn_core.masks import KeyPadding, Packed

if TYPE_CHECKING:
    from attn_core.masks import Description


class Sight(NamedTuple):
    """What the queries of a call see.

    Attributes:
        left: how many keys before its diagonal a query sees, -1 unlimited.
        right: how many after it.
        ends: where each sequence ends among the queries and among the keys: one sequence unless they are packed. None
            where that is not known without reading from the device.
        first: the first key that each query sees, (Sq,); None where every key lies in its stretch.
        last: the last one.
        keep: which keys are real, (B, Skv), where that is described.
        mask: a bool or float mask, 4-D.
    """

    left: int
    right: int
    ends: tuple[list[int], list[int]] | None
    first: torch.Tensor | None
    last: torch.Tensor | None
    keep: torch.Tensor | None
    mask: torch.Tensor | None

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        attn_mask: torch.Tensor | Description | None,
        *,
        causal: bool,
        window_size: tuple[int, int] | None,
    ) -> Sight:
        """Read it from a call."""
        left, right = window_size or (-1, -1)
        right = 0 if causal else right
        lengths = query.shape[1], key.shape[1]
        packed = attn_mask if isinstance(attn_mask, Packed) else None
        first, last = _stretch(lengths, left, right, packed, query.device)
        return cls(
            left=left,
            right=right,
            ends=([lengths[0]], [lengths[1]]) if packed is None else _ends(packed),
            first=first,
            last=last,
            keep=attn_mask.keep if isinstance(attn_mask, KeyPadding) else None,
            mask=attn_mask if isinstance(attn_mask, torch.Tensor) else None,
        )

    def reach(self, queries: slice, length: int) -> tuple[int, int]:
        """Where, of ``length`` keys, those that a chunk of queries may see begin and end."""
        if self.ends is None:
            return 0, length
        ends_q, ends_k = self.ends
        one, other = (_sequence_of(query, ends_q) for query in (queries.start, queries.stop - 1))
        start, begun, stop = (0, *ends_k)[one], (0, *ends_k)[other], ends_k[other]
        if self.left >= 0:
            start = max(start, queries.start - ends_q[one] + ends_k[one] - self.left)
        if self.right >= 0:  # whatever the last query sees, those of an earlier sequence may see all of theirs
            stop = min(stop, max(begun, queries.stop - ends_q[other] + ends_k[other] + self.right))
        return start, stop

    def tile(
        self, scores: torch.Tensor, queries: slice, keys: slice
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What is added to the scores of a tile, (B, Hkv, g, q, k), and which of them are visible; each None or broadcastable."""
        visible = None
        if self.first is not None and self.last is not None:
            places = torch.arange(keys.start, keys.stop, device=scores.device)
            visible = (self.first[queries, None] <= places) & (places <= self.last[queries, None])
        if self.keep is not None:
            kept = self.keep[:, None, None, None, keys]
            visible = kept if visible is None else visible & kept
        if self.mask is None:
            return None, visible
        part = self.mask
        part = part if part.shape[2] == 1 else part[:, :, queries]
        part = part if part.shape[3] == 1 else part[..., keys]
        part = part[:, :, None] if part.shape[1] == 1 else part.unflatten(1, scores.shape[1:3])
        added, shown = (None, part) if part.dtype == torch.bool else (part, part != float("-inf"))
        return added, shown if visible is None else visible & shown


def _ends(packed: Packed) -> tuple[list[int], list[int]] | None:
    if packed.lengths_q is None or packed.lengths_k is None:
        return None
    return list(accumulate(packed.lengths_q)), list(accumulate(packed.lengths_k))


def _sequence_of(query: int, ends: list[int]) -> int:
    return next(number for number, end in enumerate(ends) if query < end)


def _stretch(
    lengths: tuple[int, int], left: int, right: int, packed: Packed | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    if packed is not None:
        name = ("attn_example", *lengths, left, right)
        return packed.prepared(name, lambda: _stretch_of_packed(lengths[0], left, right, packed))
    if left < 0 and right < 0:
        return None, None
    diagonal = torch.arange(lengths[0], device=device) + (lengths[1] - lengths[0])
    return _narrowed(torch.zeros_like(diagonal), torch.full_like(diagonal, lengths[1] - 1), diagonal, left, right)


def _stretch_of_packed(length: int, left: int, right: int, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    ends_q, ends_k = packed.cu_seqlens_q[1:], packed.cu_seqlens_k[1:]
    queries = torch.arange(length, device=ends_q.device, dtype=torch.int32)
    sequence = torch.bucketize(queries, ends_q, right=True)
    end = ends_k[sequence]
    return _narrowed(packed.cu_seqlens_k[sequence], end - 1, queries + (end - ends_q[sequence]), left, right)


def _narrowed(
    first: torch.Tensor, last: torch.Tensor, diagonal: torch.Tensor, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Narrow stretches to the window around the diagonal."""
    if left >= 0:
        first = torch.maximum(first, diagonal - left)
    if right >= 0:
        last = torch.minimum(last, diagonal + right)
    return first, last
