"""The subcommands of ``attn``: each a module with ``add_arguments(parser)`` and ``run(arguments) -> exit status``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout


def look() -> None:
    """Find the backends. What a wheel prints meanwhile goes to stderr: it is no part of what the command is asked for."""
    from attn_core import registry

    with redirect_stdout(sys.stderr):
        registry.rows()
