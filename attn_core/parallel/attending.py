"""One call of attention spread over ranks: read, described, agreed on, and taken round the ring, over the heads, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_core import reading, selection
from attn_core.errors import BackendNotUsable, CallRefused
from attn_core.masks import KeyPadding, Packed
from attn_core.parallel.agreement import agree_on_lengths, agreed, refuse_whole
from attn_core.parallel.context import ContextParallel
from attn_core.parallel.faults import told
from attn_core.parallel.gathering import gathered, taken
from attn_core.parallel.heads import Spread, shares
from attn_core.parallel.kind import READ_LATER, Kind
from attn_core.parallel.layout import Layout, even
from attn_core.parallel.merge import wide
from attn_core.parallel.ring import ring
from attn_core.parallel.scope import suspended
from attn_core.parallel.ulysses import all_rows, spreads, to_heads, to_positions

if TYPE_CHECKING:
    from attn_core.parallel.layout import Segments


def parallel_attention(parallel: Any, query: Any, key: Any, value: Any, options: dict[str, Any], backend: Any) -> Any:
    """Attend to a sequence that is spread over ranks.

    Args:
        parallel: the ``ContextParallel`` of the call.
        query: this rank's part, or the whole where ``given_whole("query")``.
        key: this rank's part, or the whole.
        value: this rank's part, or the whole.
        options: of ``attention``, ``parallel`` excepted; masks are those of the whole sequence, a dense one has the rows
            of this rank's queries.
        backend: the names that the call allows, or None.

    Raises:
        CallRefused: on every rank, before anything is sent.
    """
    if not isinstance(parallel, ContextParallel):
        msg = f"parallel: found {parallel!r}; accepted: a ContextParallel of attn_core.parallel, or None"
        raise CallRefused(msg)
    parallel.shared.begin()
    with told(parallel):
        reading.check_tensors(query, key, value)
        checked = reading.checked_options({**options, "parallel": None})
        mask = options["attn_mask"]
        refuse_what_no_ring_has(
            dropout=checked["dropout_p"] > 0,
            mask_gradient=isinstance(mask, torch.Tensor) and reading.needs_graph(mask),
            transformed=torch._C._are_functorch_transforms_active() or reading.has_tangent(query, key, value, mask),
        )
        choice, chosen_by = _choice(backend)
        attn_mask = options["attn_mask"]
        autocast = reading.autocast_dtype(query.device.type)
        if autocast is not None:
            query, key, value, attn_mask = (reading.cast(item, autocast) for item in (query, key, value, attn_mask))
        reading.check_dtypes((query.dtype, key.dtype, value.dtype), reading.mask_facts(attn_mask, None))
    call = _Call(parallel, query, key, value, attn_mask, checked, (choice, chosen_by))
    with torch.autocast(query.device.type, enabled=False) if autocast is not None else _NOTHING:
        return call.run()


def refuse_what_no_ring_has(*, dropout: bool, mask_gradient: bool, transformed: bool) -> None:
    """Refuse what has no meaning across ranks, or none that the pieces of a kernel could give."""
    step = "Compute this call on one device, or leave it out"
    if dropout:
        msg = (
            "dropout_p: not supported in context parallel: ranks of one seed would drop alike what one device drops "
            f"independently, and a backward from the lse of all keys can't repeat a kernel's draw. {step}"
        )
        raise CallRefused(msg)
    if mask_gradient:
        msg = (
            "attn_mask: a mask that requires a gradient is not supported in context parallel: kernels return the gradients of "
            f"query, key and value alone from the lse of all keys. {step}, or detach the mask"
        )
        raise CallRefused(msg)
    if transformed:
        msg = f"parallel: transforms of torch.func and forward mode are not supported in context parallel. {step}"
        raise CallRefused(msg)


def _choice(backend: Any) -> tuple[Any, str]:
    if backend is not None:
        return selection.normalized(backend), "backend="
    if selection.traced_scopes:
        raise BackendNotUsable(selection.SUSPENDED)
    choice = selection.in_force()
    if selection.checkpointing():
        choice = selection.consistent_choice(choice)
    selection.note_used(choice)
    return choice, selection.origin()


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


_NOTHING = _Nothing()


class _Call:
    """A call that has been read."""

    def __init__(
        self,
        cp: ContextParallel,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any,
        checked: dict[str, Any],
        chosen: tuple[Any, str],
    ) -> None:
        self.cp, self.query, self.key, self.value, self.attn_mask = cp, query, key, value, attn_mask
        self.checked, self.chosen = checked, chosen

    def run(self) -> Any:
        """The result, and its lse where asked."""
        whole_query = "query" in self.cp.whole
        if whole_query:
            rows = even(self.query.shape[1], self.cp.ring, self.cp.ulysses, self.cp.order)
            self._take_rows(rows.segments(*self.cp.place), self.query.shape[1])
        with told(self.cp):
            query_layout, key_layout = self._layouts(rows if whole_query else None)
        kind = self._kind(query_layout, key_layout)
        if kind.batch == 0:
            out, lse = self._empty()
        elif kind.mode == "ring":
            out, lse = ring(self.query, self.key, self.value, _tensors(self.attn_mask), kind.text)
        else:
            out, lse = self._over_heads(kind)
        if whole_query:
            out = gathered(self.cp, out, 1, rows)
            lse = gathered(self.cp, lse, 2, rows) if kind.return_lse else lse
        return (out, lse.detach()) if kind.return_lse else out

    def _take_rows(self, segments: Segments, queries: int) -> None:
        self.query = taken(self.query, 1, segments)
        mask = self.attn_mask
        if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[2] == queries > 1:
            self.attn_mask = taken(mask, 2, segments)

    def _layouts(self, query_layout: Layout | None) -> tuple[Layout, Layout | None]:
        """How queries and keys lie, from what is known of lengths, or from what all ranks say."""
        query, key = self.query.shape[1], self.key.shape[1]
        whole_key = "key" in self.cp.whole
        sides = [("query", query)] if query_layout is None else []
        sides += [] if whole_key else [("key", key)]
        for side, length in sides:
            refuse_whole(self.cp, side, length)
        known_query = query_layout or self.cp.known_layout(query)
        known_key = None if whole_key else self.cp.known_layout(key)
        if known_query is None or (known_key is None and not whole_key):
            said_query, said_key = agree_on_lengths(self.cp, query, key)
            return query_layout or said_query, None if whole_key else said_key
        return known_query, known_key

    def _kind(self, query_layout: Layout, key_layout: Layout | None) -> Kind:
        query, key, value, mask = self.query, self.key, self.value, self.attn_mask
        keys = key.shape[1] if key_layout is None else key_layout.total
        with told(self.cp):
            self._check_mask(query_layout.total, keys)
        if isinstance(mask, torch.Tensor) and 1 in query_layout.flat:
            # a rank of one query can't tell its row from one row for all
            mask = self.attn_mask = mask.expand(-1, -1, query.shape[1], -1)
        scale = self.checked["scale"]
        facts = reading.mask_facts(mask, None)
        return Kind(
            context=self.cp.name,
            mode=self.cp.mode,
            ring=self.cp.ring,
            ulysses=self.cp.ulysses,
            order=self.cp.order,
            query=query_layout.flat,
            key=() if key_layout is None else key_layout.flat,
            keys=keys,
            choice=selection.listed(self.chosen[0]),
            chosen_by=self.chosen[1],
            device=query.device.type,
            dtype=reading.dtype_name(query.dtype),
            batch=query.shape[0],
            heads=query.shape[2],
            key_heads=key.shape[2],
            head_dim=query.shape[3],
            value_head_dim=value.shape[3],
            causal=self.checked["causal"],
            window_size=self.checked["window_size"],
            softcap=self.checked["softcap"],
            scale=reading.default_scale(query.shape[3]) if scale is None else scale,
            deterministic=self.checked["deterministic"],
            return_lse=self.checked["return_lse"],
            gradient=reading.needs_graph(query, key, value),
            mask=facts.get("mask", "none"),
            mask_dtype=facts.get("mask_dtype"),
            mask_once=_once(mask, query_layout),
            documents=_documents(mask),
        )

    def _check_mask(self, queries: int, keys: int) -> None:
        """Refuse a mask that is not of the whole sequence."""
        mask, query = self.attn_mask, self.query
        if mask is None:
            return
        if isinstance(mask, KeyPadding):
            found, accepted = tuple(mask.keep.shape), (query.shape[0], keys)
            what = "KeyPadding of shape"
        elif isinstance(mask, Packed):
            if query.shape[0] != 1:
                msg = f"attn_mask: Packed with a batch of {query.shape[0]}; accepted: sequences laid end to end in a batch of 1"
                raise CallRefused(msg)
            found, accepted = mask.totals or (queries, keys), (queries, keys)
            what = "Packed sequences that end with"
        elif isinstance(mask, torch.Tensor):
            _check_dense(mask, (query.shape[0], query.shape[2], query.shape[1], keys))
            return
        else:
            reading.check_mask(mask, query, self.key)
            return
        if found != accepted:
            msg = f"attn_mask: found {what} {found}; accepted: {accepted}, those of the whole sequence on every rank"
            raise CallRefused(msg)
        if mask.tensors[0].device != query.device:
            msg = f"attn_mask: found on {mask.tensors[0].device}; accepted: the device of query, {query.device}"
            raise CallRefused(msg)

    def _empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, heads, _ = self.query.shape
        out = self.query.new_zeros(batch, length, heads, self.value.shape[3])
        out = out + (self.query.sum() + self.key.sum() + self.value.sum()).to(out.dtype)  # joined to the graph
        return out, self.query.new_zeros(batch, heads, length, dtype=wide(self.query.dtype))

    # --- over heads ---------------------------------------------------------------------------------------------------

    def _over_heads(self, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
        lying = spreads(kind)
        spread, text = lying["query"], kind.text
        if "key" in lying:
            tensors, key_spread = [self.query, self.key, self.value], lying["key"]
            query, key, value = to_heads(tensors, [spread, key_spread, key_spread], text)
        else:
            query = to_heads([self.query], [spread], text)[0]
            heads = _key_heads(kind)
            key, value = self.key[:, :, heads], self.value[:, :, heads]
        mask = self._mask_of_heads(kind, spread)
        if query.shape[2] == 0:
            out, lse = _no_heads(query, key, value)
        elif kind.mode == "hybrid":
            out, lse = ring(query, key, value, _tensors(mask), text)
        else:
            with told(self.cp), suspended():
                out, lse = self._attend(kind, query, key, value, mask)
        out = to_positions([out], [spread], text)[0]
        if not kind.return_lse:
            return out, lse
        lse = to_positions([lse.detach().transpose(1, 2)[..., None]], [spread], text)[0]
        return out, lse[..., 0].transpose(1, 2).contiguous()

    def _mask_of_heads(self, kind: Kind, spread: Spread) -> Any:
        """The mask for all rows of this rank's ulysses group, and for the heads that it computes."""
        mask = self.attn_mask
        if not isinstance(mask, torch.Tensor):
            return mask
        heads = spread.heads[self.cp.place[1]]
        if kind.mask_once is not None and not kind.mask_once[2]:
            mask = all_rows(mask, list(spread.lengths), kind.text)
        return mask[:, heads.start : heads.stop] if mask.shape[1] > 1 else mask

    def _attend(self, kind: Kind, query: Any, key: Any, value: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        from attn_core.call import attention

        found: Any = attention(
            query, key, value, attn_mask=mask, causal=kind.causal, scale=kind.scale, window_size=kind.window_size,
            softcap=kind.softcap, deterministic=kind.deterministic, return_lse=kind.return_lse,
            backend=agreed(kind.text).backend,
        )  # fmt: skip
        return found if kind.return_lse else (found, found.new_empty(0))


def _tensors(mask: Any) -> list[torch.Tensor]:
    if mask is None:
        return []
    return [mask] if isinstance(mask, torch.Tensor) else list(mask.tensors)


def _documents(mask: Any) -> Any:
    if not isinstance(mask, Packed):
        return None
    lengths_q, lengths_k = mask.lengths_q, mask.lengths_k
    return READ_LATER if lengths_q is None or lengths_k is None else (tuple(lengths_q), tuple(lengths_k))


def _check_dense(mask: torch.Tensor, full: tuple[int, ...]) -> None:
    if mask.ndim != 4 or not all(found in (1, wanted) for found, wanted in zip(mask.shape, full, strict=True)):
        msg = (
            f"attn_mask: found shape {tuple(mask.shape)}; accepted: 4 dimensions, broadcastable to {full}: the rows of this "
            "rank's queries, as cp.shard(mask, dim=2) gives them, and the columns of all keys in their order"
        )
        raise CallRefused(msg)


def _key_heads(kind: Kind) -> slice:
    share = shares(kind.heads, kind.key_heads, kind.cp.ulysses)[kind.cp.place[1]]
    return slice(*share.keys)


def _no_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of a place without heads: nothing, but joined to the graph, since the backward is an exchange of all."""
    batch, length = query.shape[:2]
    out = query.new_zeros(batch, length, 0, value.shape[3]) + (query.sum() + key.sum() + value.sum())
    return out, query.new_zeros(batch, 0, length, dtype=wide(query.dtype))


def _once(mask: Any, queries: Layout) -> tuple[bool, ...] | None:
    """Which dimensions a dense mask gives once for all, alike on every rank."""
    if not isinstance(mask, torch.Tensor):
        return None
    batch, heads, rows, keys = mask.shape
    return batch == 1, heads == 1, rows == 1 and 1 not in queries.flat, keys == 1
