"""``attn list-backends``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from attn_core import listing, registry

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--json", action="store_true", help="the same as JSON, with the whole declarations")
    parser.add_argument(
        "--probe", action="store_true", help="import torch, load each kernel and make one tiny call on this machine"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the list."""
    rows = registry.list_backends(probe=arguments.probe)
    print(listing.as_json(rows) if arguments.json else listing.as_table(rows, listing.width_of(sys.stdout)))  # noqa: T201
    return 0
