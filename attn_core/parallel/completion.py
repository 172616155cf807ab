"""Holds masks to the whole sequence, and completes, when compiled code runs, what could not be read while it was traced."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attn_core import reading
from attn_core.errors import CallRefused
from attn_core.masks import KeyPadding, Packed
from attn_core.parallel.agreement import layouts
from attn_core.parallel.faults import told
from attn_core.parallel.kind import READ_LATER, parsed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attn_core.parallel.kind import Kind
    from attn_core.parallel.layout import Layout


def completed(
    text: str, query: torch.Tensor, key: torch.Tensor, mask: Sequence[torch.Tensor], lengths: Sequence[int] = ()
) -> str:
    """The kind of a call with everything in it; as it is where it comes from a call that is not compiled.

    Args:
        text: of the kind.
        query: this rank's.
        key: this rank's, or all.
        mask: what the mask is made of.
        lengths: ``lengths_of`` the forward, in its backward, which does not ask the other ranks again.
    """
    kind = parsed(text)
    if kind.batch is not None and kind.documents != READ_LATER:
        return text
    cp = kind.cp
    with told(cp):
        if kind.keys is None:
            query_layout, key_layout = _layouts(kind, query.shape[1], key.shape[1], lengths)
            kind = replace(
                kind,
                query=query_layout.flat,
                key=() if key_layout is None else key_layout.flat,
                keys=key.shape[1] if key_layout is None else key_layout.total,
            )
        found = _written(kind, mask)
        queries = kind.query or ()
        check_mask(found, query, sum(queries), kind.keys or 0)
        return replace(kind, batch=query.shape[0], documents=documents(found), mask_once=once(found, queries)).text


def _layouts(kind: Kind, query: int, key: int, lengths: Sequence[int]) -> tuple[Layout, Layout | None]:
    cp, whole_key = kind.cp, kind.key == ()
    if lengths:
        return cp.layout_on(lengths[: cp.size]), None if whole_key else cp.layout_on(lengths[cp.size :])
    query_layout = None if kind.query is None else kind.query_layout
    return layouts(cp, query, key, query_layout=query_layout, whole_key=whole_key)


def lengths_of(kind: Kind) -> list[int]:
    """How long the queries are on each rank, and the keys where they are sharded."""
    return [*(kind.query or ()), *(kind.key or ())]


def how_many_lengths(kind: Kind) -> int:
    """How many ``lengths_of`` has that are read when compiled code runs."""
    if kind.keys is not None:
        return 0
    return kind.cp.size * (1 if kind.key == () else 2)


def with_batch(text: str, tensor: torch.Tensor) -> str:
    """The kind of a call with its batch in it."""
    kind = parsed(text)
    return text if kind.batch is not None else replace(kind, batch=tensor.shape[0]).text


def _written(kind: Kind, mask: Sequence[torch.Tensor]) -> Any:
    """The mask as the caller wrote it."""
    if not mask:
        return None
    return {"key_padding": KeyPadding, "packed": Packed}.get(kind.mask, lambda dense: dense)(*mask)


def documents(mask: Any) -> Any:
    """The lengths of packed sequences; None where there are none, ``READ_LATER`` where they can't be read yet."""
    if not isinstance(mask, Packed):
        return None
    lengths_q, lengths_k = mask.lengths_q, mask.lengths_k
    return READ_LATER if lengths_q is None or lengths_k is None else (tuple(lengths_q), tuple(lengths_k))


def once(mask: Any, queries: Sequence[int]) -> tuple[bool, ...] | None:
    """Which dimensions a dense mask gives once for all, alike on every rank.

    A rank of one query can't tell its row from one row for all.
    """
    if not isinstance(mask, torch.Tensor):
        return None
    batch, heads, rows, keys = mask.shape
    return batch == 1, heads == 1, rows == 1 and 1 not in queries, keys == 1


def check_mask(mask: Any, query: torch.Tensor, queries: int, keys: int) -> None:
    """Refuse a mask that is not of the whole sequence.

    Args:
        mask: of the call.
        query: this rank's part.
        queries: how many there are on all ranks.
        keys: the same.
    """
    if mask is None:
        return
    found: Any
    accepted: Any = (query.shape[0], keys)
    if isinstance(mask, KeyPadding):
        found, what = tuple(mask.keep.shape), "KeyPadding of shape"
    elif isinstance(mask, Packed):
        if query.shape[0] != 1:
            msg = f"attn_mask: Packed with a batch of {query.shape[0]}; accepted: sequences laid end to end in a batch of 1"
            raise CallRefused(msg)
        accepted = (queries, keys)
        found, what = mask.totals or accepted, "Packed sequences that end with"
    elif isinstance(mask, torch.Tensor):
        _check_dense(mask, (query.shape[0], query.shape[2], query.shape[1], keys))
        return
    else:
        reading.check_mask(mask, query, query)
        return
    if found != accepted:
        msg = f"attn_mask: found {what} {found}; accepted: {accepted}, those of the whole sequence on every rank"
        raise CallRefused(msg)
    if mask.tensors[0].device != query.device:
        msg = f"attn_mask: found on {mask.tensors[0].device}; accepted: the device of query, {query.device}"
        raise CallRefused(msg)


def _check_dense(mask: torch.Tensor, full: tuple[int, ...]) -> None:
    if mask.ndim != 4 or not all(found in (1, wanted) for found, wanted in zip(mask.shape, full, strict=True)):
        msg = (
            f"attn_mask: found shape {tuple(mask.shape)}; accepted: 4 dimensions, broadcastable to {full}: the rows of this "
            "rank's queries, as cp.shard(mask, dim=2) gives them, and the columns of all keys in their order"
        )
        raise CallRefused(msg)
