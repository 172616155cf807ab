"""Key padding for kernels that take no mask: the kept keys laid end to end or in front, or the others hidden by columns.

``pack`` prepares, once for a description, where each kept key goes and where each sequence starts. Every query stays, since
each has a defined result, so that packing the queries is a reshape. So is packing keys that lie side by side with ``gaps``, where
those that are kept are one run in each of long sequences: padding becomes a sequence without queries. Packed keys keep their
order and lose their places: a diagonal (causal, a window) means the same as before only where all padding is on the left.
Elsewhere ``hide`` adds columns to query and key that take the scores of padding below all others.

A kernel that reads its keys in whole tiles, and so reads on into the sequence that is packed after the one it works on, gives
the one what NaN the other has. ``front`` leaves each sequence its own keys, the kept ones first, then zeros.

torch is imported here, as in all that adapters call.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from attn_core.errors import CallRefused
from attn_core.masks import capturing, traced

if TYPE_CHECKING:
    from attn_core.masks import KeyPadding

COLUMNS = 8
"""How many columns ``hide`` adds: kernels read rows in steps of 16 bytes."""

HIDDEN = 1e7
"""How far ``hide`` takes a score down. exp(-HIDDEN) is 0; and float32 still tells scores around -HIDDEN apart to about 1, so
that what a kernel computes over keys that are all hidden stays finite, until others outweigh it."""

_LARGEST = {torch.float16: 6e4}
_LEAST = 1e4
"""What is taken at least, where the dtype ends before."""

_MOST_SEQUENCES = 2**16 - 1
"""How many sequences a call is given at most with gaps: kernels have them in one dimension of their grid."""

_LEAST_KEYS = 256
"""How many keys a sequence has at least with gaps: for each sequence FlashAttention-2's backward holds 128 rows of float32."""


class Packing(NamedTuple):
    """How the keys of a padded batch are laid end to end.

    Attributes:
        keep: which keys are real, bool (B, Skv).
        rows: for each packed key its row among the B * Skv keys, int64 (N,). N is the number of kept keys where that could
            be read, else B * Skv, and what is not kept comes last, beyond all sequences. None where keys stay in their
            places, and the padding before, between and behind the kept ones is B + 1 sequences without queries.
        cu_seqlens_q: where each sequence starts among the queries, int32 (B + 1,), or (2 * B + 2,) with gaps.
        cu_seqlens_k: the same among the packed keys.
        max_seqlen_q: how many queries each sequence has.
        max_seqlen_k: at least the length of the longest sequence of keys.
        exact: whether N is the number of kept keys, or keys stay in their places.
    """

    keep: torch.Tensor
    rows: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    exact: bool

    def keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pack key or value: (B, Skv, H, D) to (N, H, D)."""
        packed = tensor.flatten(0, 1)
        if self.rows is None:
            return packed
        packed = packed.index_select(0, self.rows)
        if self.exact:
            return packed
        beyond = torch.arange(self.rows.shape[0], device=self.rows.device) >= self.cu_seqlens_k[-1]
        return packed.masked_fill(beyond[:, None, None], 0.0)  # kernels leave the gradient there unwritten

    def queries(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lay query, the result or its gradient end to end: (B, Sq, H, D) to (B * Sq, H, D)."""
        return tensor.flatten(0, 1)

    def query_lse(self, lse: torch.Tensor) -> torch.Tensor:
        """Lay an lse end to end: (B, H, Sq) to (H, B * Sq)."""
        return lse.transpose(0, 1).flatten(1)

    def unpack_keys(self, grad: torch.Tensor) -> torch.Tensor:
        """Put a gradient of packed keys back: (N, H, D) to (B, Skv, H, D), zeros where a key is hidden."""
        rows = grad
        if self.rows is not None:
            rows = grad.new_zeros(self.keep.numel(), *grad.shape[1:]).index_copy_(0, self.rows, grad)
        whole: torch.Tensor = rows.unflatten(0, self.keep.shape)
        return whole if self.exact else whole.masked_fill(~self.keep[:, :, None, None], 0.0)

    def unpack(self, result: torch.Tensor) -> torch.Tensor:
        """Give a result or a gradient of queries its batch back: (B * Sq, H, D) to (B, Sq, H, D)."""
        batch: torch.Tensor = result.unflatten(0, (self.keep.shape[0], self.max_seqlen_q))
        return batch

    def unpack_lse(self, lse: torch.Tensor) -> torch.Tensor:
        """Give an lse its batch back: (H, B * Sq) to (B, H, Sq)."""
        batch: torch.Tensor = lse.unflatten(1, (self.keep.shape[0], self.max_seqlen_q))
        return batch.transpose(0, 1)


