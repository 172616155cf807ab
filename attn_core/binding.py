"""A choice of backend that belongs to a module."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from attn_core.errors import AttnError
from attn_core.selection import check, normalized, use_backend

if TYPE_CHECKING:
    from collections.abc import Callable

    from attn_core.selection import Choice


class _BoundForward:
    """A module's ``forward``, run inside a scope of the module's own. Copied and pickled with the module."""

    def __init__(self, module: torch.nn.Module, names: Choice) -> None:
        self.module = module
        self.names = names
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward itself: trainers look at it."""
        return inspect.signature(self.previous or MethodType(type(self.module).forward, self.module))

    def __call__(self, *args: Any, **options: Any) -> Any:
        names = (self.names,) if isinstance(self.names, str) else self.names
        with use_backend(*names):
            if self.previous is None:
                return type(self.module).forward(self.module, *args, **options)
            return self.previous(*args, **options)


class Binding:
    """What ``bind`` made; ``remove()`` takes it back."""

    def __init__(self, module: torch.nn.Module, bound: _BoundForward) -> None:
        self._module = module
        self._bound = bound

    def remove(self) -> None:
        """Take the binding back; does nothing when another has replaced it."""
        if self._module.__dict__.get("forward") is self._bound:
            _unbind(self._module)

    def __repr__(self) -> str:
        return f"Binding({type(self._module).__name__}, {self._bound.names!r})"


def bind(module: torch.nn.Module, *names: str) -> Binding:
    """Choose the backend for the calls made inside a module: whatever runs during its ``forward``, submodules included.

    The innermost of bindings and scopes wins, so a submodule with a binding of its own, or a scope opened inside, goes
    first. Binding again replaces the binding. It is copied and pickled with the module; parameters, hooks and the state
    dict stay as they are.

    Args:
        module: a ``torch.nn.Module``. Methods called beside ``forward`` (``vae.decode``) are not inside: bind the
            submodules that they run, or open a scope. A shallow copy of a bound module (``copy.copy``, the replicas of
            ``DataParallel``) runs the original's forward: bind the copy.
        names: one name, strict; or several in order of preference.

    Raises:
        BackendNotUsable: when the name is unknown or its backend is not available.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 4)
        >>> binding = bind(layer, "native_math")
        >>> binding
        Binding(Linear, 'native_math')
        >>> binding.remove()
    """
    if not isinstance(module, torch.nn.Module):
        msg = f"bind: found {type(module).__name__}; accepted: a torch.nn.Module, then the names of backends"
        raise AttnError(msg)
    choice = check(normalized(names))
    if isinstance(module.__dict__.get("forward"), _BoundForward):
        _unbind(module)
    bound = _BoundForward(module, choice)
    module.__dict__["forward"] = bound
    return Binding(module, bound)


def _unbind(module: torch.nn.Module) -> None:
    previous = module.__dict__.pop("forward").previous
    if previous is not None:
        module.__dict__["forward"] = previous
