"""The command line: parses, hands over to one of ``attn_core.commands``, and turns errors into an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attn_core.errors import AttnError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "list-backends": "attn_core.commands.list_backends",
    "explain": "attn_core.commands.explain",
}

REFUSED = 2
INTERRUPTED = 130
_PIPE_CLOSED = 1


class _Version(argparse.Action):
    """Looks the version up when asked, and not on every run."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from attn_core import __version__

        parser.exit(message=f"attn {__version__}\n")


def parser_of() -> argparse.ArgumentParser:
    """Make the parser of ``attn`` and of its commands."""
    parser = argparse.ArgumentParser(
        prog="attn", description="attention backends: what is installed, and what a call would do"
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version of attn-core")
    commands = parser.add_subparsers(prog="attn", dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = import_module(module)
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.HELP))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``attn`` with these arguments, those of the process by default.

    Returns:
        The exit status: 0, or 2 where something was refused, with the reason on stderr.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal can't show is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    arguments = parser_of().parse_args(argv)
    try:
        status: int = import_module(COMMANDS[arguments.command]).run(arguments)
        sys.stdout.flush()
    except AttnError as error:
        print(f"attn: {error}", file=sys.stderr)  # noqa: T201
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # attn list-backends | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return _PIPE_CLOSED
    return status