def pack(padding: KeyPadding, query_length: int, *, gaps: bool = False) -> Packing:
    """Prepare how the keys that are kept are laid end to end; once, and kept with the description.

    Lengths are copied from the device the first time. In traced code and while a CUDA graph is captured they can't be, and
    the packed keys have room for all.

    Args:
        padding: which keys are kept.
        query_length: Sq.
        gaps: whether keys stay in their places where they can. For a kernel that reads none of the keys behind a sequence,
            and writes gradients of zeros for the keys of a sequence without queries.

    Example:
        >>> import torch
        >>> from attn_core import KeyPadding
        >>> packing = pack(KeyPadding(torch.tensor([[False, True], [True, True]])), 2)
        >>> packing.rows.tolist(), packing.cu_seqlens_k.tolist(), packing.max_seqlen_k
        ([1, 2, 3], [0, 1, 3], 2)
        >>> packing = pack(KeyPadding(torch.arange(256)[None] >= torch.tensor([[56], [0]])), 2, gaps=True)
        >>> packing.rows, packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist()
        (None, [0, 0, 2, 2, 4, 4], [0, 56, 256, 256, 512, 512])
    """
    return padding.prepared(
        ("packing", query_length, gaps),
        lambda: _pack(padding.keep, query_length, readable=_readable(padding), gaps=gaps),
    )


