"""Shows rows: a table for people, JSON for programs."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TextIO

from attn_core.declaration import CapabilityRange, ContextParallelSupport, Limits, Needs, No, Rule
from attn_core.guard import plain
from attn_core.known import first_wheel

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from attn_core.declaration import BackendSpec
    from attn_core.record import Row

COLUMNS = ("Name", "Status", "Provided by", "Context parallel", "Reason")

UNVERIFIED = "not verified on hardware"

_GAP = "  "
_NARROWEST = 24


def width_of(stream: TextIO) -> int | None:
    """The width of a terminal in characters; None for what is none, such as a pipe or a file, where lines stay whole."""
    if not stream.isatty():
        return None
    from shutil import get_terminal_size

    return get_terminal_size().columns


def as_table(rows: Sequence[Row], width: int | None = None) -> str:
    """Rows as a table: name, status, wheel, ways of context parallel, reason with next step.

    Args:
        rows: as ``list_backends`` has them.
        width: where to wrap the last column; None leaves lines whole.
    """
    if not rows:
        return f"No backend wheel is installed. To begin with: pip install {first_wheel()}"
    lines = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS) - 1)]
    indent = sum(widths) + len(_GAP) * len(widths)
    shown = []
    for *cells, reason in lines:
        start = "".join(cell.ljust(size) + _GAP for cell, size in zip(cells, widths, strict=True))
        parts = _wrapped(reason, None if width is None else width - indent)
        shown += [(start + parts[0]).rstrip(), *(" " * indent + part for part in parts[1:])]
    return "\n".join(shown)


def as_json(rows: Sequence[Row]) -> str:
    """Rows as a JSON list of objects, each with every field and the whole declaration."""
    from json import dumps

    return dumps([as_data(row) for row in rows], indent=2)


def as_data(row: Row) -> dict[str, Any]:
    """Everything about a row as plain data."""
    return {
        "name": row.name,
        "status": row.status,
        "reason": row.reason,
        "next_step": row.next_step,
        "distribution": row.distribution,
        "version": row.version,
        "qualified_name": row.qualified_name,
        "aliases": list(row.aliases),
        "spec": None if row.spec is None else _spec(row.spec),
    }


def _cells(row: Row) -> tuple[str, ...]:
    ways = parallel_modes(row.spec) if row.spec else []
    owner = " ".join(part for part in (row.distribution, row.version) if part)
    reason = ": ".join(part for part in (row.reason, row.next_step) if part)
    if row.spec and row.spec.unverified:
        reason = "; ".join(part for part in (reason, f"{UNVERIFIED} ({row.spec.unverified})") if part)
    return tuple(map(plain, (row.name, row.status, owner, ", ".join(ways) or "-", reason)))


def parallel_modes(spec: BackendSpec) -> list[str]:
    """The ways of context parallel, each with a note where no gradients may be asked for."""
    differentiable = spec.parallel_modes(backward=True)
    return [mode if mode in differentiable else f"{mode} (forward only)" for mode in spec.parallel_modes()]


def _wrapped(text: str, width: int | None) -> list[str]:
    if width is None or width < _NARROWEST or len(text) <= width:
        return [text]
    from textwrap import wrap

    return wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _spec(spec: BackendSpec) -> dict[str, Any]:
    return {
        "api": spec.api,
        "summary": spec.summary,
        "forward": spec.forward,
        "backward": spec.backward,
        "autograd": spec.autograd,
        "needs": _plain(spec.needs),
        "compile": _plain(spec.compile),
        "first_call_compiles": spec.first_call_compiles,
        "unverified": spec.unverified,
        "numerics": {
            "approximate": spec.numerics.approximate,
            "error": getattr(spec.numerics, "error", None),
            "scores": getattr(spec.numerics, "scores", None),
        },
        "context_parallel": _plain(spec.context_parallel),
        "context_parallel_modes": {
            "forward": list(spec.parallel_modes()),
            "backward": list(spec.parallel_modes(backward=True)),
        },
        "constraints": [_plain(item) for item in spec.alternatives],
    }


def _plain(value: Any) -> Any:
    """Turn a value of a declaration into data: an ability into true, or false with the reason beside it."""
    if value is True or isinstance(value, No):
        return {"supported": bool(value), "reason": value.reason if isinstance(value, No) else None}
    if isinstance(value, (Limits, ContextParallelSupport, CapabilityRange, Needs)):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, range):
        lowest, highest = sorted((value[0], value[-1]))  # min() would go through all of it
        return {"minimum": lowest, "maximum": highest, "step": abs(value.step)}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return _plain_list(value) if isinstance(value, (frozenset, tuple)) else value


def _plain_list(values: Collection[Any]) -> list[Any]:
    plain_values = [item.text if isinstance(item, Rule) else _plain(item) for item in values]
    if isinstance(values, frozenset):  # its order is the hash seed's
        plain_values.sort(key=lambda item: (isinstance(item, list), item))
    return plain_values
