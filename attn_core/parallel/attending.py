"""One call of attention spread over ranks: read, described, agreed on, and taken round the ring, over the heads, or both."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attn_core import reading, selection
from attn_core.errors import BackendNotUsable, CallRefused
from attn_core.parallel.agreement import agreed, layouts
from attn_core.parallel.completion import check_mask, documents, once
from attn_core.parallel.context import ContextParallel
from attn_core.parallel.faults import alone, told
from attn_core.parallel.gathering import gathered, taken
from attn_core.parallel.holding import nothing
from attn_core.parallel.kind import Kind
from attn_core.parallel.layout import even
from attn_core.parallel.ring import ring
from attn_core.parallel.scope import suspended
from attn_core.parallel.ulysses import exchange_of, over_heads
from attn_core.running import watching

if TYPE_CHECKING:
    from attn_core.loading import Adapter
    from attn_core.parallel.layout import Layout, Segments


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
    with alone(parallel):
        parallel.shared.begin()
        parallel.shared.going = True
        try:
            return _read(parallel, query, key, value, options, backend)
        finally:
            parallel.shared.going = False


def _read(parallel: ContextParallel, query: Any, key: Any, value: Any, options: dict[str, Any], backend: Any) -> Any:
    with told(parallel):
        _refuse_distributed(query=query, key=key, value=value, attn_mask=options["attn_mask"])
        reading.check_tensors(query, key, value)
        checked = reading.checked_options(options)
        attn_mask = options["attn_mask"]
        transformed = torch._C._are_functorch_transforms_active() or reading.has_tangent(query, key, value, attn_mask)
        masked_gradient = isinstance(attn_mask, torch.Tensor) and reading.needs_graph(attn_mask)
        refuse_what_no_ring_has(
            dropout=checked["dropout_p"] > 0, mask_gradient=masked_gradient, transformed=transformed
        )
        choice, chosen_by = _choice(backend)
        autocast = reading.autocast_dtype(query.device.type)
        if autocast is not None:
            query, key, value, attn_mask = (reading.cast(item, autocast) for item in (query, key, value, attn_mask))
        reading.check_dtypes((query.dtype, key.dtype, value.dtype), reading.mask_facts(attn_mask, None))
    call = _Call(parallel, query, key, value, attn_mask, checked, (choice, chosen_by))
    with torch.autocast(query.device.type, enabled=False) if autocast is not None else nullcontext():
        return call.run()


def _refuse_distributed(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if type(tensor) is not torch.Tensor and hasattr(tensor, "to_local"):
            msg = (
                f"{name}: found a {type(tensor).__name__}; accepted: this rank's part as a tensor of its own, "
                f"{name}.to_local() where it lies as cp.shard would have it"
            )
            raise CallRefused(msg)


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
    return choice, selection.FROM_ELSEWHERE


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
            query_layout, key_layout = layouts(
                self.cp,
                self.query.shape[1],
                self.key.shape[1],
                query_layout=rows if whole_query else None,
                whole_key="key" in self.cp.whole,
            )
        kind = self._kind(query_layout, key_layout)
        if kind.batch == 0:
            agreed(kind.text)  # or the others would wait for this rank
            out, lse = nothing(self.query, self.key, self.value)
        elif kind.mode == "ring":
            out, lse = ring(self.query, self.key, self.value, tensors_of(self.attn_mask), kind.text)
        else:
            out, lse = over_heads(
                exchange_of(kind.text), self.query, self.key, self.value, self.attn_mask, partial(self._attend, kind)
            )
        if whole_query:
            out = gathered(self.cp, out, 1, rows)
            lse = gathered(self.cp, lse, 2, rows) if kind.return_lse else lse
        return (out, lse.detach()) if kind.return_lse else out

    def _take_rows(self, segments: Segments, queries: int) -> None:
        self.query = taken(self.query, 1, segments)
        mask = self.attn_mask
        if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[2] == queries > 1:
            self.attn_mask = taken(mask, 2, segments)

    def _kind(self, query_layout: Layout, key_layout: Layout | None) -> Kind:
        query, key, value, mask = self.query, self.key, self.value, self.attn_mask
        keys = key.shape[1] if key_layout is None else key_layout.total
        with told(self.cp):
            check_mask(mask, query, query_layout.total, keys)
        if isinstance(mask, torch.Tensor) and 1 in query_layout.flat:
            # a rank of one query can't tell its row from one row for all
            mask = self.attn_mask = mask.expand(-1, -1, query.shape[1], -1)
        return kind_of(
            self.cp,
            self.chosen,
            query.device,
            query.dtype,
            (query.shape[0], query.shape[2], key.shape[2], query.shape[3], value.shape[3]),
            self.checked,
            reading.mask_facts(mask, None),
            gradient=reading.needs_graph(query, key, value),
            query_gradient=query_gradient(self.cp.mode, query, whole_key=key_layout is None),
            query=query_layout.flat,
            key=() if key_layout is None else key_layout.flat,
            keys=keys,
            mask_once=once(mask, query_layout.flat),
            documents=documents(mask),
        )

    def _attend(self, kind: Kind, query: Any, key: Any, value: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """One call on this rank for its heads, or a ring."""
        if kind.mode == "hybrid":
            out, lse = ring(query, key, value, tensors_of(mask), kind.text)
            return out, lse
        token = watching.set(self._watch)
        try:
            with told(self.cp), suspended():
                return self._on_this_rank(kind, query, key, value, mask)
        finally:
            watching.reset(token)

    def _watch(self, adapter: Adapter) -> Adapter:
        """The adapter with a backward whose failure the others are told of."""
        return replace(adapter, backward=partial(_told, self.cp, adapter.backward))

    def _on_this_rank(
        self, kind: Kind, query: Any, key: Any, value: Any, mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from attn_core.call import attention

        found: Any = attention(
            query, key, value, attn_mask=mask, causal=kind.causal, scale=kind.scale, window_size=kind.window_size,
            softcap=kind.softcap, deterministic=kind.deterministic, return_lse=kind.return_lse,
            backend=agreed(kind.text).backend,
        )  # fmt: skip
        return found if kind.return_lse else (found, found.new_empty(0))


def _told(cp: ContextParallel, run: Any, *tensors: torch.Tensor, **options: Any) -> Any:
    with told(cp):
        return run(*tensors, **options)


def kind_of(
    cp: ContextParallel,
    chosen: tuple[Any, str],
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int | None, int, int, int, int],
    checked: dict[str, Any],
    mask: dict[str, Any],
    **known: Any,
) -> Kind:
    """The kind of a call.

    Args:
        cp: the ranks.
        chosen: the choice of backend, and who chose.
        device: of the tensors.
        dtype: of query, key and value.
        sizes: batch, heads, key heads, head dim, head dim of value.
        checked: the options.
        mask: its facts.
        known: further fields of ``Kind``.
    """
    batch, heads, key_heads, head_dim, value_head_dim = sizes
    options = {name: checked[name] for name in _OPTIONS}
    if options["scale"] is None:
        options["scale"] = reading.default_scale(head_dim)
    return Kind(
        context=cp.handle,
        mode=cp.mode,
        ring=cp.ring,
        ulysses=cp.ulysses,
        order=cp.order,
        choice=selection.listed(chosen[0]),
        chosen_by=chosen[1],
        device=device.type,
        dtype=reading.dtype_name(dtype),
        batch=batch,
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        mask=mask.get("mask", "none"),
        mask_dtype=mask.get("mask_dtype"),
        **options,
        **known,
    )


def query_gradient(mode: str, query: torch.Tensor, *, whole_key: bool) -> bool | None:
    """What ``Kind`` has of it."""
    return reading.needs_graph(query) if whole_key and mode != "ring" else None


_OPTIONS = ("causal", "window_size", "softcap", "scale", "deterministic", "return_lse")


def tensors_of(mask: Any) -> list[torch.Tensor]:
    """What a mask is made of."""
    if mask is None:
        return []
    return [mask] if isinstance(mask, torch.Tensor) else list(mask.tensors)
