"""``use_parallel``: context parallel for the calls of this thread or task inside a ``with`` block."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar, Token
from threading import Lock
from typing import TYPE_CHECKING, Any

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


class Opened:
    """One opened scope; ``closed`` is set where it ends in another thread or task than it began in."""

    __slots__ = ("closed", "frame", "graph_task", "owner", "parallel", "token")

    def __init__(self, parallel: ContextParallel | None, owner: object = None) -> None:
        self.parallel = parallel
        self.owner = owner
        self.closed = False
        self.graph_task = selection.graph_task()
        self.frame = selection.running_frame()
        self.token: Token[tuple[Opened, ...]] = _stack.set((*_stack.get(), self))

    def close(self) -> None:
        """End it, wherever this runs and whichever scopes are still open around or inside it."""
        remaining = tuple(other for other in _stack.get() if other is not self)
        try:
            _stack.reset(self.token)
        except ValueError:  # it began in another context, which must not see it any more either
            self.closed = True
        _stack.set(remaining)


_stack: ContextVar[tuple[Opened, ...]] = ContextVar("attn_core.parallel", default=())

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
        self._opened: list[Opened] = []

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise CallRefused(IN_COMPILED_CODE)
        _count(1)
        self._opened.append(Opened(self.parallel, self))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        own = [scope for scope in _stack.get() if scope.owner is self]  # it may be entered in several contexts at once
        scope = own[-1] if own else self._opened[-1]
        self._opened.remove(scope)
        scope.close()
        _count(-1)


@contextmanager
def suspended() -> Iterator[None]:
    """No scope inside: the call that is a part of a call is on this rank alone."""
    scope = Opened(None)
    try:
        yield
    finally:
        scope.close()


def _innermost() -> Opened | None:
    return next((scope for scope in reversed(_stack.get()) if not scope.closed), None)


def in_force() -> ContextParallel | None:
    """What the innermost scope of this thread or task chose."""
    found = _innermost()
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
    found, task = _innermost(), selection.graph_task()
    parallel = None if found is None else found.parallel
    if task == -1:
        _note_with_checkpoint()
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


def _note_with_checkpoint() -> None:
    """Have the checkpoint whose forward is running recompute inside the scope that is open around it."""
    frame = selection.running_frame()
    if frame is None or hasattr(frame, "attn_parallel_noted"):
        return
    around = [scope for scope in _stack.get() if scope.frame is not frame and not scope.closed]
    parallel = around[-1].parallel if around else None
    recompute = frame.recompute_fn

    def recompute_with_ranks(*args: Any, **options: Any) -> Any:
        with use_parallel(parallel):
            return recompute(*args, **options)

    frame.recompute_fn = recompute_with_ranks
    frame.attn_parallel_noted = True


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
