"""Whose choice is in force: scopes, the process default, the environment.

A choice is a name, a tuple of names in order of preference, or None where nobody chose. Scopes live in a context
variable, so that threads and tasks never see each other's, and ``asyncio.to_thread`` inherits them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

import torch

from attn_core import registry, trace
from attn_core.errors import AttnError, BackendNotUsable
from attn_core.guarded import guarded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

Choice = str | tuple[str, ...]

DEFAULT = "native"
VARIABLE = "ATTN_BACKEND"

# Reading os.environ costs 0.4 microseconds, its data 0.03; where a platform has no such data the slow way is taken.
_environment: Any = getattr(os.environ, "_data", None) or os.environ
VARIABLE_KEY: Any = VARIABLE if _environment is os.environ else os.environ.encodekey(VARIABLE)
read_environment = _environment.get
"""Of ``VARIABLE_KEY``: the environment's raw word, which costs next to nothing to read and to compare."""

graph_task = torch._C._current_graph_task_id


class Scope:
    """One opened scope. ``closed`` is set where it ends in another thread or task than it began in."""

    __slots__ = ("closed", "frame", "graph_task", "names", "owner", "token")

    def __init__(self, names: Choice, owner: object = None) -> None:
        self.names = names
        self.owner = owner
        self.closed = False
        self.graph_task = graph_task()
        self.frame = running_frame()
        self.token: Token[tuple[Scope, ...]] | None = None


_stack: ContextVar[tuple[Scope, ...]] = ContextVar("attn_core.scopes", default=())
scopes = _stack.get

_default: Choice | None = None
_used: set[Choice | None] = set()

varied = False
"""Whether the choice may differ between two calls of this process; as long as not, no call asks about recomputation."""
_before_varied: Choice | None = None


def normalized(names: object) -> Choice:
    """One name as it is, several as a tuple; anything else is refused."""
    if isinstance(names, str) and names:
        return names
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) and name for name in names):
        return names[0] if len(names) == 1 else tuple(names)
    msg = f"backend: found {names!r}; accepted: a name, or several names in order of preference, as attn list-backends has them"
    raise BackendNotUsable(msg)


def listed(choice: Choice | None) -> tuple[str, ...]:
    """The names of a choice, in order."""
    if choice is None:
        return (DEFAULT,)
    return (choice,) if isinstance(choice, str) else choice


FROM_ELSEWHERE = "a scope, the process or the environment"
"""Who chose, where the call did not and more can't be said."""


def origin() -> str:
    """Who chose, for messages."""
    if scopes() and not scopes()[-1].closed:
        return "use_backend or bind"
    if _default is not None:
        return "set_backend"
    return f"the environment variable {VARIABLE}" if environment() is not None else "the default"


def environment() -> Choice | None:
    """What ``ATTN_BACKEND`` says: a name, or several separated by commas. Empty is as good as unset."""
    value = os.environ.get(VARIABLE, "")
    names = [name.strip() for name in value.split(",") if name.strip()]
    return normalized(names) if names else None


def process_default() -> Choice | None:
    """What ``set_backend`` chose, if anything."""
    return _default


def in_force() -> Choice | None:
    """The choice for a call that names no backend of its own, in this thread or task, now."""
    opened = scopes()
    if opened and opened[-1].closed:
        opened = tuple(scope for scope in opened if not scope.closed)
        _stack.set(opened)
    if opened:
        return opened[-1].names
    return environment() if _default is None else _default


def check(choice: Choice) -> Choice:
    """Refuse names that nobody knows here and now, where the mistake was made, not at some later call."""
    names = listed(choice)
    if len(names) == 1:
        registry.find(names[0])
        return choice
    for name in names:
        if registry.mistyped(name):
            registry.find(name)
    return choice


def set_backend(*names: str | None) -> None:
    """Choose the backend of this process: for every call that is not inside a scope and names none itself.

    Args:
        names: one name, strict; or several in order of preference. ``set_backend(None)`` takes the choice back.

    Raises:
        BackendNotUsable: when the name is unknown or its backend is not available.

    Example:
        >>> set_backend("native_math")
        >>> set_backend(None)
    """
    global _default  # noqa: PLW0603 - the process has one default, and compiled code guards this global
    if _used:
        _note_varied()
    _default = None if names == (None,) else check(normalized(names))


