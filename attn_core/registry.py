"""Which row a name means: names, aliases, ``distribution:name``, and what to say where it means none or several."""

from __future__ import annotations

import sys
from dataclasses import replace
from threading import RLock
from typing import TYPE_CHECKING, NamedTuple

from attn_core import installed
from attn_core.discovery import discover
from attn_core.errors import BackendNotUsable
from attn_core.known import first_wheel, known_wheels
from attn_core.record import (
    AMBIGUOUS,
    AVAILABLE,
    BROKEN,
    DISABLED,
    INCOMPATIBLE,
    MISSING,
    NOT_INSTALLED,
    UNSUPPORTED,
    WORKS,
    Row,
)
from attn_core.switches import Switches

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "AMBIGUOUS",
    "AVAILABLE",
    "BROKEN",
    "DISABLED",
    "INCOMPATIBLE",
    "MISSING",
    "NOT_INSTALLED",
    "UNSUPPORTED",
    "WORKS",
    "Row",
    "close_match",
    "find",
    "known_rows",
    "knows",
    "list_backends",
    "meant",
    "mistyped",
    "probe",
    "refresh",
    "rows",
]

_LIST = "attn list-backends shows what is installed"


class Table(NamedTuple):
    """What discovery found: each row by itself, and as it is shown where several claim its name."""

    own: tuple[Row, ...]
    shown: tuple[Row, ...]


_lock = RLock()
_state: dict[str, Table | None] = {}
_LOOKING = "looking"
_TABLE = "table"


def list_backends(*, probe: bool = False) -> list[Row]:
    """A row for each backend of each installed wheel, in order of name.

    Args:
        probe: also try each available one on this machine, which imports torch and loads each kernel.

    Example:
        >>> [row.status for row in list_backends() if row.name == "native"]
        ['available']
    """
    return [_tried(row) for row in rows()] if probe else list(rows())


def probe(row: Row) -> Row:
    """Try an available backend with one tiny call on this machine: works, unsupported or broken. Other rows stay."""
    return _tried(row)


def _tried(row: Row) -> Row:
    from attn_core.probe import probe  # imports torch

    return probe(row)


def rows() -> tuple[Row, ...]:
    """Every row, discovered once in this process."""
    return _table().shown


def known_rows() -> tuple[Row, ...]:
    """Every row, and one for each backend of a wheel that attn knows of and that is not installed."""
    return (*rows(), *_rows_elsewhere())


def refresh() -> None:
    """Forget everything, so that the next question looks again."""
    with _lock:
        _state.clear()
        installed.forget()
        call = sys.modules.get("attn_core.call")
        if call is not None:  # what was admitted before may not be any more
            call.forget()


def find(name: str) -> Row:
    """Find the available backend that a name means: a name, an alias or ``distribution:name``.

    Raises:
        BackendNotUsable: nobody or several have that name, or its backend is not available; the message says what to do.

    Example:
        >>> find("attn-native:native").name
        'native'
    """
    row = meant(name)
    if row.status != AVAILABLE:
        raise BackendNotUsable(_unavailable(name, row))
    return row


def meant(name: str) -> Row:
    """Find the backend that a name means, usable or not.

    Raises:
        BackendNotUsable: nobody or several have that name.
    """
    found = _meant_by(name)
    if not found:
        raise BackendNotUsable(_unknown(name))
    if len(found) > 1:
        raise BackendNotUsable(_claimed(name, found))
    return found[0]


def knows(name: str) -> bool:
    """Whether a name means something: an installed backend, usable or not, or one of a known wheel."""
    return bool(_meant_by(name)) or _found_elsewhere(name) is not None


def close_match(name: str) -> str | None:
    """Find the known name that a mistyped one comes closest to, if any comes close."""
    from difflib import get_close_matches

    known = {row.name for row in known_rows()}.union(*(row.aliases for row in rows()))
    if ":" in name:
        known = {row.qualified_name for row in rows()}
    matches = get_close_matches(name.lower(), sorted(known), n=1)
    return matches[0] if matches else None


def mistyped(name: str) -> bool:
    """Whether nobody has this name while a known one comes close to it: refused even in a list of several."""
    return not knows(name) and close_match(name) is not None


# --- the table --------------------------------------------------------------------------------------------------------


def _table() -> Table:
    found = _state.get(_TABLE)
    return found if found is not None else _discovered()


def _discovered() -> Table:
    with _lock:
        found = _state.get(_TABLE)
        if found is not None:
            return found
        if _LOOKING in _state:
            msg = "a declaration asked for the list of backends, which is made from the declarations; let it ask later"
            raise BackendNotUsable(msg)
        _state[_LOOKING] = None
        try:
            switches = Switches.from_environment()
            own = discover(switches, known_wheels() if switches.only else {})
        finally:
            del _state[_LOOKING]
        found = _state[_TABLE] = Table(own, tuple(_shown(row, own) for row in own))
        return found


