"""Makes tables of the kit's checks and of recorded runs. The checks import torch, so their source is read instead."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ROOT = Path(__file__).parent.parent
TESTING = ROOT / "attn_core" / "testing"
RECORDS = ROOT / "docs" / "verified"
STATUSES = ("passed", "failed", "warned", "excused", "not checked")


def checks_table() -> str:
    """Return the kit's version and its checks in the order in which they run."""
    checks = [row for module in _constant("MODULES") for row in _checks(TESTING / "checks" / f"{module}.py")]
    head = f"Version {_constant('KIT')} of the kit has {len(checks)} kinds of checks:"
    return "\n".join([head, "", "| check | what it holds a backend to |", "| --- | --- |", *checks])


def _constant(name: str) -> Any:
    for node in _parse(TESTING / "checking.py").body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    msg = f"attn_core/testing/checking.py has no {name}"
    raise LookupError(msg)


def _checks(file: Path) -> Iterable[str]:
    for node in _parse(file).body:
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "check":
                assert isinstance(node, ast.FunctionDef)
                several = any(item.arg == "each" for item in mark.keywords)
                about = (ast.get_docstring(node) or "").partition("\n")[0].replace("``", "`")
                yield f"| `{ast.literal_eval(mark.args[0])}{'[...]' if several else ''}` | {about} |"


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def verified() -> str:
    """Return the recorded runs of the kit, the newest first."""
    files = sorted(RECORDS.glob("*.json"), key=lambda file: file.name, reverse=True)
    return "\n\n".join(_run(file) for file in files)


def hardware_runs() -> frozenset[str]:
    """Return the backends that a recorded run tried, whatever came out."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in RECORDS.glob("*.json")]
    return frozenset(name for record in records for name in record["backends"])


def _run(file: Path) -> str:
    record = json.loads(file.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    how = "quick" if record["quick"] else "full"
    alone = f", of {', '.join(record['only'])} alone" if record.get("only") else ""
    told = [f"### {record['date']}, {record['machine']}, kit {record['kit']}", ""]
    told += [f"{versions}. A {how} run with seed {record['seed']}{alone}: [{file.name}](verified/{file.name}).", ""]
    told += ["| backend | wheel | " + " | ".join(STATUSES) + " |", "| --- | --- |" + " ---: |" * len(STATUSES)]
    told += [_row(name, backend) for name, backend in record["backends"].items()]
    remarks = [line for name, backend in record["backends"].items() for line in _remarks(name, backend["outcomes"])]
    return "\n".join([*told, "", *remarks]).strip()


def _row(name: str, backend: Mapping[str, Any]) -> str:
    counts = Counter(outcome["status"] for outcome in backend["outcomes"] if "check" in outcome)
    numbers = " | ".join(str(counts[status]) for status in STATUSES)
    return f"| `{name}` | {backend['distribution']} {backend['version']} | {numbers} |"


def _remarks(name: str, outcomes: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """What failed or is excused, and, reason by reason, what could not be checked."""
    unchecked: dict[str, list[str]] = {}
    for outcome in outcomes:
        about, detail = outcome.get("check", "everything"), " ".join(outcome.get("detail", "").split())
        if outcome["status"] == "not checked":
            unchecked.setdefault(detail, []).append(f"`{about}`")
        elif outcome["status"] != "passed":
            yield f"- `{name}`, `{about}`, {outcome['status']}: {detail}"
    for reason, checks in unchecked.items():
        yield f"- `{name}`, not checked: {', '.join(checks)}: {reason}"
