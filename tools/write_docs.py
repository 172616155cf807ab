"""Write what is generated in the docs: ``python tools/write_docs.py --write``, or ``--check`` that it is as it would be.

In the docs it stands between ``<!-- begin: KIND ARGUMENT (written by tools/write_docs.py) -->`` and ``<!-- end -->``. Imports
no torch. The wheels of this repository have to be installed.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attn_core.commands import check, new_backend
from attn_core.scaffold import KINDS
from backend_table import find_specs, table
from kit_tables import checks_table, verified
from record_tables import cell, record_table, small_records, words_table

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"(<!-- begin: (\S+)(?: ([^\n]+?))? \(written by tools/write_docs\.py\) -->\n).*?(<!-- end -->)", re.DOTALL
)
COMMANDS = {"check": check, "new-backend": new_backend}


def quote(argument: str) -> str:
    """Return a file as it is."""
    text = (ROOT / argument).read_text(encoding="utf-8").rstrip()
    return f"```{Path(argument).suffix.removeprefix('.').replace('py', 'python')}\n{text}\n```"


def quote_table(argument: str) -> str:
    """Return one table of a TOML file, given as ``FILE TABLE``."""
    file, _, name = argument.partition(" ")
    text = (ROOT / file).read_text(encoding="utf-8")
    return f"```toml\n[{name}]\n{text.partition(f'[{name}]')[2].partition('[')[0].strip()}\n```"


def quote_signature(argument: str) -> str:
    """Return the signature of a function, given as ``FILE:FUNCTION``, without what linters are told."""
    file, _, name = argument.partition(":")
    text = (ROOT / file).read_text(encoding="utf-8")
    (node,) = (item for item in ast.parse(text).body if isinstance(item, ast.FunctionDef) and item.name == name)
    lines = text.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    signature = "\n".join(re.sub(r"# noqa: \w+ - ", "# ", line) for line in lines)
    return f"```python\n{signature} ...\n```"


def kinds(_: str) -> str:
    """Return the kinds of packages that ``attn new-backend`` writes."""
    return "\n".join(f"- `--kind {name}`: {kind.about}" for name, kind in KINDS.items())


class Options:
    """Stands in for a parser, and keeps what a command declares."""

    def __init__(self) -> None:
        self.rows = ["| argument | which says |", "| --- | --- |"]

    def add_argument(self, *names: str, **given: Any) -> None:
        """Keep an argument as a row of a table."""
        value = given.get("metavar") or "|".join(given.get("choices", ()))
        value = value or ("" if "action" in given else names[0].strip("-").upper())
        shown = " ".join(filter(None, (names[0] if names[0].startswith("-") else "", value)))
        self.rows.append(f"| {cell(f'`{shown}`')} | {cell(given['help'])} |")


def options(argument: str) -> str:
    """Return the arguments of a command of ``attn``."""
    found = Options()
    COMMANDS[argument].add_arguments(cast("argparse.ArgumentParser", found))
    return "\n".join(found.rows)


GENERATED: dict[str, Callable[[str], str]] = {
    "backends": lambda argument: table(find_specs(argument)),
    "checks": lambda _: checks_table(),
    "kinds": kinds,
    "options": options,
    "quote": quote,
    "record": record_table,
    "signature": quote_signature,
    "small-records": lambda _: small_records(),
    "table": quote_table,
    "verified": lambda _: verified(),
    "words": lambda _: words_table(),
}


def written(text: str) -> str:
    """Return a page with everything that is generated made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{GENERATED[found[2]](found[3] or '')}\n{found[4]}", text)


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="put it into the docs")
    what.add_argument("--check", action="store_true", help="fail where the docs have something else")
    arguments = parser.parse_args()
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        found = page.read_text(encoding="utf-8")
        made = written(found)
        if arguments.write:
            page.write_text(made, encoding="utf-8")
        elif found != made:
            stale.append(page.relative_to(ROOT).as_posix())
    if stale:
        print(f"{', '.join(stale)}: not what the code says; run: python tools/write_docs.py --write")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
