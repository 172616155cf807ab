"""``use_parallel``: context parallel for the calls of this thread or task inside a ``with`` block."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar, Token
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_core import selection
from attn_core.errors import CallRefused
from attn_core.guarded import guarded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from attn_core.parallel.context import ContextParallel

Identity = tuple[str, tuple[str, ...], str, str]
"""A ``ContextParallel`` in plain words."""

IN_COMPILED_CODE = (
    "use_parallel: compiled code can't open this scope, and before torch 2.11 it can't follow one that is open around it; pass "
    "parallel= to the call, which compiles, or open the scope around a function that is not compiled"
)
RECOMPUTED = (
    "attention was called inside a backward pass, as a reentrant torch.utils.checkpoint does to recompute, and whether the "
    "forward was inside use_parallel is not known: this process has made calls of both sorts. Use "
    "checkpoint(..., use_reentrant=False), or pass parallel= to the call"
)


class Opened(NamedTuple):
    """A scope.

    Attributes:
        parallel: what it chose.
        graph_task: the backward pass that it was opened in, -1 outside of any.
        frame: the checkpoint whose forward it was opened in, or None.
        outer: the scope around it.
    """

    parallel: ContextParallel | None
    graph_task: int
    frame: Any
    outer: Opened | None


_innermost: ContextVar[Opened | None] = ContextVar("attn_core.parallel", default=None)

is_open = False
"""Whether a scope is open in the process; compiled code guards it."""
ever_open = False
"""Whether one ever was; as long as not, nobody asks."""
_open = 0
_counting = Lock()
_seen: set[tuple[str, tuple[str, ...]] | None] = set()


class use_parallel:  # noqa: N801 - a context manager reads as a verb
    """Spread the attention of this thread or task over a mesh inside the ``with`` block.

    Other threads never see it. ``use_parallel(None)`` switches it off inside, as for the attention to something that is
    not spread. What ``torch.utils.checkpoint`` recomputes is spread as its forward was, or refused.

    Args:
        parallel: a ``ContextParallel``, or None.
    """

    def __init__(self, parallel: ContextParallel | None) -> None:
        if parallel is not None and not hasattr(parallel, "given_whole"):
            msg = f"use_parallel: found {parallel!r}; accepted: a ContextParallel, or None"
            raise CallRefused(msg)
        self.parallel = parallel
        self._tokens: list[Token[Opened | None]] = []

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise CallRefused(IN_COMPILED_CODE)
        _count(1)
        self._tokens.append(_opened(self.parallel))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _innermost.reset(self._tokens.pop())
        _count(-1)


@contextmanager
def suspended() -> Iterator[None]:
    """No scope inside: the call that is a part of a call is on this rank alone."""
    token = _opened(None)
    try:
        yield
    finally:
        _innermost.reset(token)


def in_force() -> ContextParallel | None:
    """What the innermost scope of this thread or task chose."""
    found = _innermost.get()
    return None if found is None else found.parallel


def of_call() -> ContextParallel | None:
    """The ranks of a call that names none: those in force, or in a recomputation those of its forward.

    Raises:
        CallRefused: in a recomputation, where these are not known.
    """
    if selection.checkpointing():
        return _consistent()
    found = in_force()
    _seen.add(_named(found))
    return found


def _consistent() -> ContextParallel | None:
    found, task = _innermost.get(), selection.graph_task()
    parallel = None if found is None else found.parallel
    if task == -1:
        _note_with_checkpoint(found)
        _seen.add(_named(parallel))
        return parallel
    if found is not None and found.graph_task == task:  # opened by what is recomputed, or around it from its note
        return parallel
    recomputing = selection.recomputing_frame()
    if recomputing is not None and not hasattr(recomputing, "attn_parallel_noted"):
        return None  # its forward ran before there was any scope
    if not _seen <= {_named(parallel)}:
        raise CallRefused(RECOMPUTED)
    return parallel


def _note_with_checkpoint(found: Opened | None) -> None:
    """Have the checkpoint whose forward is running recompute inside the scope that is open around it."""
    frame = selection.running_frame()
    if frame is None or hasattr(frame, "attn_parallel_noted"):
        return
    while found is not None and found.frame is frame:
        found = found.outer
    parallel = None if found is None else found.parallel
    recompute = frame.recompute_fn

    def recompute_with_ranks(*args: Any, **options: Any) -> Any:
        with use_parallel(parallel):
            return recompute(*args, **options)

    frame.recompute_fn = recompute_with_ranks
    frame.attn_parallel_noted = True


def _opened(parallel: ContextParallel | None) -> Token[Opened | None]:
    opened = Opened(parallel, selection.graph_task(), selection.running_frame(), _innermost.get())
    return _innermost.set(opened)


def _identity(parallel: ContextParallel | None) -> Identity | None:
    return None if parallel is None else parallel.identity


def _named(parallel: ContextParallel | None) -> tuple[str, tuple[str, ...]] | None:
    return None if parallel is None else parallel.identity[:2]


def _count(step: int) -> None:
    global is_open, ever_open, _open  # noqa: PLW0603 - facts about the process
    from attn_core import call

    with _counting:
        _open += step
        is_open = _open > 0
        if not ever_open:
            ever_open = True
            if call.look_for_scopes():
                _seen.add(None)


# --- torch.compile ----------------------------------------------------------------------------------------------------

_guarded = guarded("ParallelInForce", lambda: _identity(of_call()), lambda: _identity(of_call()))


def traced_identity() -> Identity | None:
    """What is in force, as code that is being traced may read it."""
    if not ever_open:
        return None
    if _guarded is not None:
        return _guarded.now()  # type: ignore[no-any-return]
    if is_open:
        raise CallRefused(IN_COMPILED_CODE)
    return None
