"""``attn check``."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attn_core import outcomes as statuses
from attn_core import registry
from attn_core.commands import look
from attn_core.errors import AttnError
from attn_core.known import first_wheel

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from attn_core.outcomes import Outcome

FAILED, NOT_CHECKED = 1, 3
"""Exit statuses: a check failed; nothing failed, but of a backend nothing could be checked here."""

_WIDTH = 30
_NAMED = 4
"""How many checks are named of those that were left out for one reason."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = (
        "exit status: 0 all passed; 1 a check failed, or a declaration raises; 2 refused, as a name that nobody has; "
        "3 nothing failed, but of a backend nothing could be checked here"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="backends; every installed one where none is given")
    parser.add_argument("--quick", action="store_true", help="fewer calls: seconds for a backend")
    parser.add_argument("--device", help="such as cpu, cuda; the fastest that a backend declares where not given")
    parser.add_argument("--seed", type=int, default=0, help="where all choices come from; 0 where not given")
    parser.add_argument("--only", action="append", metavar="CHECK,...", help="these checks alone, such as causal,masks")
    parser.add_argument(
        "--processes",
        type=_count,
        metavar="N",
        help="how many backends at once; as many as there are processors where not given",
    )
    parser.add_argument("--json", action="store_true", help="the outcomes as JSON, and no table")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="also write outcomes, date, device and versions there"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, showing how far it is, and print what came out."""
    look()
    names = _once_each(_checkable(arguments.names))
    if arguments.only is not None:
        _require_known(names, _wanted(arguments))
    if arguments.record is not None:
        _require_writable(arguments.record)
    outcomes = _checked(names, arguments)
    if arguments.record is not None:
        from attn_core.testing.recording import write

        only = None if arguments.only is None else _wanted(arguments)
        write(arguments.record, outcomes, quick=arguments.quick, seed=arguments.seed, only=only)
    if arguments.json:
        from json import dumps

        print(dumps([vars(outcome) for outcome in outcomes], indent=2))  # noqa: T201
    else:
        print(report(outcomes))  # noqa: T201
    return exit_status(outcomes)


def _checkable(names: Sequence[str]) -> list[str]:
    """These names; where there are none, every installed backend that declares something."""
    for name in names:
        registry.meant(name)
    if names:
        return list(names)
    found = [row.qualified_name for row in registry.rows() if row.spec is not None and row.status != registry.DISABLED]
    if not found:
        msg = f"no backend is installed. Next: pip install {first_wheel()}"
        raise AttnError(msg)
    return found


def _once_each(names: Sequence[str]) -> list[str]:
    """The names without those that mean a backend that was named already."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(registry.meant(name).qualified_name, name)
    return list(first.values())


def _checked(names: Sequence[str], arguments: argparse.Namespace) -> list[Outcome]:
    """The outcomes, in the order of the names."""
    found: dict[str, list[Outcome]] = {}
    live = sys.stderr.isatty()
    for outcome in _outcomes(names, arguments):
        found.setdefault(outcome.backend, []).append(outcome)
        if live:
            _show(", ".join(f"{name}: {len(own)} checks" for name, own in found.items()))
    if live:
        _show("")
    order = {registry.meant(name).name: place for place, name in enumerate(names)}
    return [outcome for name in sorted(found, key=lambda name: order.get(name, 0)) for outcome in found[name]]


