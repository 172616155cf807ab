"""Facts about a thread or task that compiled code may ask for, and that it is compiled again for when they change.

Dynamo can't read a context variable. Where torch has reference objects with guards of their own, one whose guard reads the
fact makes compiled code follow it.
"""

from __future__ import annotations

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
        from torch._library.opaque_object import MemberType, register_opaque_type
        from torch._opaque_base import OpaqueBase

        kind = type(name, (OpaqueBase,), {"__module__": __name__, "now": lambda _: now()})
        register_opaque_type(kind, typ="reference", guard_fn=lambda _: [guard()], members={"now": MemberType.USE_REAL})
    except (ImportError, TypeError):  # a torch without them, or with an earlier form of them
        return None
    return kind()
