"""What the user switched off: ``ATTN_DISABLE`` and ``ATTN_ONLY``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from attn_core.installed import normalized

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from attn_core.record import Row

DISABLE = "ATTN_DISABLE"
ONLY = "ATTN_ONLY"


class Switches(NamedTuple):
    """Names, distributions or ``distribution:name``; ``only`` is None where everything may be used."""

    disable: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    @classmethod
    def from_environment(cls) -> Switches:
        """Read both variables; empty is as good as unset."""
        return cls(_items(DISABLE), _items(ONLY) or None)

    def distribution_off(self, distribution: str, names: Collection[str], *, unexplained: bool) -> str | None:
        """Why a distribution is switched off as a whole, so that its code does not run; None where it isn't.

        Args:
            distribution: its normalised name.
            names: what it is known to bring without running it.
            unexplained: whether ``ATTN_ONLY`` has a name that nobody is known to bring, so that all have to be asked.
        """
        if any(normalized(item) == distribution for item in self.disable):
            return f"named in {DISABLE}"
        if self.only is None or unexplained:
            return None
        owners = [normalized(item.partition(":")[0].strip()) for item in self.only]
        if distribution in owners or any(item in names for item in self.only):
            return None
        return f"left out of {ONLY}"

    def backend_off(self, distribution: str, names: Collection[str]) -> str | None:
        """Why one backend is switched off; ``names`` are its name and its aliases."""
        if any(_concerns(item, distribution, names) for item in self.disable):
            return f"named in {DISABLE}"
        if self.only is None or any(_concerns(item, distribution, names) for item in self.only):
            return None
        return f"left out of {ONLY}"

    def unexplained(self, known: Collection[str]) -> bool:
        """Whether ``ATTN_ONLY`` has a backend's name beyond these: distributions, and what they are known to bring.

        What is no plain word, as ``acme-attn`` isn't, can only be a distribution, and makes nobody's code run.
        """
        return any(
            item.isidentifier() and item not in known and normalized(item) not in known for item in self.only or ()
        )

    def idle(self, rows: Iterable[Row]) -> list[str]:
        """What concerns none of these rows, each with its variable: a slip of the keyboard would switch nothing off."""
        shown = [(row.distribution or "", (row.name, *row.aliases)) for row in rows]
        return [
            f"{variable}: {item!r} matches no row of the list"
            for variable, items in ((DISABLE, self.disable), (ONLY, self.only or ()))
            for item in items
            if not any(_concerns(item, distribution, names) for distribution, names in shown)
        ]


def _items(variable: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in os.environ.get(variable, "").split(",") if item.strip())


def _concerns(item: str, distribution: str, names: Collection[str]) -> bool:
    owner, colon, name = item.partition(":")
    if colon:
        return normalized(owner.strip()) == distribution and name.strip() in names
    return item in names or normalized(item) == distribution
