"""A choice of backend that belongs to a module.

A bound module gets a class of its own, derived from the one it had, whose ``forward`` opens the scope, as torch's
``parametrize`` and ``fully_shard`` give modules theirs. A ``forward`` put on the instance would be shared by its shallow
copies (``copy.copy``, the replicas of ``DataParallel``), which would then run the original's. Where there is one already it is
so as it is, and it gets the scope around it. Who has kept a ``forward`` of the module, of whichever time, to wrap it may go on
calling it: each opens the scope of the binding that there is by then, if there is one, around what it was made for.
"""

from __future__ import annotations

from functools import cache, partial, update_wrapper, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.nn.modules.lazy import LazyModuleMixin

from attn_core.errors import AttnError
from attn_core.selection import check, listed, normalized, use_backend

if TYPE_CHECKING:
    from collections.abc import Callable

    from attn_core.selection import Choice


class _Bound(NamedTuple):
    """The names that a module is bound to; each binding has one of its own."""

    names: tuple[str, ...]


class Binding:
    """What ``bind`` made; ``remove()`` takes it back."""

    def __init__(self, module: torch.nn.Module, bound: _Bound) -> None:
        self._module = module
        self._bound = bound

    def remove(self) -> None:
        """Take the binding back; does nothing when another has replaced it."""
        if self._module.__dict__.get("_attn_bound") is self._bound:
            _detach(self._module)

    def __repr__(self) -> str:
        names = self._bound.names
        return f"Binding({type(self._module).__name__}, {names[0] if len(names) == 1 else names!r})"


def bind(module: torch.nn.Module, *names: str) -> Binding:
    """Choose the backend for the calls made inside a module: whatever runs during its ``forward``, submodules included.

    The innermost of bindings and scopes wins, so a submodule with a binding of its own, or a scope opened inside, goes
    first. Binding again replaces the binding. It is copied and pickled with the module, shallow copies and the replicas of
    ``DataParallel`` included; parameters, hooks and the state dict stay as they are. While it is bound, the module is of a
    class derived from its own. Its ``forward`` may be wrapped by others before, meanwhile and afterwards
    (``module.forward = torch.compile(module.forward)``, the hooks of accelerate); one that is put in its place and does not
    call it is not bound until it is bound again.

    Args:
        module: a ``torch.nn.Module``. Methods called beside ``forward`` (``vae.decode``) are not inside: bind the
            submodules that they run, or open a scope.
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
    _check_module(module)
    choice = check(normalized(names))
    if "_attn_bound" in module.__dict__:
        _detach(module)
    return Binding(module, _attach(module, choice))


def _check_module(module: Any) -> None:
    accepted = "accepted: a torch.nn.Module, then the names of backends"
    if not isinstance(module, torch.nn.Module):
        msg = f"bind: found {type(module).__name__}; {accepted}"
        raise AttnError(msg)
    if isinstance(module, torch.jit.ScriptModule):
        msg = f"bind: found a {type(module).__name__}, whose code makes no call of attention; {accepted}"
        raise AttnError(msg)
    if type(module).forward is torch.nn.Module.forward and "forward" not in module.__dict__:
        msg = f"bind: found a {type(module).__name__}, which is never called itself; {accepted}. Bind each module in it"
        raise AttnError(msg)
    if isinstance(module, LazyModuleMixin) and module.cls_to_become is not None:
        msg = (
            f"bind: found a {type(module).__name__}, which changes its class at its first call; "
            f"{accepted}. Call it once, then bind it"
        )
        raise AttnError(msg)


def _attach(module: torch.nn.Module, choice: Choice) -> _Bound:
    bound = _Bound(listed(choice))
    module.__dict__["_attn_bound"] = bound
    own = _own_forward(module)
    if own is not None:
        scoped = partial(_inside, module, own)
        module.__dict__["forward"] = update_wrapper(scoped, own, updated=())  # a compiled one holds marks of Dynamo's
    kind: Any = type(module)
    if not hasattr(kind, "_attn_unbound"):
        module.__class__ = _bound_class(kind)
    return bound


def _detach(module: torch.nn.Module) -> None:
    del module.__dict__["_attn_bound"]
    own = _own_forward(module)
    if own is not None:
        module.__dict__["forward"] = own
    if "_attn_unbound" in vars(type(module)):  # not where another has derived a class from it since
        module.__class__ = vars(type(module))["_attn_unbound"]


def _own_forward(module: torch.nn.Module) -> Any:
    """The ``forward`` that was put on the instance, without the scope of a binding around it."""
    found = module.__dict__.get("forward")
    return found.args[1] if isinstance(found, partial) and found.func is _inside else found


def _inside(module: torch.nn.Module, forward: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    bound = getattr(module, "_attn_bound", None)
    if bound is None:
        return forward(*args, **options)
    with use_backend(*bound.names):
        return forward(*args, **options)


@cache
def _bound_class(unbound: Any) -> type[torch.nn.Module]:
    class Bound(unbound):  # type: ignore[misc]
        _attn_unbound = unbound
        _attn_bound: _Bound | None = None

        @wraps(unbound.forward)
        def forward(self, *args: Any, **options: Any) -> Any:
            bound = getattr(self, "_attn_bound", None)  # it may be kept by a wrapper when the binding is gone
            if bound is None:
                return unbound.forward(self, *args, **options)
            with use_backend(*bound.names):
                return unbound.forward(self, *args, **options)

        def __reduce_ex__(self, protocol: Any) -> Any:
            """As the class that pickle can find has it, and bound again where it is made."""
            make, given, *rest = super().__reduce_ex__(protocol)
            make, *given = (unbound if item is Bound else item for item in (make, *given))
            names = None if self._attn_bound is None else self._attn_bound.names
            return (_made_again, (names, make, *given), *rest)

    Bound.__name__, Bound.__qualname__ = unbound.__name__, unbound.__qualname__
    return cast("type[torch.nn.Module]", Bound)


def _made_again(names: tuple[str, ...] | None, make: Callable[..., Any], *given: Any) -> torch.nn.Module:
    module: torch.nn.Module = make(*given)
    if names is not None:
        _attach(module, names)
    return module
