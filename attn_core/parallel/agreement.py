"""Makes sure, once for each kind of call, that every rank is about to make the same one and none refuses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_core.errors import AttnError, BackendNotUsable, CallRefused
from attn_core.parallel.comparison import ASKING, difference
from attn_core.parallel.context import context
from attn_core.parallel.faults import DIFFERENT, exchanged
from attn_core.parallel.kind import parsed
from attn_core.parallel.preparation import prepare
from attn_core.selection import graph_task

if TYPE_CHECKING:
    from attn_core.parallel.context import ContextParallel
    from attn_core.parallel.kind import Kind
    from attn_core.parallel.layout import Layout
    from attn_core.parallel.preparation import Prepared

KINDS_REMEMBERED = 1024
_ERRORS = {error.__name__: error for error in (CallRefused, BackendNotUsable)}


class RanksDisagree(CallRefused):
    """The ranks of a mesh made calls that do not belong together."""


def agreed(kind: str) -> Prepared:
    """What was prepared for a kind of call, once all ranks have agreed on it.

    Args:
        kind: its text.

    Raises:
        RanksDisagree: on every rank, when the kinds differ.
        CallRefused: on every rank, when the call is refused on any.
    """
    cp = context(kind.partition("\n")[0])
    found: Prepared | None = cp.shared.kinds.get(kind)
    if found is None:
        found = _agree(cp, parsed(kind))
        if len(cp.shared.kinds) >= KINDS_REMEMBERED:
            cp.shared.kinds.clear()
        cp.shared.kinds[kind] = found
    cp.shared.current = found
    return found


def begun(cp: ContextParallel) -> None:
    """Begin a call that compiled code makes, which counts itself when it runs; any other was begun where it was read.

    A backward, and what is recomputed in it, belongs to no new call.
    """
    if not cp.shared.going and graph_task() == -1:
        cp.shared.begin()


def _agree(cp: ContextParallel, kind: Kind) -> Prepared:
    refusal, prepared = None, None
    try:
        prepared = prepare(kind)
    except AttnError as error:
        refusal = [type(error).__name__, str(error)]
    said = {"stage": "kind", "kind": kind.described(), "refusal": refusal, "backend": prepared and prepared.backend}
    heard = exchange(cp, said)
    refusals = {rank: other["refusal"] for rank, other in zip(cp.ranks, heard, strict=True) if other["refusal"]}
    if refusals:
        raise _refused(cp, refusals)
    return prepared  # type: ignore[return-value]


def layouts(
    cp: ContextParallel, query: int, key: int, *, query_layout: Layout | None, whole_key: bool
) -> tuple[Layout, Layout | None]:
    """How the queries and the keys of a call lie, from what is known of lengths, or from what all ranks say.

    Args:
        cp: the ranks.
        query: how many this rank has.
        key: the same.
        query_layout: of the queries, where they were given whole and each rank has taken its part.
        whole_key: whether all keys are on every rank.

    Returns:
        Two layouts; None for whole keys.

    Raises:
        CallRefused: where a part is as long as a whole sequence that was sharded.
    """
    if query_layout is None:
        refuse_whole(cp, "query", query)
    if not whole_key:
        refuse_whole(cp, "key", key)
    known_query = query_layout or cp.known_layout(query)
    known_key = None if whole_key else cp.known_layout(key)
    if known_query is None or (known_key is None and not whole_key):
        said_query, said_key = agree_on_lengths(cp, query, key)
        return query_layout or said_query, None if whole_key else said_key
    return known_query, known_key


def refuse_whole(cp: ContextParallel, side: str, length: int) -> None:
    """Refuse what is rather a sequence that was sharded than a part of one."""
    if cp.looks_whole(length):
        msg = (
            f"{side}: found {length} positions, as many as a whole sequence that was sharded; accepted: this rank's "
            f"part, as cp.shard gives it; a part that is as long, once cp.layout(lengths=[...]) was told of it on every rank; or "
            f"parallel=cp.given_whole({side!r})"
        )
        raise CallRefused(msg)


def agree_on_lengths(cp: ContextParallel, query: int, key: int) -> tuple[Layout, Layout]:
    """How the queries and the keys of a call lie, from the lengths of the parts on every rank."""
    heard = exchange(cp, {"stage": ASKING, "query": query, "key": key})
    query_layout, key_layout = (cp.layout_on([one[side] for one in heard]) for side in ("query", "key"))
    return query_layout, key_layout


def exchange(cp: ContextParallel, said: dict[str, Any]) -> list[dict[str, Any]]:
    """What all ranks say at this point; refused on each where they are not at the same point or mean different calls."""
    cp.shared.exchanges += 1
    heard = exchanged(cp, said)
    refused = any(other.get("refusal") for other in heard)
    compared = ("stage", "kind") if refused else ("stage", "kind", "backend")
    said_by = {rank: {name: other.get(name) for name in compared} for rank, other in zip(cp.ranks, heard, strict=True)}
    found = difference(said_by)
    if found:
        raise RanksDisagree("parallel: " + DIFFERENT.format(found=found))
    return heard


def _refused(cp: ContextParallel, refusals: dict[int, list[str]]) -> AttnError:
    texts = {text for _, text in refusals.values()}
    kind, text = next(iter(refusals.values()))
    if len(refusals) < cp.size or len(texts) > 1:
        text = "; ".join(f"on rank {rank}: {said}" for rank, (_, said) in sorted(refusals.items()))
    return _ERRORS.get(kind, CallRefused)(text)
