"""What ranks say to each other beside their data: that one has failed, and what each is about to do.

It goes by way of the store that the process group was made with, which answers while the group itself waits.
"""

from __future__ import annotations

import atexit
import json
import re
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from attn_core.errors import AttnError, CallRefused
from attn_core.parallel.comparison import ASKING, difference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from attn_core.parallel.context import ContextParallel

DIFFERENT = "the ranks make different calls: {found}. Every rank of a mesh makes the same calls in the same order"
_ALL_CALLS = 2**62
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


def note(cp: ContextParallel, error: BaseException, call: int | None = None) -> None:
    """Tell the others why this rank takes no further part in the call that it is in, or in one and all that follow."""
    call = cp.shared.calls if call is None else call
    refused = isinstance(error, AttnError)
    _leave(cp, "failed", {"call": call, "text": f"{type(error).__name__}: {error}", "refused": refused})


def _tell_of_the_end(contexts: dict[str, ContextParallel]) -> None:
    """Tell the others, as this process ends with an error that nobody caught, of which call it may be in."""
    error = getattr(sys, "last_value", None)
    if isinstance(error, BaseException) and not isinstance(error, RankFailed) and dist.is_initialized():
        for cp in contexts.values():
            note(cp, error, _ALL_CALLS)


def tell_of_the_end(contexts: dict[str, ContextParallel]) -> None:
    """Have the others told where this process ends with an error that nobody catches."""
    atexit.register(_tell_of_the_end, contexts)


def notes(cp: ContextParallel, since: int) -> dict[int, str]:
    """What other ranks have told so, of this call or one ``since``: what was refused before belongs to nobody waiting now."""
    left = _left(cp, "failed", since)
    return {rank: said["text"] for rank, said in left.items() if said["call"] >= cp.shared.calls or not said["refused"]}


def _leave(cp: ContextParallel, what: str, said: dict[str, Any]) -> None:
    with suppress(Exception):  # the store may be gone with the rank that held it
        store().set(f"attn_core/{cp.name}/{what}/{dist.get_rank()}", json.dumps(said))


def _left(cp: ContextParallel, what: str, since: int) -> dict[int, dict[str, Any]]:
    """What other ranks have left under this name, of this call or one ``since``."""
    found = {}
    with suppress(Exception):  # as above
        for rank in cp.ranks:
            key = f"attn_core/{cp.name}/{what}/{rank}"
            if rank != dist.get_rank() and store().check([key]):
                said = json.loads(store().get(key))
                if said["call"] >= since:
                    found[rank] = said
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
        if type(error).__name__ != _ENOUGH:
            note(cp, error)
        raise


_ENOUGH = "_StopRecomputationError"
"""What ``torch.utils.checkpoint`` raises in a recomputation that has made all that its backward needs: nothing failed."""


class alone:  # noqa: N801 - a context manager reads as a verb; a class, since it is entered at every call
    """Refuse, and tell the others of it, where another thread of this rank is in a call over the same ranks.

    Messages of two threads would be taken for one another's. A backward may well run in a thread of autograd's own.
    """

    __slots__ = ("_cp",)

    def __init__(self, cp: ContextParallel) -> None:
        self._cp = cp

    def __enter__(self) -> None:
        if self._cp.turn.acquire(blocking=False):
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
        self._cp.turn.release()


class blamed:  # noqa: N801 - a context manager reads as a verb; a class, since it is entered at every message
    """Give what goes wrong between ranks the name of the rank that it comes from.

    Attributes:
        peer: the rank at the other end of the message that is waited for, where that is known.
    """

    __slots__ = ("_cp", "_doing", "peer")

    def __init__(self, cp: ContextParallel, doing: str) -> None:
        self._cp, self._doing = cp, doing
        self.peer: int | None = None

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, RuntimeError):
            return
        cp = self._cp
        late = _LATE.search(str(error)) is not None
        said = {"stage": None, "kind": cp.shared.current and cp.shared.current.kind.described()}
        found = _cause(cp, said, None if late else self.peer) or f"no answer: {error}"
        msg = f"parallel: {found} (noticed by rank {dist.get_rank()} while {self._doing}: {error})"
        raise RankFailed(msg) from error


_LATE = re.compile("timed? ?out", re.IGNORECASE)
_GRACE = 3.0
"""Seconds that a rank whose wait ended without an answer gives the others to say the same of theirs."""


def _cause(cp: ContextParallel, said: dict[str, Any], gone: int | None) -> str:
    """Why a wait for others ended without an answer, from what they say of theirs; empty where nobody knows.

    Args:
        cp: the ranks.
        said: what this rank's call is.
        gone: the rank that broke the connection, where one did.
    """
    others = set(cp.ranks) - {dist.get_rank()}
    said = json.loads(json.dumps({**said, "call": cp.shared.calls}))  # as the others have it
    word = {"call": cp.shared.calls, "said": said, "cause": "", "blamed": []}
    _leave(cp, "waited", word)
    awaited = others if gone is None else {gone}
    end = time.monotonic() + (_GRACE if gone is None else _GRACE / 3)
    while True:
        failed, heard = notes(cp, cp.shared.calls - 1), _left(cp, "waited", cp.shared.calls - 1)
        if failed or awaited <= set(heard) or time.monotonic() > end:
            break
        time.sleep(_LONGEST_PAUSE)
    if failed:
        return _named(failed)
    word["cause"], word["blamed"] = _compared(cp, said, heard, sorted(awaited - set(heard)))
    _leave(cp, "waited", word)
    return str(word["cause"])


def _compared(
    cp: ContextParallel, said: dict[str, Any], heard: dict[int, dict[str, Any]], silent: list[int]
) -> tuple[str, list[int]]:
    """The cause, and the ranks that it lies with."""
    me = dist.get_rank()
    for other in heard.values():  # which may have found it before
        if other["blamed"] and me not in other["blamed"]:
            return other["cause"], other["blamed"]
    words = {rank: said if rank == me else heard[rank]["said"] for rank in cp.ranks if rank == me or rank in heard}
    found = difference({rank: one for rank, one in words.items() if one["kind"] or one["stage"]})
    if found:
        return DIFFERENT.format(found=found), []
    if silent:
        return f"rank {', '.join(map(str, silent))} does not answer: it has ended, or makes no such call", silent
    return "", []


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
        if failed and any(
            not place.check([keys[rank]]) for rank in silent
        ):  # or it has failed of what all have said here
            msg = f"parallel: {_named(failed)} (noticed by rank {dist.get_rank()} before anything was sent)"
            raise RankFailed(msg)
        if silent and time.monotonic() > end:
            described = {"stage": ASKING if said["stage"] == ASKING else None, "kind": said.get("kind")}
            found = _cause(cp, described, None) or f"rank {', '.join(map(str, sorted(silent)))} makes no such call"
            msg = f"parallel: {found} (noticed by rank {dist.get_rank()} before anything was sent, at the group's timeout)"
            raise RankFailed(msg)
        if silent:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
    heard = [json.loads(place.get(keys[rank])) for rank in cp.ranks]
    for key in cp.shared.spoken:  # all are here, so all have read what was said before
        place.delete_key(key)
    cp.shared.spoken[:] = [keys[dist.get_rank()]]
    return heard
