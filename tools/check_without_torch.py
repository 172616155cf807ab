"""Check, in an environment with the wheels but without torch, that listing works and says what is missing."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path


def list_backends() -> list[dict[str, str]]:
    """Ask the command line, as a person would."""
    command = [str(Path(sys.executable).with_name("attn")), "list-backends", "--json"]
    rows: list[dict[str, str]] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return rows


def check() -> str:
    """Return a line about what was found."""
    assert find_spec("torch") is None, "torch is installed here, so that its absence can't be tried"
    import attn_core

    points = sorted(f"{point.name} = {point.value}" for point in entry_points(group="attn.backends"))
    assert points, "no entry point of the group attn.backends"
    assert attn_core.__version__
    rows = list_backends()
    assert rows, "attn list-backends lists nothing"
    for row in rows:
        assert row["status"] == "missing", f"{row['name']} is {row['status']} without torch: {row['reason']}"
        assert "torch" in row["reason"], f"{row['name']} does not say that torch is missing: {row['reason']}"
    names = ", ".join(row["name"] for row in rows)
    return f"Python {platform.python_version()}: {'; '.join(points)}; without torch each says so: {names}"


if __name__ == "__main__":
    print(check())
