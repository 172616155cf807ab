"""Finds the backend for a kind of call and plans its course, from what is known on every rank alike."""

from __future__ import annotations

import inspect
import json
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from attn_core import loading, registry
from attn_core.admission import Refused, refusal, refusals
from attn_core.declaration import ContextParallelSupport, No
from attn_core.errors import AttnError
from attn_core.facts import Facts
from attn_core.parallel.heads import shares
from attn_core.parallel.kind import READ_LATER
from attn_core.parallel.layout import Segment
from attn_core.parallel.sight import course
from attn_core.reading import device_facts, lengths_relation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attn_core.declaration import BackendSpec
    from attn_core.loading import Adapter
    from attn_core.parallel.kind import Kind
    from attn_core.parallel.layout import Segments
    from attn_core.parallel.sight import Course, Piece


@dataclass(frozen=True)
class Prepared:
    """A kind of call with the backend that runs it.

    Attributes:
        kind: the call.
        backend: the name of the backend.
        adapter: its functions.
    """

    kind: Kind
    backend: str
    adapter: Adapter

    @cached_property
    def tag(self) -> int:
        """A number for the messages of such calls, so that those of different kinds are never taken for one another."""
        return zlib.crc32(json.dumps(self.kind.described()).encode()) >> 1

    @cached_property
    def course(self) -> Course:
        """How the keys go round."""
        return course_of(self.kind)

    @cached_property
    def key_pieces(self) -> tuple[Segments, ...]:
        """What each chunk of keys holds."""
        return key_pieces(self.kind)

    @cached_property
    def key_lengths(self) -> tuple[int, ...]:
        """How many positions each chunk of keys has."""
        return tuple(sum(segment.length for segment in segments) for segments in self.key_pieces)

    @cached_property
    def options(self) -> dict[str, Any]:
        """What every piece is called with."""
        kind = self.kind
        softcap = {} if kind.softcap is None else {"softcap": kind.softcap}
        return {"scale": kind.scale, **softcap}

    @cached_property
    def deterministic(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What asks the forward, and the backward where it takes it, for the same bits twice."""
        if not self.kind.deterministic:
            return {}, {}
        asked = {"deterministic": True}
        with suppress(TypeError, ValueError):
            if "deterministic" not in inspect.signature(self.adapter.backward or print).parameters:
                return asked, {}
        return asked, asked


def prepare(kind: Kind) -> Prepared:
    """Find the first of the backends that the call allows that admits all of it, on every rank.

    Raises:
        BackendNotUsable: none can be used here.
        CallRefused: those that can be used refuse the call; the message has every reason.
    """
    refused: dict[str, AttnError] = {}
    for name in kind.choice:
        try:
            row = registry.find(name)
            reasons = reasons_against(row.spec, kind)  # type: ignore[arg-type] # a row that is found has one
            if reasons:
                raise Refused(row.name, reasons, _accepting(kind, row.name))
            return Prepared(kind, row.qualified_name or row.name, loading.load(row.spec))  # type: ignore[arg-type]
        except AttnError as error:
            refused[name] = error
    raise refusal(refused, kind.chosen_by, f"can run this call in {kind.mode}")


def reasons_against(spec: BackendSpec, kind: Kind, device: dict[str, Any] | None = None) -> list[str]:
    """Why a backend refuses a kind of call; empty where it admits it. ``device`` has facts of one that need not be here."""
    support = spec.context_parallel
    ability = getattr(support, kind.mode) if isinstance(support, ContextParallelSupport) else support
    if isinstance(ability, No):
        return [f"context parallel: {kind.mode}: not supported: {ability}"]
    if kind.mode != "ulysses" and kind.gradient and spec.backward is None:
        why = "its declaration names no backward that takes the result and the log-sum-exp of all keys"
        return [f"context parallel: {kind.mode}: backward: not supported: {why}"]
    return list(dict.fromkeys(reason for facts in facts_of(kind, device) for reason in refusals(spec, facts)))


def _accepting(kind: Kind, name: str) -> list[str]:
    return [
        row.name
        for row in registry.rows()
        if row.status == registry.AVAILABLE
        and row.spec is not None
        and row.name != name
        and not row.spec.numerics.approximate
        and not reasons_against(row.spec, kind)
    ]


# --- the calls that a kind consists of ----------------------------------------------------------------------------------


def course_of(kind: Kind) -> Course:
    """How the keys go round, and who computes what of them when."""
    return course(kind.query_layout, key_pieces(kind), kind.sight, rotating=bool(kind.key) and kind.ring > 1)


def key_pieces(kind: Kind) -> tuple[Segments, ...]:
    """What each chunk of keys holds; everything, each of them, where keys are whole."""
    layout = kind.key_layout
    if layout is not None:
        return layout.pieces
    return ((Segment(0, kind.keys or 0),),) * kind.ring


def facts_of(kind: Kind, device: dict[str, Any] | None = None) -> Iterator[Facts]:
    """The facts of every call that some rank makes."""
    places = shares(kind.heads, kind.key_heads, kind.ulysses)
    heads = {(share.queries.length, share.keys.length) for share in places if share.queries.length}
    device = device_facts(torch.device(kind.device)) if device is None else device
    mask: dict[str, Any] = {"mask": kind.mask}
    if kind.mask_once is not None:
        mask |= {"mask_broadcast": kind.mask_once, "mask_dtype": kind.mask_dtype}
    calls = _whole_call(kind) if kind.mode == "ulysses" else _calls(kind)
    if kind.mode != "ulysses" and kind.mask == "packed":
        mask = {}
    for query_heads, key_heads in sorted(heads):
        for lengths, causal, window in calls:
            yield Facts(
                **device,
                **mask,
                dtype=kind.dtype,
                head_dim=kind.head_dim,
                value_head_dim=kind.value_head_dim,
                heads=query_heads,
                key_heads=key_heads,
                lengths=lengths,
                causal=causal,
                window_size=window,
                softcap=kind.softcap is not None,
                deterministic=kind.deterministic,
                return_lse=kind.return_lse or kind.mode != "ulysses",
                backward=kind.gradient,
            )


def _whole_call(kind: Kind) -> list[tuple[str, bool, tuple[int, int] | None]]:
    return [(lengths_relation(sum(kind.query or ()), kind.keys or 0), kind.causal, kind.window_size)]


def _calls(kind: Kind) -> list[tuple[str, bool, tuple[int, int] | None]]:
    """How lengths relate, causal and window of each piece that any rank computes, each once."""
    if kind.documents == READ_LATER:
        return []
    pieces = (piece for steps in course_of(kind).steps for step in steps for piece in step)
    return list(dict.fromkeys(map(_shape, pieces)))


def _shape(piece: Piece) -> tuple[str, bool, tuple[int, int] | None]:
    return lengths_relation(piece.queries.length, piece.keys.length), piece.causal, piece.window
