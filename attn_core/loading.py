"""Loads the functions that a declaration names, and holds their signatures to it."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attn_core.declaration import Backward, No
from attn_core.errors import BackendNotUsable
from attn_core.guard import Raised, attempt, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from attn_core.declaration import BackendSpec, Constraints

_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "causal": False,
    "window_size": None,
    "softcap": None,
    "dropout_p": 0.0,
    "deterministic": False,
    "return_lse": False,
}
"""What the core leaves out of a call, because it is what an adapter has without it."""

_OPTIONS = {
    "causal": "causal",
    "window_size": "window_size",
    "softcap": "softcap",
    "dropout": "dropout_p",
    "deterministic": "deterministic",
    "lse": "return_lse",
}
"""The option of an adapter that each ability of a declaration goes with."""

_BACKWARD_OPTIONS = ("causal", "window_size", "softcap")

_FORWARD = ("query", "key", "value")
_BACKWARD = ("grad_out", "query", "key", "value", "out", "lse")


class SignatureError(TypeError):
    """A function that could not be called as its declaration says."""


@dataclass(frozen=True)
class Adapter:
    """The loaded functions of a backend.

    Attributes:
        forward: ``forward(query, key, value, *, scale, ...) -> out``, or ``(out, lse)`` where asked.
        backward: ``backward(grad_out, query, key, value, out, lse, *, scale, ...) -> (dq, dk, dv)``, or None.
        name: of the backend, for messages.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    name: str = "a backend"


_loaded: dict[int, tuple[BackendSpec, Adapter]] = {}  # by identity: a declaration holds sets and functions


def load(spec: BackendSpec) -> Adapter:
    """Import what a declaration names, once.

    Raises:
        BackendNotUsable: the library does not load, or a function does not take what the declaration admits. Where the
            adapter raises it itself, as for what has to be allowed first, it is in the adapter's words.
    """
    found = _loaded.get(id(spec))
    if found is not None:
        return found[1]
    adapter = attempt(partial(_adapter, spec))
    if isinstance(adapter, Raised) and isinstance(adapter.error, BackendNotUsable):
        raise BackendNotUsable(str(adapter.error)) from adapter.error
    if isinstance(adapter, Raised):
        msg = (
            f"backend {spec.name} is broken: loading {spec.forward} raises {adapter}. "
            "Next: repair or reinstall what it needs, report it to the authors of the wheel, or choose another backend"
        )
        raise BackendNotUsable(msg) from adapter.error
    _loaded[id(spec)] = (spec, adapter.value)
    return adapter.value


@contextmanager
def replaced(spec: BackendSpec, adapter: Adapter) -> Iterator[None]:
    """Let a backend have other functions than its own, as to see whether they are called.

    What was admitted before has to be forgotten beside this, since it keeps the functions that it was admitted with.
    """
    before = _loaded.get(id(spec))
    _loaded[id(spec)] = (spec, adapter)
    try:
        yield
    finally:
        del _loaded[id(spec)]
        if before is not None:
            _loaded[id(spec)] = before


def refuses_itself(error: BaseException | None) -> bool:
    """Whether an error of ``load`` is in the adapter's own words: it is not broken, and says what it waits for."""
    return isinstance(error, BackendNotUsable) and isinstance(error.__cause__, BackendNotUsable)


def cause(error: BackendNotUsable) -> str:
    """What stands behind an error of ``load``, on one line."""
    return one_line(error.__cause__ or error)


def _adapter(spec: BackendSpec) -> Adapter:
    forward = _function(spec.forward)
    check_signature(spec.forward, forward, _FORWARD, forward_options(spec))
    if spec.backward is None:
        return Adapter(_with_defaults(forward), None, spec.name)
    backward = _function(spec.backward)
    check_signature(spec.backward, backward, _BACKWARD, backward_options(spec))
    return Adapter(_with_defaults(forward), _with_defaults(backward), spec.name)