class use_backend:  # noqa: N801 - a context manager reads as a verb
    """Choose the backend for the calls of this thread or task inside the ``with`` block.

    Other threads never see it; a pool's threads do not inherit it, ``asyncio.to_thread`` and tasks created inside do.
    A generator suspended inside the block shares it with its consumer until it ends. Nothing remains afterwards, in
    whatever order scopes end.

    Args:
        names: one name, strict; or several in order of preference.

    Raises:
        BackendNotUsable: when the name is unknown or its backend is not available.

    Example:
        >>> import torch
        >>> from attn_core import attention
        >>> q = torch.randn(1, 4, 2, 8)
        >>> with use_backend("native_math"):
        ...     attention(q, q, q).shape
        torch.Size([1, 4, 2, 8])
    """

    def __init__(self, *names: str) -> None:
        self.names = normalized(names)
        self._opened: list[Scope] = []

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            noted = trace.enter(self.names)
            if noted is None:
                raise BackendNotUsable(trace.IN_GENERATOR)
            if noted:
                traced_scopes.append((self.names, trace.number()))
            return
        self._opened.append(open_scope(check(self.names), self))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if torch.compiler.is_dynamo_compiling():
            if trace.leave():
                traced_scopes.pop()
            return
        own = [
            scope for scope in scopes() if scope.owner is self
        ]  # the object may be entered in several contexts at once
        if not own and not self._opened and traced_scopes:  # it began in compiled code, and ends outside it
            traced_scopes.pop()
            return
        if not own and not self._opened:
            msg = (
                f"use_backend({self.names!r}) is left without having been entered. Next: write `with use_backend(...):`"
            )
            raise AttnError(msg)
        scope = own[-1] if own else self._opened[-1]
        self._opened.remove(scope)
        close_scope(scope)


def open_scope(names: Choice, owner: object = None) -> Scope:
    """Begin a scope in this context."""
    _note_varied()
    scope = Scope(names, owner)
    scope.token = _stack.set((*scopes(), scope))
    _count_open(1)
    return scope


def close_scope(scope: Scope) -> None:
    """End a scope, wherever this runs and whichever scopes are still open around or inside it."""
    remaining = tuple(other for other in scopes() if other is not scope)
    try:
        _stack.reset(scope.token)  # type: ignore[arg-type]
    except ValueError:  # it began in another context, which must not see it any more either
        scope.closed = True
    _stack.set(remaining)
    _count_open(-1)


# --- torch.utils.checkpoint -------------------------------------------------------------------------------------------

# Before torch 2.8 nobody can ask for them: a checkpoint's forward is not noticed, and a recomputation that may need another
# choice than the one in force is refused in either form.
_hooks_known = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks if _hooks_known else lambda _: None
"""Of True: the innermost pair of saved-tensor hooks, or None."""


def checkpointing() -> bool:
    """Whether this call is recorded by saved-tensor hooks (a checkpoint, say) or made inside a backward pass."""
    return top_hooks(True) is not None or graph_task() != -1


def running_frame() -> Any:
    """The record of the innermost non-reentrant checkpoint whose forward is running, else None.

    Its pack hook closes over the frame, which has ``recompute_fn``; true of torch 2.4 to 2.13.
    """
    hooks = top_hooks(True)
    if hooks is None:
        return None
    return next((item for item in _closed_over(hooks[0]) if hasattr(item, "recompute_fn")), None)