def _outcomes(names: Sequence[str], arguments: argparse.Namespace) -> Iterator[Outcome]:
    only = None if arguments.only is None else partial(_is_meant, wanted=_wanted(arguments))
    options = {"device": arguments.device, "seed": arguments.seed, "quick": arguments.quick, "only": only}
    if len(names) == 1 and not arguments.json:  # what a kernel prints would be in the midst of JSON
        from attn_core.testing.kit import check_backend

        return check_backend(names[0], **options)
    from attn_core.commands.processes import check_backends

    processors = _processors()
    processes = min(arguments.processes or processors, len(names))
    longest_first = sorted(names, key=lambda name: _compiles(name) == arguments.quick)
    return check_backends(longest_first, processes=processes, threads=max(1, processors // processes), **options)


def _compiles(name: str) -> bool:
    spec = registry.meant(name).spec
    return spec is not None and spec.first_call_compiles


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


def _wanted(arguments: argparse.Namespace) -> list[str]:
    given = ",".join(arguments.only or ())
    return [word for part in re.split(r",(?![^\[]*\])", given) if (word := part.strip())]


def _is_meant(check: str, wanted: Sequence[str]) -> bool:
    return check in wanted or check.partition("[")[0] in wanted


def _require_known(names: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a check that none of these backends has, and that is no check at all."""
    from difflib import get_close_matches

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


def _require_writable(file: Path) -> None:
    """Refuse before the run, and not after it, what can't be written to."""
    try:
        with file.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        msg = f"--record: {file} can't be written: {error.strerror}. Give a file in a folder that is there"
        raise AttnError(msg) from error


def _show(text: str) -> None:
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)  # noqa: T201


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """What the process ends with."""
    if any(outcome.status == statuses.FAILED for outcome in outcomes):
        return FAILED
    checked = {outcome.backend for outcome in outcomes if outcome.status != statuses.NOT_CHECKED}
    if not outcomes or any(outcome.backend not in checked for outcome in outcomes):
        return NOT_CHECKED
    return 0


def report(outcomes: Sequence[Outcome]) -> str:
    """A table of checks by backend, and then everything that is not as it should be."""
    if not outcomes:
        return "nothing was checked: the checks of --only are not for what these backends declare"
    names = list(dict.fromkeys(outcome.backend for outcome in outcomes if outcome.check))
    by_place = {(outcome.check, outcome.backend): outcome.status for outcome in outcomes if outcome.check}
    marks = {
        statuses.PASSED: "passed",
        statuses.FAILED: "FAILED",
        statuses.NOT_CHECKED: "-",
        statuses.EXCUSED: "excused",
        statuses.WARNED: "warned",
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


def _several(checks: Sequence[str]) -> str:
    """The first few of these checks, and how many there are beside; nothing where it is the backend as a whole."""
    named = [check for check in checks[:_NAMED] if check]
    more = f" and {len(checks) - _NAMED} others" if len(checks) > _NAMED else ""
    return f" ({', '.join(named)}{more})" if named else ""


def _remarks(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        if outcome.status in (statuses.FAILED, statuses.WARNED, statuses.EXCUSED):
            lines += ["", f"{outcome.status}: {outcome.backend}, {outcome.check}: {outcome.detail}"]
            lines += [f"    {line}" for line in outcome.snippet.splitlines()]
    unable: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.status == statuses.NOT_CHECKED:
            unable.setdefault((outcome.backend, outcome.detail), []).append(outcome.check)
    lines += [f"{name}: not checked{_several(checks)}: {reason}" for (name, reason), checks in unable.items()]
    for name in dict.fromkeys(outcome.backend for outcome in outcomes if outcome.check):
        own = [outcome.status for outcome in outcomes if outcome.backend == name and outcome.check]
        told = [
            f"{own.count(status)} {status}"
            for status in (statuses.PASSED, statuses.FAILED, statuses.WARNED, statuses.EXCUSED, statuses.NOT_CHECKED)
        ]
        lines.append(f"{name}: {', '.join(item for item in told if not item.startswith('0 '))}")
        lines += [f"{name}, {check}: {detail}" for check, detail in _how_much(name, outcomes)]
    return lines


def _how_much(name: str, outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str]]:
    """How large the covering set of a backend is, and the share of drawn calls that it refuses: of checks that passed."""
    own = [item for item in outcomes if item.backend == name and item.status == statuses.PASSED]
    sets = dict.fromkeys(
        item.detail.partition(", of ")[2] for item in own if item.check.partition("[")[0] == "combinations"
    )
    yield from (("combinations", told) for told in sets if told)
    yield from ((item.check, item.detail) for item in own if item.check == "declared-values")
