"""What ranks say to each other beside their data: that one has failed, and what each is about to do.

It goes by way of the store that the process group was made with, which answers while the group itself waits.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from attn_core.errors import AttnError, CallRefused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from attn_core.parallel.context import ContextParallel

_PAUSE = 0.001
_LONGEST_PAUSE = 0.05


class RankFailed(AttnError):  # noqa: N818 - it reads as what happened
    """Another rank failed, or does not answer."""


def store() -> Any:
    """The store of the default process group."""
    return distributed_c10d._get_default_store()


def timeout_of(cp: ContextParallel) -> float:
    """How many seconds the group waits."""
    group = cp.group("ring") or cp.group("ulysses")
    with suppress(AttributeError, IndexError, RuntimeError):
        return float(group._get_backend(group._device_types[0]).options._timeout.total_seconds())
    return float(distributed_c10d.default_pg_timeout.total_seconds())


def note(cp: ContextParallel, error: BaseException) -> None:
    """Tell the others why this rank takes no further part in the call that it is in."""
    said = {"call": cp.shared.calls, "text": f"{type(error).__name__}: {error}"}
    with suppress(Exception):  # the store may be gone with the rank that held it
        store().set(_failure(cp, dist.get_rank()), json.dumps(said))


def notes(cp: ContextParallel, since: int) -> dict[int, str]:
    """What other ranks have told so, of this call or one ``since``: what was refused before belongs to nobody waiting now."""
    found = {}
    with suppress(Exception):  # as above
        for rank in cp.ranks:
            if rank != dist.get_rank() and store().check([_failure(cp, rank)]):
                said = json.loads(store().get(_failure(cp, rank)))
                if said["call"] >= since:
                    found[rank] = said["text"]
    return found


def _named(failed: dict[int, str]) -> str:
    return "; ".join(f"rank {rank} failed: {text}" for rank, text in sorted(failed.items()))


@contextmanager
def told(cp: ContextParallel) -> Iterator[None]:
    """Tell the others of what is raised inside."""
    try:
        yield
    except RankFailed:
        raise
    except BaseException as error:
        note(cp, error)
        raise


class alone:  # noqa: N801 - a context manager reads as a verb; a class, since it is entered at every call
    """Refuse, and tell the others of it, where another thread of this rank is in a call over the same ranks.

    Messages of two threads would be taken for one another's. A backward may well run in a thread of autograd's own.
    """

    __slots__ = ("_cp",)

    def __init__(self, cp: ContextParallel) -> None:
        self._cp = cp

    def __enter__(self) -> None:
        if self._cp.shared.turn.acquire(blocking=False):
            return
        msg = (
            f"parallel: another thread of rank {dist.get_rank()} has a call over these ranks under way; accepted: one at a "
            "time, in the same order on every rank. Make the calls of a ContextParallel in one thread, and give another "
            "thread one over other ranks"
        )
        error = CallRefused(msg)
        note(self._cp, error)
        raise error

    def __exit__(self, *_: object) -> None:
        self._cp.shared.turn.release()


class blamed:  # noqa: N801 - a context manager reads as a verb; a class, since it is entered at every message
    """Give what goes wrong between ranks the name of the rank that it comes from."""

    __slots__ = ("_cp", "_doing")

    def __init__(self, cp: ContextParallel, doing: str) -> None:
        self._cp, self._doing = cp, doing

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, RuntimeError):
            return
        told_by = notes(
            self._cp, self._cp.shared.calls - 1
        )  # it may have failed in the call before, when this rank had its part
        if told_by:
            msg = f"parallel: {_named(told_by)} (noticed by rank {dist.get_rank()} while {self._doing})"
        else:
            msg = f"parallel: rank {dist.get_rank()} got no answer while {self._doing}: {error}"
        raise RankFailed(msg) from error


def exchanged(cp: ContextParallel, said: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank of the grid says at this point of this call, in the order of the grid.

    Raises:
        RankFailed: a rank has failed, or says nothing within the group's timeout.
    """
    place = store()
    point = f"{cp.shared.calls}/{cp.shared.points}"
    cp.shared.points += 1
    keys = {rank: f"attn_core/{cp.name}/{point}/{rank}" for rank in cp.ranks}
    place.set(keys[dist.get_rank()], json.dumps(said))
    silent, pause, end = set(keys), _PAUSE, time.monotonic() + timeout_of(cp)
    while silent:
        silent = {rank for rank in silent if not place.check([keys[rank]])}
        failed = notes(cp, cp.shared.calls) if silent else {}
        if failed:
            msg = f"parallel: {_named(failed)} (noticed by rank {dist.get_rank()} before anything was sent)"
            raise RankFailed(msg)
        if silent and time.monotonic() > end:
            msg = (
                f"parallel: rank {', '.join(map(str, sorted(silent)))} made no such call within the group's timeout. "
                "Every rank of the mesh makes the same calls in the same order; of sequences whose parts it has not "
                "seen before, tell cp.layout(lengths=[...]) on every rank"
            )
            raise RankFailed(msg)
        if silent:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
    heard = [json.loads(place.get(keys[rank])) for rank in cp.ranks]
    for key in cp.shared.spoken:  # all are here, so all have read what was said before
        place.delete_key(key)
    cp.shared.spoken[:] = [keys[dist.get_rank()]]
    return heard


def _failure(cp: ContextParallel, rank: int) -> str:
    return f"attn_core/{cp.name}/failed/{rank}"
