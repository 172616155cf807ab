"""The scopes that are open in what Dynamo is tracing just now, kept with the trace while it lasts.

Where Dynamo traces a change of anything global, it makes the change again each time the traced code runs. That is what
tells of a scope that a graph break leaves open, but a generator that is broken off never gets to its end, and in the bodies
of ``torch.utils.checkpoint`` and ``torch.cond`` it is refused. Scopes of these two are known here alone. The functions
here run while Dynamo traces, and are constants to it.
"""

from __future__ import annotations

import contextlib
import sys
from inspect import CO_GENERATOR
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CONTEXTLIB = contextlib.contextmanager.__code__.co_filename
_traces = count(1)


IN_GENERATOR = (
    "use_backend: found opened in a generator inside compiled code, which torch before 2.7 traces to its end before what runs "
    "beside it; accepted there: scopes opened outside of the generator, or backend= in its calls"
)


def _nowhere() -> None:
    """What is called in place of a weak reference where a scope lies in no generator."""


class _Opened(NamedTuple):
    """A scope: its names, the generator that it lies in, and whether it is noted outside the trace too."""

    names: Any
    generator: Callable[[], Any]
    noted: bool


def number() -> int:
    """A number for what Dynamo is tracing just now; 0 where it only says so, as torch 2.6 does after a graph break."""
    context: Any = torch._guards.TracingContext.try_get()
    if context is None:
        return 0
    if not hasattr(context, "attn_trace"):
        context.attn_trace = next(_traces)
    found: int = context.attn_trace
    return found


def enter(names: Any) -> bool | None:
    """Begin a scope of this trace. Whether it has to be noted outside the trace too, since a graph break may leave it open.

    None where it can't begin: in a generator on torch 2.6, which traces the whole of it before what goes on beside it.
    """
    generator = _generator()
    if generator is not None and not hasattr(torch._dynamo.config, "enable_faithful_generator_behavior"):
        return None
    noted = generator is None and not _in_body()
    _opened().append(_Opened(names, _nowhere if generator is None else ref(generator), noted))
    return noted


def leave() -> bool:
    """End the innermost scope of the generator that is running, if one is. Whether it was noted outside the trace."""
    generator, opened = _generator(), _opened()
    for index in reversed(range(len(opened))):
        own = opened[index].generator
        if own is _nowhere if generator is None else own() is generator:
            return opened.pop(index).noted
    return True  # it began in another trace


def innermost() -> tuple[str, Any]:
    """The scope in force: ("open", its names), ("none", None), or ("suspended", None) where only its generator knows."""
    opened = _opened()
    if not opened:
        return "none", None
    names, generator, _ = opened[-1]
    if generator is not _nowhere and generator() not in [item for item, _ in _generators()]:
        return "suspended", None  # or ended: nothing tells when a generator that was broken off is closed
    return "open", names


def _opened() -> list[_Opened]:
    context: Any = torch._guards.TracingContext.try_get()
    if context is None:
        return []
    if not hasattr(context, "attn_opened"):
        context.attn_opened = []
    found: list[_Opened] = context.attn_opened
    return found


def _generator() -> Any:
    """What traces the innermost generator that is running; those of ``contextlib.contextmanager`` end as functions do."""
    return next((item for item, driver in _generators() if driver.co_filename != _CONTEXTLIB), None)


def _generators() -> Iterator[tuple[Any, Any]]:
    """What traces each running generator, the innermost first, and the code that runs it."""
    for tracer, driver in pairwise(_tracers()):
        if tracer.f_code.co_flags & CO_GENERATOR:
            yield tracer, driver.f_code


def _tracers() -> Iterator[Any]:
    """Dynamo's objects that trace a function each, from the innermost outwards."""
    for frame in _frames():
        if frame.f_code.co_name == "run":
            tracer = frame.f_locals.get("self")
            if hasattr(tracer, "f_code"):
                yield tracer


def _in_body() -> bool:
    """Whether a body is traced that an operator of its own will run, as that of a checkpoint."""
    return any(frame.f_code.co_name.startswith("speculate_subgraph") for frame in _frames())


def _frames() -> Iterator[Any]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


# What torch.compiler.assume_constant_result does, without importing Dynamo for everybody.
_functions: tuple[Any, ...] = (number, enter, leave, innermost)
for _function in _functions:
    _function._dynamo_marked_constant = True
