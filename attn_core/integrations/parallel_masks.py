"""What transformers says of a mask on each rank, made into the mask of the whole sequence.

transformers makes masks of what a rank has: its part of ``attention_mask`` and of ``position_ids``. The mask of the whole is
found at the first layer that uses it, from what all ranks have, gathered once for a forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import getclosurevars
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import masking_utils

from attn_core import CallRefused, KeyPadding, Packed
from attn_core.parallel.agreement import RanksDisagree, refuse_whole
from attn_core.parallel.faults import told
from attn_core.parallel.gathering import all_parts, gathered

if TYPE_CHECKING:
    from collections.abc import Callable

    from attn_core.parallel.context import ContextParallel
    from attn_core.parallel.layout import Layout

Window = tuple[int, int]

IN_A_CACHE = (
    "past_key_values: found queries that continue {found}; accepted in context parallel: a forward of the whole sequence, "
    "since a cache holds this rank's part of the keys and new tokens belong to no part. Generate outside of use_parallel"
)
AS_COUNTED_HERE = (
    "position_ids: found 0, 1, 2, ... on every rank, as the model counts the tokens that it is given; accepted: the positions in "
    "the whole sequence. Pass position_ids=cp.positions(total)[None], or shard those of the whole with cp.shard"
)
NOT_TOLD_APART = (
    "position_ids: found positions of the whole that start again, while on no rank transformers took them for sequences laid end "
    "to end; accepted in context parallel: those of one sequence, or of several with use_cache=False and no attention_mask, in "
    "order 'zigzag'; or cu_seq_lens_q of the whole on every rank"
)
IN_ONE_BATCH = (
    "position_ids: found sequences laid end to end in a batch of {found}; accepted in context parallel: a batch of 1. Lay all "
    "of them end to end in one"
)
NOT_HANDED_DOWN = (
    "position_ids: found sequences laid end to end on some ranks; this model hands no position_ids to attention, so that those "
    "of the other ranks are unknown; accepted in context parallel: cu_seq_lens_q of the whole on every rank"
)
STARTS_WITHIN = (
    "position_ids: found positions of the whole that start again within a sequence of cu_seq_lens_q; accepted: those of the "
    "whole, or of each sequence, sharded with cp.shard, and cu_seq_lens_q of the whole on every rank"
)
TWO_KINDS = (
    "attention_mask: found padding together with sequences laid end to end; accepted in context parallel: one of them. Leave "
    "padding out of what is laid end to end"
)


class Described(NamedTuple):
    """What a mask function of transformers hides by position, and the positions by which sequences start again."""

    causal: bool = False
    window: Window | None = None
    positions: torch.Tensor | None = None


@dataclass(eq=False)
class PartialMask:
    """What transformers says of a mask on this rank.

    Attributes:
        parallel: the ranks.
        described: what its function hides.
        padding: this rank's part of ``attention_mask``, bool (B, keys).
        batch: B.
        queries: how many this rank has.
        keys: the same.
        device: of the call.
    """

    parallel: ContextParallel
    described: Described
    padding: torch.Tensor | None
    batch: int
    queries: int
    keys: int
    device: Any
    _whole: list[KeyPadding | Packed | None] = field(default_factory=list, init=False)

    def whole(self, keys: int, position_ids: Any, packed: Packed | None) -> KeyPadding | Packed | None:
        """The mask of the whole sequence, beside causal and window; the first time all ranks ask together.

        Args:
            keys: how many the layer has on this rank.
            position_ids: those that the model hands to the layer.
            packed: sequences laid end to end that the caller has described, of the whole.

        Raises:
            CallRefused: on every rank, when it can't be told.
        """
        if keys != self.keys:
            raise CallRefused(IN_A_CACHE.format(found=f"{keys - self.keys} keys"))
        if not self._whole:
            self.parallel.shared.begin()
            with told(self.parallel):
                self._whole.append(self._gathered(position_ids, packed))
        return self._whole[0]

    def _gathered(self, position_ids: Any, packed: Packed | None) -> KeyPadding | Packed | None:
        cp = self.parallel
        if cp.whole:
            found = " and ".join(sorted(cp.whole))
            msg = f"given_whole: found {found}; accepted with the masks of transformers: queries and keys that are sharded"
            raise CallRefused(msg)
        refuse_whole(cp, "query", self.queries)
        refuse_whole(cp, "key", self.keys)
        ranks = _Ranks(gathered(cp, self._said(position_ids), 0, self._layout()), self.batch)
        if packed is not None:
            ranks.hold(packed)
            return packed
        documents = ranks.documents() if self.queries == self.keys else None
        if documents is not None:
            return documents
        return None if bool(ranks.keep.all()) else KeyPadding(ranks.keep)

    def _layout(self) -> Layout:
        """How the keys lie on all ranks, which have to have one batch, or what follows would not fit together."""
        cp = self.parallel
        own = torch.tensor([[self.batch, self.keys]], device=self.device)
        heard = torch.cat(all_parts(cp, own, 0, [1] * cp.size)).tolist()
        if len({batch for batch, _ in heard}) > 1:
            found = ", ".join(f"{batch} on rank {rank}" for rank, (batch, _) in zip(cp.ranks, heard, strict=True))
            msg = f"batch: found {found}; accepted: the same on every rank"
            raise RanksDisagree(msg)
        return cp.layout_on([keys for _, keys in heard])

    def _said(self, position_ids: Any) -> torch.Tensor:
        """What this rank has: for each key and batch whether it is real and its position, and what is to be said of these."""
        size = (self.batch, self.keys)
        keep = torch.ones(size, dtype=torch.bool, device=self.device) if self.padding is None else self.padding
        positions = self.described.positions if self.described.positions is not None else position_ids
        if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.shape[1] != self.keys:
            positions = None
        counted = torch.arange(self.keys, device=self.device).expand(size)
        shown = counted if positions is None else positions.to(counted.device).expand(size)
        remark = (
            _PADDED * (self.padding is not None)
            + _RESTARTS * (self.described.positions is not None)
            + _UNKNOWN * (positions is None)
            + _COUNTED * (positions is not None and torch.equal(shown, counted))
        )
        remarks = torch.full((self.keys, 1), remark, device=self.device)
        return torch.cat([keep.long().T, shown.long().T, remarks], 1)


_PADDED, _RESTARTS, _UNKNOWN, _COUNTED = 1, 2, 4, 8


class _Ranks:
    """What all ranks have said, in the order of the sequence."""

    def __init__(self, said: torch.Tensor, batch: int) -> None:
        self.keep = said[:, :batch].T.contiguous() != 0
        self._positions = said[:, batch : 2 * batch].T
        self._remarks = set(said[:, -1].tolist())

    def documents(self) -> Packed | None:
        """The sequences that are laid end to end; None where there is one."""
        if self._any(_UNKNOWN):
            if self._any(_RESTARTS):
                raise CallRefused(NOT_HANDED_DOWN)
            return None
        starts = self._positions.diff(dim=1) != 1
        if not bool(starts.any()):
            return None
        if all(remark & _COUNTED for remark in self._remarks):
            raise CallRefused(AS_COUNTED_HERE)
        if self._any(_PADDED):  # as transformers has it: of positions beside padding no sequences are made
            return None
        if not self._any(_RESTARTS):
            raise CallRefused(NOT_TOLD_APART)
        if len(starts) > 1:
            raise CallRefused(IN_ONE_BATCH.format(found=len(starts)))
        ends = starts[0].nonzero()[:, 0] + 1
        offsets = torch.cat([ends.new_zeros(1), ends, ends.new_tensor([self.keep.shape[1]])])
        return Packed(offsets.to(torch.int32))

    def hold(self, packed: Packed) -> None:
        """Refuse sequences that the caller described where padding or positions say otherwise."""
        if not bool(self.keep.all()):
            raise CallRefused(TWO_KINDS)
        if self._any(_UNKNOWN):
            return
        starts = self._positions.diff(dim=1) != 1
        found = {int(start) + 1 for start in starts.any(0).nonzero()[:, 0]}
        if not found <= set(packed.cu_seqlens_q.tolist()):
            raise CallRefused(STARTS_WITHIN)

    def _any(self, remark: int) -> bool:
        return any(one & remark for one in self._remarks)


# --- the functions of transformers --------------------------------------------------------------------------------------


def described(function: Callable[..., Any]) -> Described:
    """What a mask function of transformers hides, where it is one of its own that position alone decides.

    Raises:
        CallRefused: for every other.
    """
    if function is masking_utils.causal_mask_function:
        return Described(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Described()
    name = getattr(function, "__qualname__", repr(function)).partition(".")[0]
    read = _READ.get(name) if getattr(function, "__module__", "") == masking_utils.__name__ else None
    if read is None:
        msg = (
            f"attention_mask: found the mask function {name}, which may look at more than positions; accepted in context "
            "parallel: causal, sliding and bidirectional masks, padding, and sequences laid end to end. Give a mask of your own "
            "as a 4-D tensor: the rows of this rank, the columns of all keys"
        )
        raise CallRefused(msg)
    return read(getclosurevars(function).nonlocals)


def _together(parts: Any) -> Described:
    found = [described(part) for part in parts]
    windows = [one.window for one in found if one.window is not None]
    positions = [one.positions for one in found if one.positions is not None]
    if len(windows) > 1:
        msg = f"attention_mask: found {len(windows)} windows in one mask; accepted in context parallel: one"
        raise CallRefused(msg)
    causal = any(one.causal for one in found)
    return Described(causal, windows[0] if windows else None, positions[0] if positions else None)


_READ: dict[str, Callable[[Any], Described]] = {
    "and_masks": lambda has: _together(has["mask_functions"]),
    "sliding_window_overlay": lambda has: Described(window=(int(has["sliding_window"]) - 1, -1)),
    "sliding_window_bidirectional_overlay": lambda has: Described(window=(int(has["sliding_window"]),) * 2),
    "packed_sequence_mask_function": lambda _: Described(),  # the positions beside it say the same
    "remap_positions_for_packed_sequence": lambda has: described(has["mask_function"])._replace(
        positions=has["position_ids"]
    ),
}
"""By the name of the function in transformers that makes one: of what it closes over, what it hides."""
