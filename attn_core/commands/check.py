"""``attn check``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from attn_core.errors import AttnError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from attn_core.testing.kit import Outcome

FAILED, NOT_CHECKED = 1, 3
"""Exit statuses: a check failed; nothing failed, but a backend could not be checked on this machine."""

_WIDTH = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = (
        "exit status: 0 all passed; 1 a check failed; 2 refused, as a name that nobody has; 3 nothing failed, but a backend "
        "can't be checked on this machine"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="backends; every installed one where none is given")
    parser.add_argument("--quick", action="store_true", help="fewer calls: seconds a backend")
    parser.add_argument("--device", help="such as cpu, cuda; the fastest that a backend declares where not given")
    parser.add_argument("--seed", type=int, default=0, help="where all choices come from; 0 where not given")
    parser.add_argument("--only", metavar="CHECK,...", help="these checks alone, such as causal,masks")
    parser.add_argument("--json", action="store_true", help="the outcomes as JSON, and no table")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="also write outcomes, date, device and versions there"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, showing how far it is, and print what came out."""
    from attn_core.testing.kit import checkable

    outcomes: list[Outcome] = []
    names = checkable(arguments.names)
    if arguments.only is not None:
        _require_known(names, _wanted(arguments))
    for name in names:
        outcomes += _checked(name, arguments)
    if arguments.record is not None:
        from attn_core.testing.recording import write

        write(arguments.record, outcomes, quick=arguments.quick, seed=arguments.seed)
    if arguments.json:
        from json import dumps

        from attn_core.testing.kit import as_data

        print(dumps(as_data(outcomes), indent=2))  # noqa: T201
    else:
        print(report(outcomes))  # noqa: T201
    return exit_status(outcomes)


def _checked(name: str, arguments: argparse.Namespace) -> list[Outcome]:
    from attn_core.testing.kit import check_backend

    found = []
    live = sys.stderr.isatty()
    wanted = _wanted(arguments)
    only = None if arguments.only is None else (lambda check: _is_meant(check, wanted))
    outcomes = check_backend(name, device=arguments.device, seed=arguments.seed, quick=arguments.quick, only=only)
    for outcome in outcomes:
        found.append(outcome)
        if live:
            _show(f"{outcome.backend}: {len(found)} checks, {outcome.check}")
    if live:
        _show("")
    return found


def _wanted(arguments: argparse.Namespace) -> list[str]:
    return [] if arguments.only is None else [word.strip() for word in re.split(r",(?![^\[]*\])", arguments.only)]


def _is_meant(check: str, wanted: Sequence[str]) -> bool:
    return check in wanted or check.partition("[")[0] in wanted


def _require_known(names: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a check that none of these backends has, and that is no check at all."""
    from difflib import get_close_matches

    from attn_core import registry
    from attn_core.testing.checking import checks_of, definitions

    specs = [spec for spec in (registry.meant(name).spec for name in names) if spec is not None]
    whole = dict.fromkeys(definition.name for definition in definitions())
    known = dict.fromkeys(check.identifier for spec in specs for check in checks_of(spec))
    for word in wanted:
        if word in whole or word in known:
            continue
        close = get_close_matches(word, [*whole, *known], n=1)
        step = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(whole)}"
        msg = f"--only: no check is called {word!r}. {step}"
        raise AttnError(msg)


def _show(text: str) -> None:
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)  # noqa: T201


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """What the process ends with."""
    from attn_core.testing import kit

    if any(outcome.status == kit.FAILED for outcome in outcomes):
        return FAILED
    if any(outcome.status == kit.NOT_CHECKED and not outcome.check for outcome in outcomes):
        return NOT_CHECKED
    return 0


def report(outcomes: Sequence[Outcome]) -> str:
    """A table of checks by backend, and then everything that is not as it should be."""
    from attn_core.testing import kit

    names = list(dict.fromkeys(outcome.backend for outcome in outcomes if outcome.check))
    by_place = {(outcome.check, outcome.backend): outcome.status for outcome in outcomes if outcome.check}
    marks = {
        kit.PASSED: "passed",
        kit.FAILED: "FAILED",
        kit.NOT_CHECKED: "-",
        kit.EXCUSED: "excused",
        kit.WARNED: "warned",
    }
    checks = list(dict.fromkeys(outcome.check for outcome in outcomes if outcome.check))
    width = max((min(len(check), _WIDTH) for check in checks), default=0)
    widths = [max(len(name), 7) for name in names]
    lines = [_line("Check", names, width, widths)] if names else []
    for check in checks:
        shown = check if len(check) <= _WIDTH else f"{check[: _WIDTH - 3]}..."
        lines.append(_line(shown, [marks.get(by_place.get((check, name), ""), "") for name in names], width, widths))
    return "\n".join([*lines, "", *_remarks(outcomes)]).strip()


def _line(first: str, cells: Sequence[str], width: int, widths: Sequence[int]) -> str:
    padded = (cell.ljust(size) for cell, size in zip(cells, widths, strict=True))
    return "  ".join([first.ljust(width), *padded]).rstrip()


def _remarks(outcomes: Sequence[Outcome]) -> list[str]:
    from attn_core.testing import kit

    lines = []
    for outcome in outcomes:
        if outcome.status in (kit.FAILED, kit.WARNED, kit.EXCUSED):
            lines += ["", f"{outcome.status}: {outcome.backend}, {outcome.check}: {outcome.detail}"]
            lines += [f"    {line}" for line in outcome.snippet.splitlines()]
    unable = [outcome for outcome in outcomes if outcome.status == kit.NOT_CHECKED and not outcome.check]
    lines += [f"{outcome.backend}: not checked: {outcome.detail}" for outcome in unable]
    for name in dict.fromkeys(outcome.backend for outcome in outcomes if outcome.check):
        own = [outcome.status for outcome in outcomes if outcome.backend == name and outcome.check]
        told = [
            f"{own.count(status)} {status}"
            for status in (kit.PASSED, kit.FAILED, kit.WARNED, kit.EXCUSED, kit.NOT_CHECKED)
        ]
        lines.append(f"{name}: {', '.join(item for item in told if not item.startswith('0 '))}")
    return lines
