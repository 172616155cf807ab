"""The command line: parses, hands over to one of ``attn_core.commands``, and turns errors into an exit status."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attn_core.errors import AttnError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {  # the name, its module, and what it does; a module is imported when its command is asked for
    "list-backends": (
        "attn_core.commands.list_backends",
        "list every backend that is installed, with its status and what to do where it can't be used",
    ),
    "explain": (
        "attn_core.commands.explain",
        "say for each backend whether it would run a call with these shapes and options, and every reason why not",
    ),
    "check": (
        "attn_core.commands.check",
        "hold backends to what they declare, on this machine: the conformance kit",
    ),
    "new-backend": (
        "attn_core.commands.new_backend",
        "write the package of a new backend: declaration, kernel, tests",
    ),
}

REFUSED = 2
INTERRUPTED = 130
_PIPE_CLOSED = 1


class _Version(argparse.Action):
    """Looks the version up when asked, and not on every run."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from attn_core import __version__

        parser.exit(message=f"attn {__version__}\n")


def parser_of(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser of ``attn``; of its commands, only the one that these arguments ask for knows its options."""
    parser = argparse.ArgumentParser(
        prog="attn", description="attention backends: what is installed, and what a call would do"
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version of attn-core")
    commands = parser.add_subparsers(prog="attn", dest="command", metavar="COMMAND", required=True)
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        if name in arguments:
            import_module(module).add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``attn`` with these arguments, those of the process by default.

    Returns:
        The exit status: 0, or 2 where something was refused, with the reason on stderr.
    """
    gc.set_threshold(50_000)  # collecting while modules are imported takes a tenth of a short command's time
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal can't show is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser_of(given).parse_args(given)
    try:
        status: int = import_module(COMMANDS[arguments.command][0]).run(arguments)
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