def _claims(row: Row) -> bool:
    return row.spec is not None and row.status != DISABLED


def _shown(row: Row, own: Iterable[Row]) -> Row:
    if not _claims(row):
        return row
    claimants = [other for other in own if _claims(other) and row.name in _words(other, row)]
    if len(claimants) == 1:
        return row
    reason = f"claimed by {_listed(other.distribution or '' for other in claimants)}"
    return replace(row, status=AMBIGUOUS, reason=reason, next_step=_either(claimants))


# --- names ------------------------------------------------------------------------------------------------------------


def _words(other: Row, row: Row) -> set[str]:
    """What a row is called by, seen from another: of its own distribution a name beats an alias."""
    return {other.name} if other.distribution == row.distribution else {other.name, *other.aliases}


def _meant_by(name: str) -> list[Row]:
    """Find the rows that a name may mean. A declared backend beats an entry point that failed.

    Inside one distribution a name beats an alias. Between two it does not: what the alias has meant would silently mean
    another kernel as soon as the other wheel is installed.
    """
    own: Iterable[Row] = _table().own
    owner, colon, word = name.partition(":")
    if colon:
        own = [row for row in own if row.distribution == installed.normalized(owner)]
    else:
        word = name
    declared = [row for row in own if row.spec is not None]
    named = [row for row in declared if row.name == word]
    by_alias = [row for row in declared if word in row.aliases and all(word in _words(row, item) for item in named)]
    if named and all(row.status == DISABLED for row in named):
        return named  # an alias never stands in for a name that is switched off
    found = [*named, *by_alias]
    if found:
        return [row for row in found if row.status != DISABLED] or found
    return [row for row in own if row.spec is None and row.name == word][:1]


def _claimed(name: str, found: list[Row]) -> str:
    owners = _listed(row.distribution or "" for row in found)
    return f"backend {name!r} is ambiguous: claimed by {owners}, and none of them wins: {_either(found)}"


def _either(claimants: Iterable[Row]) -> str:
    names = " or ".join(dict.fromkeys(row.qualified_name for row in claimants))
    return f"write {names}, or switch one off with ATTN_DISABLE"


def _unavailable(name: str, row: Row) -> str:
    alias = "" if row.name in (name, name.partition(":")[2]) else f" (alias {name})"
    return f"backend {row.name}{alias} of {row.distribution} {row.version} is {row.status}: {row.reason}. Next: {row.next_step}"


def _unknown(name: str) -> str:
    elsewhere = _found_elsewhere(name)
    if elsewhere is not None:
        return f"backend {name!r} comes with {elsewhere.distribution}, which is not installed: {elsewhere.next_step}"
    for wheel, names in known_wheels().items():
        if name in names:
            return _not_brought(name, wheel)
    if not rows():
        return f"backend {name!r} is not known, and no backend wheel is installed: pip install {first_wheel()}"
    if "," in name:
        several = ", ".join(repr(word.strip()) for word in name.split(",") if word.strip())
        return f"backend {name!r} is not known. Several names, in order of preference, are written ({several}). {_LIST}"
    if name.startswith(":") or name.endswith(":"):
        return f"backend {name!r} is not known; accepted: a name, an alias, or distribution:name. {_LIST}"
    match = close_match(name)
    hint = (
        f" Did you mean {match!r}?"
        if match
        else f" Known here: {', '.join(dict.fromkeys(row.name for row in rows()))}."
    )
    return f"backend {name!r} is not known.{hint} {_LIST}"


def _not_brought(name: str, wheel: str) -> str:
    """Say why a wheel that is installed does not bring what it is known for."""
    failed = [row for row in rows() if row.distribution == wheel and row.spec is None]
    if failed:
        row = failed[0]
        return f"backend {name!r} comes with {wheel} {row.version}, which is {row.status}: {row.reason}. Next: {row.next_step}"
    version = installed.installed()[wheel].version
    step = f"pip install --upgrade {wheel}"
    return f"backend {name!r} comes with another version of {wheel} than {version}, which is installed: {step}"


def _listed(distributions: Iterable[str]) -> str:
    return " and ".join(sorted(set(distributions)))


def _rows_elsewhere() -> list[Row]:
    here = installed.installed()
    return [
        Row(name, NOT_INSTALLED, f"comes with {wheel}", f"pip install {wheel}", wheel)
        for wheel, names in known_wheels().items()
        if wheel not in here
        for name in names
    ]


def _found_elsewhere(name: str) -> Row | None:
    """Find the backend of a known wheel that is not here, by its name or ``distribution:name``."""
    owner, colon, word = name.rpartition(":")
    return next(
        (
            row
            for row in _rows_elsewhere()
            if row.name == word and (not colon or row.distribution == installed.normalized(owner))
        ),
        None,
    )
