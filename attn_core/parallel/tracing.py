"""A call over ranks inside code that torch.compile is tracing.

What goes round the ring and what is exchanged are operators, which the graph holds unopened; they agree with the other ranks
when they run. A ring reads lengths then too, so that one graph serves all lengths. An exchange of heads has the lengths in its
shapes: they have to be known while it is traced, and a graph is made for each.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attn_core import reading, traced
from attn_core.errors import AttnError
from attn_core.parallel.agreement import refuse_whole
from attn_core.parallel.attending import kind_of, query_gradient, refuse_what_no_ring_has, tensors_of
from attn_core.parallel.completion import check_mask
from attn_core.parallel.context import context
from attn_core.parallel.faults import note
from attn_core.parallel.gathering import gather, taken
from attn_core.parallel.holding import in_turn, met, nothing
from attn_core.parallel.kind import READ_LATER
from attn_core.parallel.layout import Segment, even
from attn_core.parallel.preparation import prepare
from attn_core.parallel.ring import ring
from attn_core.parallel.ulysses import Exchange, exchange_of, over_heads

if TYPE_CHECKING:
    from attn_core.parallel.context import ContextParallel
    from attn_core.parallel.layout import Layout


def traced_parallel(
    identity: tuple[str, tuple[str, ...], str, str],
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    checked: dict[str, Any],
    chosen: tuple[Any, str],
) -> Any:
    """Make a call over ranks part of the graph, or raise as the eager call would.

    Args:
        identity: of the ``ContextParallel``.
        query: this rank's part, or the whole.
        key: the same.
        value: the same.
        attn_mask: of the whole sequence.
        checked: the options.
        chosen: the names that the call allows, and who chose.
    """
    handle, whole, mode, told = identity
    rows = None
    if "query" in whole:
        length = traced.constant(query.shape[1])
        rows, starts = _rows(handle, length)
        segments = tuple(Segment(start, stop) for start, stop in starts)
        query = taken(query, 1, segments)
        if isinstance(attn_mask, torch.Tensor) and attn_mask.ndim == 4 and attn_mask.shape[2] == length > 1:
            attn_mask = taken(attn_mask, 2, segments)
    facts = (
        chosen,
        query.device,
        query.dtype,
        tuple(traced.constant(size) for size in (query.shape[2], key.shape[2], query.shape[3], value.shape[3])),
        {name: traced.plain(option) for name, option in checked.items()},
        reading.mask_facts(attn_mask, None),
        reading.needs_graph(query, key, value),
        query_gradient(mode, query, whole_key="key" in whole),
    )
    compute = _round if mode == "ring" else _over_heads
    out, lse = compute((handle, "key" in whole, rows, told), facts, query, key, value, attn_mask)
    if rows is not None:
        out = gather(out, 1, handle, list(rows))
        lse = gather(in_turn(lse, out), 2, handle, list(rows)) if checked["return_lse"] else lse
    return (out, lse.detach()) if checked["return_lse"] else out


traced.over_ranks = traced_parallel  # from now on there may be ranks


def _round(lying: Any, facts: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    found = _ring_kind(lying, *facts)
    if found[0] == "refused":
        raise traced.ERRORS[found[1]](found[2])
    if query.shape[0] == 0:
        return nothing(met(query, key, tensors_of(mask), found[1]), key, value)
    return ring(query, key, value, tensors_of(mask), found[1])


def _over_heads(lying: Any, facts: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    lengths = traced.constant(query.shape[1]), traced.constant(key.shape[1])
    found = _exchange(lying, lengths, *facts)
    if found[0] == "refused":
        raise traced.ERRORS[found[1]](found[2])
    how, backend, queries, keys = Exchange(*found[1]), found[2], found[3], found[4]
    check_mask(mask, query, queries, keys)
    if query.shape[0] == 0:
        return nothing(met(query, key, tensors_of(mask), how.text), key, value)
    if how.rows is not None:
        mask = mask.expand(-1, -1, lengths[0], -1)
    if how.ring:
        return over_heads(how, query, key, value, mask, partial(_attend_in_ring, how.text))
    return over_heads(how, query, key, value, mask, partial(_attend_here, facts[4], how.return_lse, backend))


def _attend_in_ring(text: str, query: Any, key: Any, value: Any, mask: Any) -> Any:
    return ring(query, key, value, tensors_of(mask), text)


def _attend_here(
    checked: dict[str, Any], return_lse: bool, backend: str, query: Any, key: Any, value: Any, mask: Any
) -> Any:
    found = traced.attend(query, key, value, mask, checked, backend)
    return found if return_lse else (found, found.new_empty(0))


# --- what is decided while tracing: constants, from constants -------------------------------------------------------------


def _rows(handle: str, total: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """How a whole query is spread: the length on each rank, and this rank's segments."""
    cp = context(handle)
    layout = even(total, cp.ring, cp.ulysses, cp.order)
    return layout.flat, tuple((start, stop) for start, stop in layout.segments(*cp.place))


