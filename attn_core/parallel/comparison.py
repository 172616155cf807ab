"""Says in what the calls of ranks differ."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

ASKING = "lengths"
"""The stage of a call at which ranks ask each other how long its parts are."""

_TELL = "tell cp.shard or cp.layout(lengths=[...]) of the same sequences on every rank, before calls of their parts"
_STAGES = {
    ASKING: "asks the others how long its parts are, of which it was told nothing",
    None: "knows how long they all are",
}


def difference(said: Mapping[int, dict[str, Any]]) -> str:
    """In what the calls of ranks differ, by rank; empty where they are alike as far as they were described.

    Args:
        said: "stage", "kind" as ``Kind.described`` has it, and whatever else the ranks are held to.
    """
    asking = [one.get("stage") == ASKING for one in said.values()]
    if any(asking):
        return "" if all(asking) else _told_apart(said)
    described = {rank: _flat(one) for rank, one in said.items()}
    names = sorted({name for one in described.values() for name in one})
    differing = [name for name in names if _differs(name, described)]
    lengths = f" ({_TELL})" if {"query", "key"} & set(differing) else ""
    return "; ".join(f"{name}: {_by_rank(name, described)}" for name in differing) + lengths


def _told_apart(said: Mapping[int, dict[str, Any]]) -> str:
    parts = (f"rank {rank} {_STAGES[_asking(one)]}" for rank, one in said.items())
    return f"{', '.join(parts)} ({_TELL})"


def _asking(one: dict[str, Any]) -> str | None:
    return ASKING if one.get("stage") == ASKING else None


def _differs(name: str, described: Mapping[int, dict[str, Any]]) -> bool:
    return len({json.dumps(one.get(name)) for one in described.values()}) > 1


def _by_rank(name: str, described: Mapping[int, dict[str, Any]]) -> str:
    return ", ".join(f"{one.get(name)!r} on rank {rank}" for rank, one in described.items())


def _flat(one: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if name != "kind"} | (one.get("kind") or {})