class Front(NamedTuple):
    """How the keys of each sequence of a padded batch are moved to its front.

    Attributes:
        keep: which keys are real, bool (B, Skv).
        lengths: how many are, int32 (B,).
        rows: for each place of the (B, L) moved keys its row among the B * Skv keys, int64 (B * L,). L is the largest length
            where that could be read, and at least 1; else Skv. What room was asked for comes on top.
        kept: which of the B * Skv keys are real: their numbers, int64 (N,), where lengths could be read, else bool (B * Skv,).
        places: for each kept key its place among the B * L, int64 (N,); else for each key (B * Skv,), any where it is hidden.
        rest: which of the B * L places no key has: their numbers, int64, where lengths could be read, else bool (B * L,).
    """

    keep: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    kept: torch.Tensor
    places: torch.Tensor
    rest: torch.Tensor

    def keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move key or value: (B, Skv, H, D) to (B, L, H, D), zeros behind."""
        moved = tensor.flatten(0, 1).index_select(0, self.rows)
        if self.rest.dtype == torch.bool:
            moved = moved.masked_fill(self.rest[:, None, None], 0.0)
        elif self.rest.shape[0]:
            moved.index_fill_(0, self.rest, 0.0)
        dense: torch.Tensor = moved.unflatten(0, (self.keep.shape[0], -1))
        return dense

    def unpack_keys(self, grad: torch.Tensor) -> torch.Tensor:
        """Put a gradient of moved keys back: (B, L, H, D) to (B, Skv, H, D), zeros where a key is hidden."""
        rows = grad.flatten(0, 1).index_select(0, self.places)
        if self.kept.dtype == torch.bool:
            rows = rows.masked_fill(~self.kept[:, None, None], 0.0)
        else:  # half of what there is to read and to write
            rows = grad.new_zeros(self.keep.numel(), *grad.shape[2:]).index_copy_(0, self.kept, rows)
        whole: torch.Tensor = rows.unflatten(0, self.keep.shape)
        return whole


def front(padding: KeyPadding, *, room: int = 0) -> Front:
    """Prepare how the keys that are kept are moved to the front of their sequence; once, and kept with the description.

    Lengths are copied from the device the first time, where they can be, as by ``pack``.

    Args:
        padding: which keys are kept, of at least one.
        room: how many places without a key there are behind the longest sequence.

    Example:
        >>> import torch
        >>> from attn_core import KeyPadding
        >>> moved = front(KeyPadding(torch.tensor([[False, True, True], [True, False, False]])))
        >>> moved.rows.tolist(), moved.lengths.tolist(), moved.rest.tolist()
        ([1, 2, 3, 4], [2, 1], [3])
    """
    return padding.prepared(("front", room), lambda: _front(padding.keep, room, readable=_readable(padding)))


def keeps_diagonals(padding: KeyPadding) -> bool:
    """Whether causal and windows mean the same of packed keys: where all padding is known to be on the left.

    Example:
        >>> import torch
        >>> from attn_core import KeyPadding
        >>> keeps_diagonals(KeyPadding(torch.tensor([[False, True]]))), keeps_diagonals(KeyPadding(torch.tensor([[True, False]])))
        (True, False)
    """
    return padding.prepared("keeps_diagonals", lambda: _readable(padding) and _is_left(padding.keep))


def hide(
    query: torch.Tensor, key: torch.Tensor, padding: KeyPadding, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add columns to query and key that take the score of each hidden key down by ``HIDDEN``, and change no other score.

    So nothing is left of it beside any visible key whose score is not that low itself.

    A query that sees hidden keys alone gets nonsense, to be replaced: ``blind_queries`` says which those are. With a
    softcap nothing can be hidden so, since it lifts scores to at least -softcap.

    Args:
        query: (B, Sq, Hq, D), half precision.
        key: (B, Skv, Hkv, D).
        padding: which keys are kept.
        scale: factor of the scores, above 0.

    Returns:
        (B, Sq, Hq, D + COLUMNS) and (B, Skv, Hkv, D + COLUMNS).

    Raises:
        CallRefused: the scale is so small that no number of this dtype is large enough.

    Example:
        >>> import torch
        >>> from attn_core import KeyPadding
        >>> q = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
        >>> query, key = hide(q, q.expand(1, 2, 1, 8), KeyPadding(torch.tensor([[True, False]])), 1.0)
        >>> [score > -1e6 for score in (query.double() * key.double()).sum(-1).flatten().tolist()]
        [True, False]
    """
    factor = min(sqrt(HIDDEN / (COLUMNS * scale)), _LARGEST.get(query.dtype, inf))
    if scale * factor * factor * COLUMNS < _LEAST:
        msg = (
            f"a scale of {scale:g} with key padding and a diagonal: padding can't be told from keys in {query.dtype}; "
            "accepted: 1e-6 and up; use backend 'native'"
        )
        raise CallRefused(msg)
    columns = padding.prepared(("hiding", query.dtype, factor), lambda: _columns(padding.keep, query.dtype, factor))
    key_columns = columns[:, :, None, :].expand(*key.shape[:3], COLUMNS)
    return pad(query, (0, COLUMNS), value=factor), torch.cat((key, key_columns), -1)


def blind_queries(
    padding: KeyPadding, query_length: int, *, causal: bool = False, window_size: tuple[int, int] | None = None
) -> torch.Tensor:
    """Which queries see no key: bool (B, Sq), from counts of kept keys and without a (Sq, Skv) mask.

    Example:
        >>> import torch
        >>> from attn_core import KeyPadding
        >>> blind_queries(KeyPadding(torch.tensor([[False, True]])), 2, causal=True).tolist()
        [[True, False]]
    """
    left, right = window_size or (-1, -1)
    if causal:
        right = 0
    return padding.prepared(
        ("blind", query_length, left, right), lambda: _blind(padding.keep, query_length, left, right)
    )


