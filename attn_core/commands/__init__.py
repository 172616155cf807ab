"""The subcommands of ``attn``: each a module with ``add_arguments(parser)`` and ``run(arguments) -> exit status``."""

from __future__ import annotations

import sys
import warnings
from contextlib import redirect_stdout


def need_no_numpy() -> None:
    """Leave out what torch warns of, once, where numpy is not installed: no command uses it."""
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)


def look() -> None:
    """Find the backends. What a wheel prints meanwhile goes to stderr: it is no part of what the command is asked for."""
    from attn_core import registry

    need_no_numpy()
    with redirect_stdout(sys.stderr):
        registry.rows()
