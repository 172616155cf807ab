"""``attn new-backend``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attn_core.scaffold import KINDS, package_of, write

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = "kinds: " + "; ".join(f"{name}, {kind.about}" for name, kind in KINDS.items())
    parser.add_argument("name", metavar="NAME", help="of the backend, such as acme; the package is then acme-attn")
    parser.add_argument(
        "--kind", choices=KINDS, default="eager", help="what its kernel is to be; eager where not given"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), metavar="PATH", help="where to make NAME-attn; here where not given"
    )
    parser.add_argument(
        "--library", metavar="MODULE", help="with --kind library, the module to wrap; NAME_kernels where not given"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the package, and print what to type next."""
    from shlex import quote

    target = write(arguments.name, arguments.kind, arguments.folder, arguments.library)
    package = package_of(arguments.name)
    print(  # noqa: T201
        f"{target} is written. Put your kernel into {package}/kernel.py, and its facts into {package}/plugin.py.\n\n"
        f"  cd {quote(str(target))}\n"
        f"  pip install -e '.[test]'\n"
        f"  attn list-backends\n"
        f"  pytest\n"
        f"  attn check {arguments.name}\n"
        f"  python -m build"
    )
    return 0
