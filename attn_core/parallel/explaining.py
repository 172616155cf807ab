"""What ``explain`` says of a call that is spread over ranks, which need not be here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from attn_core.errors import CallRefused
from attn_core.masks import KeyPadding, Packed
from attn_core.parallel.agreement import refuse_whole
from attn_core.parallel.attending import refuse_what_no_ring_has
from attn_core.parallel.completion import check_mask
from attn_core.parallel.context import ContextParallel
from attn_core.parallel.kind import Kind
from attn_core.parallel.layout import ORDERS, Layout, even
from attn_core.parallel.traffic import busiest_share, bytes_sent, predicted_seconds
from attn_core.reading import check_tensors, read

if TYPE_CHECKING:
    from attn_core.reading import Call

_MEGABYTE = 1e6


@dataclass(frozen=True)
class Spreading:
    """How a call is spread, and what that costs.

    Attributes:
        mode: ring, ulysses or hybrid.
        ring: places of the ring.
        ulysses: places that share the heads.
        order: of the sequence in the ring.
        positions: queries on the rank that has most.
        busiest_share: the scores that the busiest rank computes, over the average; 1 is balanced.
        bytes_forward: what the rank that sends most sends in the forward.
        bytes_backward: the same of the backward.
        fastest: the grid of as many ranks, (ring, ulysses), of which the forward is predicted to be the fastest, on GPUs and a
            link as in ``traffic.predicted_seconds``.
    """

    mode: str
    ring: int
    ulysses: int
    order: str
    positions: int
    busiest_share: float
    bytes_forward: int
    bytes_backward: int
    fastest: tuple[int, int]

    def __str__(self) -> str:
        grid = _shown(self.ring, self.ulysses, self.order)
        forward, backward = (f"{sent / _MEGABYTE:.1f} MB" for sent in (self.bytes_forward, self.bytes_backward))
        return (
            f"{grid}; at most {self.positions} queries on a rank; the busiest rank computes {self.busiest_share:.2f} x the "
            f"average; a rank sends at most {forward} in the forward and {backward} in the backward; predicted to be the "
            f"fastest on one node of H100s: {_shown(*self.fastest, self.order)}"
        )


def _shown(ring: int, ulysses: int, order: str) -> str:
    if min(ring, ulysses) > 1:
        return f"hybrid, ring of {ring} ({order}) x ulysses over {ulysses}"
    return f"ulysses over {ulysses}" if ulysses > 1 else f"ring of {ring}, {order}"


def kind_of_whole(call: Call, query: torch.Tensor, key: torch.Tensor, grid: tuple[int, int, str]) -> Kind:
    """The kind of a call that was read of whole sequences, spread evenly over ranks that need not be here.

    Raises:
        CallRefused: numbers of places below 1, an order that is unknown, or an option that context parallel has not.
    """
    ring, ulysses, order = grid
    for name, found in (("ring", ring), ("ulysses", ulysses)):
        if type(found) is not int or found < 1:
            msg = f"{name}: found {found!r}; accepted: how many ranks, a whole number from 1 up"
            raise CallRefused(msg)
    if order not in ORDERS:
        msg = f"order: found {order!r}; accepted: {', '.join(ORDERS)}"
        raise CallRefused(msg)
    mode = "hybrid" if min(ring, ulysses) > 1 else "ulysses" if ulysses > 1 else "ring"
    lying = [even(tensor.shape[1], ring, ulysses, order) for tensor in (query, key)]
    return _kind(call, (mode, ring, ulysses, order), lying[0], lying[1], query.shape[0], key.shape[1])


def kind_of_parts(
    parallel: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> tuple[Call, Kind]:
    """The call of the whole sequences that these are parts of, and its kind.

    Ranks can't speak to each other here: parts are read as those of the latest sequence with a part as long as this that the
    mask fits, or as if each rank's were as long.

    Raises:
        CallRefused: as ``attention`` does, of what can be seen on this rank.
    """
    if not isinstance(parallel, ContextParallel):
        msg = f"parallel: found {parallel!r}; accepted: a ContextParallel of attn_core.parallel, or None"
        raise CallRefused(msg)
    check_tensors(query, key, value)
    mask = options["attn_mask"]
    totals = _totals(mask)
    queries = _layout(parallel, "query", query.shape[1], totals[0])
    keys = _layout(parallel, "key", key.shape[1], totals[1])
    check_mask(mask, query, queries.total, keys.total)
    if isinstance(mask, torch.Tensor):
        rows = mask.shape[2]  # one row is one for all only where no rank has one query
        mask = _whole(mask, 2, queries.total) if rows == query.shape[1] or 1 in queries.flat else mask
    whole_query = _whole(query, 1, queries.total)
    whole_key, whole_value = (_whole(tensor, 1, keys.total) for tensor in (key, value))
    call = read(whole_query, whole_key, whole_value, {**options, "attn_mask": mask, "parallel": None})
    grid = parallel.mode, parallel.ring, parallel.ulysses, parallel.order
    lying = None if "key" in parallel.whole else keys
    return call, _kind(call, grid, queries, lying, query.shape[0], keys.total)


def _totals(mask: Any) -> tuple[int | None, int | None]:
    """How many queries and keys there are, as far as a mask knows."""
    if isinstance(mask, Packed):
        return mask.totals or (None, None)
    if isinstance(mask, KeyPadding):
        return None, mask.keep.shape[1]
    return None, mask.shape[-1] if isinstance(mask, torch.Tensor) and mask.shape[-1] > 1 else None


def _layout(parallel: ContextParallel, side: str, length: int, total: int | None) -> Layout:
    if side in parallel.whole:
        return even(length, parallel.ring, parallel.ulysses, parallel.order)
    refuse_whole(parallel, side, length)
    latest = parallel.shared.latest
    alike = Layout(((length,) * parallel.ulysses,) * parallel.ring, parallel.order)
    known = [*([] if latest is None else [latest]), *parallel.shared.layouts, alike]
    mine = [one for one in known if one.flat[parallel.index] == length]
    return next((one for one in mine if total in (None, one.total)), mine[0])


def _whole(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """A tensor as long as the whole in this part's place; it takes no memory, and holds nothing."""
    found = tensor.new_empty(1).expand(*tensor.shape[:dim], length, *tensor.shape[dim + 1 :])
    return found.requires_grad_(tensor.requires_grad)


