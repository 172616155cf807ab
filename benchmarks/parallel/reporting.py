"""Tables in Markdown, results in JSON, and what they were measured on."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import torch


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    found = {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def table(title: str, columns: list[str], rows: list[list[object]]) -> None:
    """Print a table."""
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(_cell(item) for item in row) + " |", flush=True)


def keep(path: str | None, section: str, results: object) -> None:
    """Write what was measured, with the machine, to a file."""
    if path:
        found = {"section": section, "machine": machine(), "results": results}
        Path(path).write_text(json.dumps(found, indent=1) + "\n")


def _cell(item: object) -> str:
    if not isinstance(item, float):
        return str(item)
    return f"{item:.3f}" if abs(item) < 100 else f"{item:.0f}"
