"""Facts about a thread or task that compiled code may ask for, and that it is compiled again for when they change.

Dynamo can't read a context variable. Where torch has reference objects with guards of their own, one whose guard reads the
fact makes compiled code follow it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def guarded(name: str, now: Callable[[], Any], guard: Callable[[], Any]) -> Any:
    """An object whose ``now()`` compiled code may ask; None on a torch without such objects, before 2.11.

    Args:
        name: of its class.
        now: what is so, as plain constants.
        guard: the same, without side effects.
    """
    try:
        opaque: Any = import_module("torch._library.opaque_object")
        if hasattr(opaque, "register_custom_class"):  # torch 2.14 prints a warning for each of the names before it
            base, register, typ = opaque.CustomClassBase, opaque.register_custom_class, "symbolic"
        else:
            base, register = import_module("torch._opaque_base").OpaqueBase, opaque.register_opaque_type
            typ = "reference"
        kind = type(name, (base,), {"__module__": __name__, "now": lambda _: now()})
        register(kind, typ=typ, guard_fn=lambda _: [guard()], members={"now": opaque.MemberType.USE_REAL})
    except (ImportError, AttributeError, TypeError):  # a torch without them, or with an earlier form of them
        return None
    return kind()