def _with_defaults(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the core's defaults for options that it insists on being given."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return function
    insisted = {name for name, item in parameters.items() if name in _DEFAULTS and item.default is item.empty}
    return partial(function, **{name: _DEFAULTS[name] for name in insisted}) if insisted else function


def _function(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    function = getattr(import_module(module), name)
    if not callable(function):
        msg = f"{where} is a {type(function).__name__}, not a function"
        raise SignatureError(msg)
    return function  # type: ignore[no-any-return]


def forward_options(spec: BackendSpec) -> set[str]:
    """The options that the declaration admits, as the adapter's forward takes them; ``scale`` always.

    >>> from attn_core.declaration import BackendSpec, Constraints
    >>> constraints = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, lse=True)
    >>> sorted(forward_options(BackendSpec(api=1, name="x", summary="x", forward="x:x", constraints=constraints)))
    ['return_lse', 'scale']
    """
    found = {"scale"}
    for alternative in spec.alternatives:
        found |= {option for ability, option in _OPTIONS.items() if getattr(alternative, ability)}
        found |= _mask_option(alternative.masks)
    return found


def backward_options(spec: BackendSpec) -> set[str]:
    """The options that the declaration admits where a gradient is asked for, as the adapter's backward takes them."""
    found = {"scale"}
    for alternative in spec.alternatives:
        if isinstance(alternative.backward, No):
            continue
        found |= {option for option in _BACKWARD_OPTIONS if _in_backward(alternative, option)}
        found |= _mask_option(_in_backward(alternative, "masks"))
        if spec.autograd == "core" and _in_backward(alternative, "deterministic"):
            found.add("deterministic")
    return found


def _in_backward(alternative: Constraints, name: str) -> Any:
    own = getattr(alternative.backward, name) if isinstance(alternative.backward, Backward) else None
    whole = getattr(alternative, name)
    if own is None or not whole:
        return whole
    return own


def _mask_option(masks: Mapping[str, Any] | Any) -> set[str]:
    return {"attn_mask"} if any(ability for kind, ability in masks.items() if kind != "none") else set()


def check_signature(where: str, function: Callable[..., Any], tensors: Iterable[str], options: Iterable[str]) -> None:
    """Hold a function to what it will be called with.

    Raises:
        SignatureError: it lacks an option, or has a default other than the one that the core leaves out.
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # written in C, and it does not say
        return
    wanted = tuple(tensors)
    positional = [
        item for item in parameters.values() if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)
    ]
    if len(positional) < len(wanted) and not any(item.kind is item.VAR_POSITIONAL for item in parameters.values()):
        msg = f"{where} takes {len(positional)} arguments by position; it is called with {', '.join(wanted)}"
        raise SignatureError(msg)
    others = [item for item in parameters.values() if item not in positional[: len(wanted)]]
    _check_taken(where, others, set(options))
    for item in others:
        _check_default(where, item)


def _check_taken(where: str, parameters: list[inspect.Parameter], options: set[str]) -> None:
    kinds = {item.kind for item in parameters}
    taken = {item.name for item in parameters if item.kind in (item.KEYWORD_ONLY, item.POSITIONAL_OR_KEYWORD)}
    lacking = sorted(options - taken)
    if lacking and inspect.Parameter.VAR_KEYWORD not in kinds:
        msg = f"{where} does not take {', '.join(lacking)} by keyword, which its declaration admits"
        raise SignatureError(msg)


def _check_default(where: str, item: inspect.Parameter) -> None:
    if item.name == "scale" or item.kind in (item.VAR_KEYWORD, item.VAR_POSITIONAL):
        return
    if item.name not in _DEFAULTS:
        if item.default is not item.empty:
            return
        msg = f"{where} can't be called without {item.name}, which is no option of attn; give it a default"
        raise SignatureError(msg)
    default = _DEFAULTS[item.name]
    if item.default is item.empty or (type(item.default) in (type(default), int) and item.default == default):
        return
    msg = (
        f"{where} has {item.default!r} as the default of {item.name}; a call that has {default!r} leaves it out, "
        "so that has to be its default, or it has none"
    )
    raise SignatureError(msg)
