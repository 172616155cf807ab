"""Makes tables of the records that authors write, from the records and their docstrings."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any

from attn_core.declaration import (
    Approximate,
    BackendSpec,
    CapabilityRange,
    Constraints,
    ContextParallelSupport,
    Needs,
    No,
    Rule,
)
from attn_core.facts import DTYPES, MASKS, PLATFORMS, Facts

if TYPE_CHECKING:
    from collections.abc import Iterable

RECORDS = (BackendSpec, Constraints, ContextParallelSupport, Needs, Approximate, Facts)
REQUIRED: dict[str, Any] = {"platforms": {"cpu"}, "dtypes": {"float32"}, "masks": {"none"}}
"""Of ``Constraints``, which gives the abilities that are left out a reason when it is made."""

WORDS = {"PLATFORMS": PLATFORMS, "DTYPES": DTYPES, "MASKS": MASKS}


def record_table(name: str) -> str:
    """Return a table of a record's fields: type, what it is when left out, what it says."""
    (record,) = (record for record in RECORDS if record.__name__ == name)
    said = attributes(record)
    lines = ["| field | type | left out | what it says |", "| --- | --- | --- | --- |"]
    for field in fields(record):
        assert field.name in said, f"{name}.{field.name} has no word in its docstring"
        kind = str(field.type).removesuffix(" | None") if record is Constraints else str(field.type)
        lines.append(f"| `{field.name}` | {cell(f'`{kind}`')} | {left_out(record, field)} | {cell(said[field.name])} |")
    return "\n".join(lines)


def left_out(record: type[Any], field: Field[Any]) -> str:
    """Return what a field is when an author leaves it out."""
    if record is Constraints:
        constraints = Constraints(**REQUIRED)
        return "required" if field.name in REQUIRED else shown(getattr(constraints, field.name))
    if field.default is not MISSING:
        return shown(field.default)
    return "required" if field.default_factory is MISSING else shown(field.default_factory())


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
    text = f'No("{value}")' if isinstance(value, No) else repr(value).replace("'", '"')
    return f"`{text}`"


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return text.replace("|", "\\|")