def _readable(padding: KeyPadding) -> bool:
    return not traced(padding.keep) and not capturing(padding.keep)


def _pack(keep: torch.Tensor, query_length: int, *, readable: bool, gaps: bool) -> Packing:
    batch, keys = keep.shape
    if gaps and readable and keys >= _LEAST_KEYS and 2 * batch < _MOST_SEQUENCES and _is_run(keep):
        return _in_place(keep, query_length)
    lengths = keep.sum(1)
    starts = pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    starts_q = torch.arange(batch + 1, dtype=torch.int32, device=keep.device) * query_length
    if readable:
        return Packing(
            keep, keep.flatten().nonzero().squeeze(1), starts_q, starts, query_length, int(lengths.max()), exact=True
        )
    rows = (~keep).flatten().to(torch.uint8).argsort(stable=True)
    return Packing(keep, rows, starts_q, starts, query_length, keys, exact=False)


def _is_run(keep: torch.Tensor) -> bool:
    """Whether the kept keys of each sequence follow one another."""
    begins = keep & ~pad(keep[:, :-1], (1, 0))
    return not bool((begins.sum(1) > 1).any())


def _in_place(keep: torch.Tensor, query_length: int) -> Packing:
    batch, keys = keep.shape
    first = keep.to(torch.uint8).argmax(1) + torch.arange(batch, device=keep.device) * keys
    runs = torch.stack((first, first + keep.sum(1)), 1)  # where each begins and ends
    starts = pad(pad(runs.flatten(), (1, 0)), (0, 1), value=batch * keys).to(torch.int32)
    ends = torch.arange(batch + 1, dtype=torch.int32, device=keep.device) * query_length
    longest = int((starts[1:] - starts[:-1]).max())
    return Packing(keep, None, ends.repeat_interleave(2), starts, query_length, longest, exact=True)


def _front(keep: torch.Tensor, room: int, *, readable: bool) -> Front:
    batch, keys = keep.shape
    counts = keep.sum(1)
    longest = max(int(counts.max()), 1) if readable else keys
    width = longest + room
    first = torch.arange(batch, device=keep.device)[:, None]
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    if room:  # more places than there may be keys
        order = order.index_select(1, torch.arange(width, device=keep.device) % keys)
    rows = order[:, :width] + first * keys
    kept = keep.flatten()
    places = ((keep.cumsum(1) - 1).clamp(0, longest - 1) + first * width).flatten()
    rest = (torch.arange(width, device=keep.device) >= counts[:, None]).flatten()
    if readable:
        kept, rest = kept.nonzero().squeeze(1), rest.nonzero().squeeze(1)
        places = places.index_select(0, kept)
    return Front(keep, counts.to(torch.int32), rows.flatten(), kept, places, rest)


def _is_left(keep: torch.Tensor) -> bool:
    return not bool((keep[:, :-1] & ~keep[:, 1:]).any())


def _columns(keep: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
    hidden = torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, -factor)
    return hidden.unsqueeze(2).expand(*keep.shape, COLUMNS)


def _blind(keep: torch.Tensor, query_length: int, left: int, right: int) -> torch.Tensor:
    keys = keep.shape[1]
    before = pad(keep.cumsum(1), (1, 0))  # how many are kept before each place
    position = torch.arange(query_length, device=keep.device) + (keys - query_length)
    first = (position - left).clamp(0, keys) if left >= 0 else torch.zeros_like(position)
    end = (position + right + 1).clamp(0, keys) if right >= 0 else torch.full_like(position, keys)
    return before.index_select(1, end) <= before.index_select(1, first)