def _kind(
    call: Call, grid: tuple[str, int, int, str], queries: Layout, keys: Layout | None, batch: int, total: int
) -> Kind:
    _refuse(call)
    facts, passed = call.facts, call.options
    mask = passed.get("attn_mask")
    documents: Any = None
    if isinstance(mask, Packed):
        documents = tuple(tuple(offsets.diff().tolist()) for offsets in mask.tensors)
    mode, ring, ulysses, order = grid
    return Kind(
        context="",
        mode=mode,
        ring=ring,
        ulysses=ulysses,
        order=order,
        query=queries.flat,
        key=() if keys is None else keys.flat,
        keys=total,
        choice=(),
        chosen_by="",
        device=facts.platform,
        dtype=facts.dtype,
        batch=batch,
        heads=facts.heads,
        key_heads=facts.key_heads,
        head_dim=facts.head_dim,
        value_head_dim=facts.value_head_dim,
        causal=facts.causal,
        window_size=facts.window_size,
        softcap=passed.get("softcap"),
        scale=passed["scale"],
        deterministic=facts.deterministic,
        return_lse=facts.return_lse,
        gradient=facts.backward,
        mask=facts.mask,
        mask_dtype=facts.mask_dtype,
        mask_once=facts.mask_broadcast,
        documents=documents,
    )


def _refuse(call: Call) -> None:
    facts = call.facts
    refuse_what_no_ring_has(
        dropout=facts.dropout, mask_gradient=facts.mask_gradient, transformed=facts.vmap or facts.forward_mode
    )


def spreading(kind: Kind) -> Spreading:
    """What it costs to spread a kind of call."""
    places = [(ring, ulysses) for ring in range(kind.ring) for ulysses in range(kind.ulysses)]
    sent = [max(sum(bytes_sent(kind, *place, backward=late).values()) for place in places) for late in (False, True)]
    return Spreading(
        mode=kind.mode,
        ring=kind.ring,
        ulysses=kind.ulysses,
        order=kind.order,
        positions=max(kind.query or (), default=0),
        busiest_share=busiest_share(kind),
        bytes_forward=sent[0],
        bytes_backward=sent[1],
        fastest=_fastest(kind),
    )


def _fastest(kind: Kind) -> tuple[int, int]:
    """Of all grids of as many ranks; ulysses needs a query head for each place."""
    ranks, queries, keys = kind.ring * kind.ulysses, sum(kind.query or ()), kind.keys or 0
    grids = [
        (ranks // places, places) for places in range(1, ranks + 1) if ranks % places == 0 and places <= kind.heads
    ]
    found = {}
    for ring, ulysses in grids:
        mode = "hybrid" if min(ring, ulysses) > 1 else "ulysses" if ulysses > 1 else "ring"
        lying = [even(length, ring, ulysses, kind.order).flat for length in (queries, keys)]
        other = replace(kind, mode=mode, ring=ring, ulysses=ulysses, query=lying[0], key=lying[1] if kind.key else ())
        found[ring, ulysses] = predicted_seconds(other)
    return min(found, key=lambda grid: found[grid])
