"""What a call is to all ranks alike: the description that they agree on, and that the operators are given as text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from attn_core.parallel.context import context
from attn_core.parallel.layout import Layout, Segment
from attn_core.parallel.sight import Document, Sight

if TYPE_CHECKING:
    from attn_core.parallel.context import ContextParallel

READ_LATER = "read"
"""Of ``documents``: the offsets are tensors of compiled code, and read when it runs."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of call, without tensors; every field but ``context`` is the same on every rank.

    Attributes:
        context: the handle of its ``ContextParallel``.
        mode: ring, ulysses or hybrid.
        ring: how many places the ring has.
        ulysses: how many places share the heads.
        order: of the sequence in the ring.
        query: the length of the queries on each rank, in the order of the grid; None in compiled code for any length, which
            reads it when it runs.
        key: the same of the keys; empty where keys are whole.
        keys: the length of the whole keys; None where ``key`` is.
        choice: the backends that the call allows, in order.
        device: the type of device.
        mask: kind of the mask, as ``Facts`` has it.
        mask_once: which of (B, Hq, Sq, Skv) a dense mask gives once for all.
        documents: lengths of the packed sequences, of queries and of keys; None where there are none, or ``READ_LATER``.
        gradient: whether a gradient may be asked for.
        query_gradient: whether one of the queries, where they are exchanged for heads without the keys; ranks that want none
            have no part in the exchange of the backward.
    """

    context: str
    mode: str
    ring: int
    ulysses: int
    order: str
    query: tuple[int, ...] | None
    key: tuple[int, ...] | None
    keys: int | None
    choice: tuple[str, ...]
    chosen_by: str
    device: str
    dtype: str
    batch: int | None
    heads: int
    key_heads: int
    head_dim: int
    value_head_dim: int
    causal: bool
    window_size: tuple[int, int] | None
    softcap: float | None
    scale: float
    deterministic: bool
    return_lse: bool
    gradient: bool
    mask: str = "none"
    mask_dtype: str | None = None
    mask_once: tuple[bool, ...] | None = None
    documents: tuple[tuple[int, ...], tuple[int, ...]] | str | None = None
    query_gradient: bool | None = None

    @property
    def text(self) -> str:
        """For the operators; ``parsed`` reads it."""
        return _text(self)

    @property
    def cp(self) -> ContextParallel:
        """The ranks."""
        return context(self.context)

    @property
    def query_layout(self) -> Layout:
        """How the queries lie."""
        return self._layout(self.query or ())

    @property
    def key_layout(self) -> Layout | None:
        """How the keys lie; None where they are whole."""
        return self._layout(self.key) if self.key else None

    @property
    def sight(self) -> Sight:
        """What hides keys by position."""
        whole = Document(Segment(0, sum(self.query or ())), Segment(0, self.keys or 0))
        documents = (whole,) if self.documents is None else _documents(self.documents)
        return Sight(self.causal, self.window_size, documents)

    def _layout(self, lengths: tuple[int, ...]) -> Layout:
        rows = tuple(
            lengths[start : start + self.ulysses] for start in range(0, self.ring * self.ulysses, self.ulysses)
        )
        return Layout(rows, self.order)

    def described(self) -> dict[str, Any]:
        """As plain data, alike on all ranks."""
        return asdict(self) | {"context": self.cp.name}


@lru_cache(maxsize=1024)
def _text(kind: Kind) -> str:
    return f"{kind.context}\n{json.dumps(asdict(kind))}"


@lru_cache(maxsize=1024)
def parsed(text: str) -> Kind:
    """The kind that a text describes."""
    fields = json.loads(text.partition("\n")[2])
    return Kind(**{name: _frozen(value) for name, value in fields.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _documents(lengths: Any) -> tuple[Document, ...]:
    query, key, found = 0, 0, []
    for queries, keys in zip(*lengths, strict=True):
        found.append(Document(Segment(query, query + queries), Segment(key, key + keys)))
        query, key = query + queries, key + keys
    return tuple(found)
