"""The row that each backend has in the list, and the statuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_core.declaration import BackendSpec

AVAILABLE = "available"
"""What it needs is installed; not tried."""
MISSING = "missing"
"""Something that it needs is not installed."""
INCOMPATIBLE = "incompatible"
"""Something that it needs has another version, or it needs another core."""
BROKEN = "broken"
"""Its declaration or its library raises, or does what no backend may."""
AMBIGUOUS = "ambiguous"
"""Several distributions claim the name."""
DISABLED = "disabled"
"""Switched off by ATTN_DISABLE or ATTN_ONLY."""
WORKS = "works"
"""Tried on this machine, with the right result."""
UNSUPPORTED = "unsupported"
"""Not for this machine."""
NOT_INSTALLED = "not installed"
"""Brought by a wheel that attn knows of and that is not here."""


@dataclass(frozen=True)
class Row:
    """One backend, or one entry point whose backends can't be known.

    Attributes:
        name: the backend's name; the entry point's where the declaration can't be had.
        status: one of the words above.
        reason: why it has that status; empty where there is nothing to say.
        next_step: what to do about it.
        distribution: normalised name of the wheel that brings it.
        version: the wheel's.
        spec: the declaration, where it could be had.
    """

    name: str
    status: str
    reason: str = ""
    next_step: str = ""
    distribution: str | None = None
    version: str | None = None
    spec: BackendSpec | None = None

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names of the same backend, in order."""
        return () if self.spec is None else tuple(sorted(self.spec.aliases))

    @property
    def qualified_name(self) -> str:
        """``distribution:name``, which is never ambiguous."""
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        why = ": ".join(part for part in (self.reason, self.next_step) if part)
        return f"{self.name} is {self.status}" + (f": {why}" if why else "")