def _ring_kind(lying: Any, *facts: Any) -> tuple[Any, ...]:
    """("run", the text of the kind) or ("refused", which error, why)."""
    handle, whole_key, rows, _ = lying
    try:
        return "run", _kind(handle, *facts, query=rows, key=() if whole_key else None, keys=None).text
    except AttnError as error:
        return _refused(handle, error)


def _exchange(lying: Any, lengths: tuple[int, int], *facts: Any) -> tuple[Any, ...]:
    """("run", the exchange, the backend, how many queries and keys in all) or ("refused", which error, why)."""
    handle, whole_key, rows, _ = lying  # the last is what was told of lengths: Dynamo guards what is asked for alone
    cp = context(handle)
    try:
        query = rows
        if query is None:
            refuse_whole(cp, "query", lengths[0])
            query = _layout(cp, lengths[0]).flat
        if not whole_key:
            refuse_whole(cp, "key", lengths[1])
        key = () if whole_key else _layout(cp, lengths[1]).flat
        keys = lengths[1] if whole_key else sum(key)
        kind = _kind(handle, *facts, query=query, key=key, keys=keys)
        return "run", tuple(exchange_of(kind.text)), prepare(kind).backend, sum(query), keys
    except AttnError as error:
        return _refused(handle, error)


def _layout(cp: ContextParallel, local: int) -> Layout:
    """Of the last of the two sequences sharded last that this can be a part of: graphs are made anew when others were."""
    fitting = (layout for layout in cp.recent if layout.flat[cp.index] == local)
    return next(fitting, None) or cp.layout_of(local)


def _kind(
    handle: str,
    chosen: tuple[Any, str],
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    checked: dict[str, Any],
    mask: dict[str, Any],
    gradient: bool,
    query_gradient: bool | None,
    *,
    query: tuple[int, ...] | None,
    key: tuple[int, ...] | None,
    keys: int | None,
) -> Any:
    refuse_what_no_ring_has(
        dropout=checked["dropout_p"] > 0,
        mask_gradient=mask.get("mask_gradient", False),
        transformed=any(traced.transforms()),
    )
    reading.check_dtypes((dtype,), mask)
    once = mask.get("mask_broadcast")
    if once is not None and query is not None:
        once = (*once[:2], once[2] and 1 not in query, once[3])
    return kind_of(
        context(handle), chosen, device, dtype, (None, *sizes), checked, mask,
        gradient=gradient, query_gradient=query_gradient, query=query, key=key, keys=keys, mask_once=once,
        documents=READ_LATER if mask.get("mask") == "packed" else None,
    )  # fmt: skip


def _refused(handle: str, error: AttnError) -> tuple[str, str, str]:
    cp = context(handle)
    cp.shared.begin()
    note(cp, error)
    kind = type(error).__name__
    return "refused", kind if kind in traced.ERRORS else "AttnError", str(error)


# What torch.compiler.assume_constant_result does, without importing Dynamo for everybody.
_rows._dynamo_marked_constant = True  # type: ignore[attr-defined]
_ring_kind._dynamo_marked_constant = True  # type: ignore[attr-defined]
_exchange._dynamo_marked_constant = True  # type: ignore[attr-defined]
