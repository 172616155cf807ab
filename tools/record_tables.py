"""Makes tables of the records that authors write, from the records and their docstrings."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from attn_core.declaration import (
    Approximate,
    BackendSpec,
    CapabilityRange,
    Constraints,
    ContextParallelSupport,
    Limits,
    Needs,
    No,
    Rule,
)
from attn_core.facts import DTYPES, MASKS, PLATFORMS, Facts

if TYPE_CHECKING:
    from collections.abc import Iterable

_CONSTRAINTS: dict[str, Any] = {"platforms": {"cpu"}, "dtypes": {"float32"}, "masks": {"none"}}
_SPEC: dict[str, Any] = {"api": 1, "name": "x", "summary": "x", "forward": "x:x"}

RECORDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "BackendSpec": (BackendSpec, {**_SPEC, "constraints": Constraints(**_CONSTRAINTS)}),
    "Constraints": (Constraints, _CONSTRAINTS),
    "ContextParallelSupport": (ContextParallelSupport, {}),
    "Needs": (Needs, {"extra": "x"}),
    "Approximate": (Approximate, {"error": 0.1}),
    "Facts": (Facts, {}),
}
"""Each record, with the least that makes one: what stands in there is required, unless it is one of several ways."""

OPTIONAL = {("Needs", "extra")}
WORDS = {"PLATFORMS": PLATFORMS, "DTYPES": DTYPES, "MASKS": MASKS}


def record_table(name: str) -> str:
    """Return a table of a record's fields: type, what it is when left out, what it says."""
    record, least = RECORDS[name]
    said = attributes(record)
    whole = record(**least)
    required = set(least) - {field for owner, field in OPTIONAL if owner == name}
    lines = ["| field | type | left out | what it says |", "| --- | --- | --- | --- |"]
    for field in fields(record):
        assert field.name in said, f"{record.__name__}.{field.name} has no word in its docstring"
        default = "required" if field.name in required else f"`{shown(getattr(whole, field.name))}`"
        kind = str(field.type).removesuffix(" | None") if issubclass(record, Limits) else str(field.type)
        lines.append(f"| `{field.name}` | {code(kind)} | {cell(default)} | {cell(said[field.name])} |")
    return "\n".join(lines)


def words_table() -> str:
    """Return the words that a declaration is written in."""
    return "\n".join(f"- `{name}`: {', '.join(f'`{word}`' for word in words)}" for name, words in WORDS.items())


def small_records() -> str:
    """Return what the small records say of themselves."""
    return "\n".join(f"- `{record.__name__}`: {summary(record)}" for record in (No, Rule, CapabilityRange))


def summary(record: type[Any]) -> str:
    """Return the first paragraph of a docstring."""
    return plain_code(" ".join((inspect.getdoc(record) or "").partition("\n\n")[0].split()))


def attributes(record: type[Any]) -> dict[str, str]:
    """Return what docstrings say of each field, those of the classes that a record is derived from included."""
    found: dict[str, str] = {}
    for owner in reversed(record.__mro__):
        found |= dict(_attributes(inspect.cleandoc(owner.__doc__ or "")))
    return found


def _attributes(doc: str) -> Iterable[tuple[str, str]]:
    block = re.search(r"^Attributes:\n((?: .*\n?|\n)+)", doc, flags=re.MULTILINE)
    for entry in re.split(r"^    (?=\w)", block[1], flags=re.MULTILINE)[1:] if block else ():
        name, _, text = entry.partition(": ")
        yield name, plain_code(" ".join(text.split()))


def plain_code(text: str) -> str:
    """Return a docstring's text as Markdown."""
    return text.replace("``", "`")


def shown(value: object) -> str:
    """Return a default as an author writes it."""
    return f'No("{value}")' if isinstance(value, No) else repr(value).replace("'", '"')


def code(text: str) -> str:
    """Return code for a cell of a table."""
    return cell(f"`{text}`")


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return text.replace("|", "\\|")