def _closed_over(hook: Any) -> Iterator[Any]:
    for cell in getattr(hook, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def consistent_choice(choice: Choice | None) -> Choice | None:
    """Make sure that a recomputation uses the choice of its forward, or refuse.

    In the forward of a checkpoint, the choice in force around it is noted with the checkpoint, which then recomputes
    inside a scope of that choice; and so are the choices of its calls, since a module inside may be bound anew before it
    recomputes. A checkpoint without a note ran while there was one choice for all. In the reentrant form, which can't be told
    apart, the choice has to be one that can't have changed.
    """
    task = graph_task()
    if task == -1:
        _note(choice)
        return choice
    _require_noted(choice)
    if any(scope.graph_task == task and not scope.closed for scope in scopes()) or set(map(listed, _used)) <= {
        listed(choice)
    }:
        return choice
    if _recomputes_without_note():
        return _before_varied
    seen = ", ".join(sorted({" then ".join(listed(used)) for used in _used}))
    form, step = (
        ("a reentrant ", "Use checkpoint(..., use_reentrant=False)") if _hooks_known else ("", "Use torch 2.8 or later")
    )
    msg = (
        f"attention was called inside a backward pass, as {form}torch.utils.checkpoint does to recompute, and "
        f"the forward's choice of backend is not known: this process has used {seen}. "
        f"{step}, bind the module inside the checkpoint, or pass backend= to the call"
    )
    raise BackendNotUsable(msg)


def _note(choice: Choice | None) -> None:
    frame = running_frame()
    if frame is None:
        return
    if not hasattr(frame, "attn_choices"):
        frame.attn_choices = set()
        _recompute_with_ambient_choice(frame)
    frame.attn_choices.add(listed(choice))


def _require_noted(choice: Choice | None) -> None:
    """Refuse in a recomputation a choice that no call of its forward ran on."""
    frame = recomputing_frame()
    noted = getattr(frame, "attn_choices", None)
    if noted is None or listed(choice) in noted:
        return
    found, accepted = " then ".join(listed(choice)), " or ".join(sorted(" then ".join(names) for names in noted))
    msg = (
        f"a checkpoint recomputes on {found} what its forward ran on {accepted}: a module inside was bound anew in between. "
        "Run the backward first, or bind the module to the same again"
    )
    raise BackendNotUsable(msg)


def _recompute_with_ambient_choice(frame: Any) -> None:
    around = [scope for scope in scopes() if scope.frame is not frame and not scope.closed]
    choice = around[-1].names if around else (environment() if _default is None else _default)
    recompute = frame.recompute_fn

    def recompute_with_choice(*args: Any, **options: Any) -> Any:
        scope = open_scope(DEFAULT if choice is None else choice)
        try:
            return recompute(*args, **options)
        finally:
            close_scope(scope)

    frame.recompute_fn = recompute_with_choice


def recomputing_frame() -> Any:
    """The record of the non-reentrant checkpoint that is recomputing here, else None.

    The pack hook of a recomputation closes over a weak reference to the checkpoint's frame.
    """
    hooks = top_hooks(True)
    hook = getattr(hooks[0], "__wrapped__", hooks[0]) if hooks is not None else None
    frames = (item() for item in _closed_over(hook) if isinstance(item, ReferenceType))
    return next((frame for frame in frames if hasattr(frame, "recompute_fn")), None)


def _recomputes_without_note() -> bool:
    """Whether a non-reentrant checkpoint is recomputing here whose forward ran when there was one choice for all."""
    frame = recomputing_frame()
    return frame is not None and not hasattr(frame, "attn_choices")


def _note_varied() -> None:
    global varied, _before_varied  # noqa: PLW0603 - facts about the process
    if not varied:
        _before_varied = environment() if _default is None else _default
        varied = True


def note_used(choice: Choice | None) -> None:
    """Remember that a call in this process ran on a choice that was in force, not named by the call."""
    if _used and choice not in _used:
        _note_varied()
    _used.add(choice)


# --- torch.compile ----------------------------------------------------------------------------------------------------
# Dynamo can't read a context variable. Where torch has reference objects with guards of their own, one whose guard
# reads the choice makes compiled code follow every switch. Elsewhere it guards two globals, the default and "a scope is
# open somewhere", and refuses in the second case: never stale.

traced_scopes: list[tuple[Choice, int]] = []
"""Scopes opened inside the code that is being traced, each with its trace; Dynamo follows appends and pops. Those in a
generator or in the body of an operator are not among them: they can't outlive their trace.

Empty outside a trace, unless Dynamo left the code inside a scope: at a graph break, in a function that is not compiled,
or where a generator is suspended. Calls are refused as long as that lasts, since nobody can tell whose scope it is.
"""

scope_is_open = False
_open_scopes = 0


SUSPENDED = (
    "a scope of use_backend or bind that compiled code opened is still open outside that code: a graph break, a function "
    "that is not compiled, or a suspended generator lies inside it, or something in it was refused or raised while it was "
    "traced (run it without torch.compile to see that). Open the scope around the compiled code, or pass backend="
)


def _consistent_in_force() -> Choice | None:
    choice = in_force()
    return consistent_choice(choice) if checkpointing() else choice


def _used_in_force() -> Choice | None:
    choice = _consistent_in_force()
    note_used(choice)
    return choice


guarded_choice = guarded("ChoiceInForce", _used_in_force, _consistent_in_force)


def _count_open(step: int) -> None:
    global _open_scopes, scope_is_open  # noqa: PLW0603 - guarded by compiled code where guarded_choice is None
    if guarded_choice is None:
        _open_scopes += step
        scope_is_open = _open_scopes > 0


def traced_choice() -> Choice | None:
    """The choice in force, as code that is being traced may read it."""
    if traced_scopes and traced_scopes[-1][1] != trace.number():
        raise BackendNotUsable(SUSPENDED)
    state, names = trace.innermost()
    if state == "suspended":
        raise BackendNotUsable(SUSPENDED)
    if state == "open":
        return names  # type: ignore[no-any-return]
    if guarded_choice is not None:
        return guarded_choice.now()  # type: ignore[no-any-return]
    if scope_is_open:
        msg = (
            "a scope of use_backend or bind is open, and compiled code can't follow scopes on this version of torch: "
            "pass backend= to the call, use set_backend, open the scope inside the compiled function, or use torch 2.11 or later"
        )
        raise BackendNotUsable(msg)
    return _default if _default is not None else _environment_when_traced(_environment.get(VARIABLE_KEY))


def _environment_when_traced(_raw: Any) -> Choice | None:
    """Its argument is what the trace guards."""
    return environment()


# What torch.compiler.assume_constant_result does, without importing Dynamo for everybody.
_environment_when_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
