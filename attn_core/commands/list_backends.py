"""``attn list-backends``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from attn_core import listing, registry
from attn_core.commands import look
from attn_core.switches import Switches

if TYPE_CHECKING:
    import argparse

    from attn_core.record import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--json", action="store_true", help="the same as JSON, with the whole declarations")
    parser.add_argument(
        "--probe", action="store_true", help="import torch, load each kernel and make one tiny call on this machine"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the list."""
    look()
    rows = _probed() if arguments.probe else registry.list_backends()
    for line in Switches.from_environment().idle(rows):
        print(line, file=sys.stderr)  # noqa: T201
    print(listing.as_json(rows) if arguments.json else listing.as_table(rows, listing.width_of(sys.stdout)))  # noqa: T201
    return 0


def _probed() -> list[Row]:
    """Try each backend; which of them compile, and so take long, is said on stderr before."""
    import logging  # costs a short command a tenth of its time
    from contextlib import redirect_stdout

    log, handler = logging.getLogger("attn_core"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with redirect_stdout(sys.stderr):  # what a kernel prints
            return registry.list_backends(probe=True)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
