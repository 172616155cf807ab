"""``use_parallel``: context parallel for the calls of this thread or task inside a ``with`` block."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar, Token
from threading import Lock
from typing import TYPE_CHECKING

import torch

from attn_core.errors import CallRefused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from attn_core.parallel.context import ContextParallel

IN_COMPILED_CODE = (
    "use_parallel: compiled code can't follow this scope; pass parallel= to the call, which compiles, or open the scope "
    "around a function that is not compiled"
)

_in_force: ContextVar[ContextParallel | None] = ContextVar("attn_core.parallel", default=None)
in_force = _in_force.get

is_open = False
"""Whether a scope is open in the process; compiled code guards it."""
_opened = 0
_counting = Lock()


class use_parallel:  # noqa: N801 - a context manager reads as a verb
    """Spread the attention of this thread or task over a mesh inside the ``with`` block.

    Other threads never see it. ``use_parallel(None)`` switches it off inside, as for the attention to something that is
    not spread.

    Args:
        parallel: a ``ContextParallel``, or None.
    """

    def __init__(self, parallel: ContextParallel | None) -> None:
        if parallel is not None and not hasattr(parallel, "given_whole"):
            msg = f"use_parallel: found {parallel!r}; accepted: a ContextParallel, or None"
            raise CallRefused(msg)
        self.parallel = parallel
        self._tokens: list[Token[ContextParallel | None]] = []

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise CallRefused(IN_COMPILED_CODE)
        _count(1)
        self._tokens.append(_in_force.set(self.parallel))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _in_force.reset(self._tokens.pop())
        _count(-1)


@contextmanager
def suspended() -> Iterator[None]:
    """No scope inside: the call that is a part of a call is on this rank alone."""
    token = _in_force.set(None)
    try:
        yield
    finally:
        _in_force.reset(token)


def _count(step: int) -> None:
    global is_open, _opened  # noqa: PLW0603 - facts about the process
    from attn_core import call

    with _counting:
        _opened += step
        is_open = _opened > 0
        call.look_for_scopes(is_open)
