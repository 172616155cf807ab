"""Writes what a run of the kit came to, with date, machine and versions, for others to read and repeat."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch
from packaging.requirements import Requirement

from attn_core import __version__, registry
from attn_core.installed import installed, normalized
from attn_core.testing.checking import KIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from attn_core.outcomes import Outcome


def write(
    file: Path, outcomes: Sequence[Outcome], *, quick: bool, seed: int, only: Sequence[str] | None = None
) -> None:
    """Write the outcomes of a run as JSON.

    Args:
        file: where to; an existing one is replaced.
        outcomes: of the run.
        quick: whether it was a quick one.
        seed: where its choices came from.
        only: the checks that it was confined to; None where it had all.
    """
    found = record(outcomes, quick=quick, seed=seed, only=only)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def record(outcomes: Iterable[Outcome], *, quick: bool, seed: int, only: Sequence[str] | None = None) -> dict[str, Any]:
    """The run as plain data: kit, date, machine, versions, and each backend's outcomes."""
    outcomes = list(outcomes)
    names = dict.fromkeys(outcome.backend for outcome in outcomes)
    rows = {row.name: row for row in registry.rows() if row.name in names}
    return {
        "kit": KIT,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "quick": quick,
        **({} if only is None else {"only": list(only)}),
        "seed": seed,
        "machine": machine(),
        "versions": versions(row.distribution for row in rows.values() if row.distribution is not None),
        "backends": {
            name: {
                "distribution": rows[name].distribution if name in rows else None,
                "version": rows[name].version if name in rows else None,
                "outcomes": [
                    {field: value for field, value in item.items() if field not in ("backend", "seconds") and value}
                    for item in [vars(outcome) for outcome in outcomes if outcome.backend == name]
                ],
            }
            for name in names
        },
    }


def machine() -> str:
    """The GPU where there is one, else the processor."""
    if torch.cuda.is_available():
        return (
            f"{torch.cuda.get_device_name()} (compute capability {'{}.{}'.format(*torch.cuda.get_device_capability())})"
        )
    return f"CPU, {platform.machine()}"


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Of Python, torch, attn, and what these wheels ask for."""
    found = {"python": platform.python_version(), "attn-core": __version__, "torch": torch.__version__}
    present = installed()
    lines = {line for name in distributions for line in (present[name].headers() or {}).get("requires-dist", [])}
    libraries = {normalized(Requirement(line).name) for line in lines}
    return {
        **found,
        **{name: present[name].version for name in sorted({*libraries, "triton"} - {"torch"}) if name in present},
    }
