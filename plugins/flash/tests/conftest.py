"""Stand-ins of the libraries, installed as a distribution, before tests are collected: the kit reads declarations.

Where a real one is installed there are none: a process has one library of a name.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from attn_core import registry

collect_ignore = []
if any(find_spec(name) for name in ("flash_attn", "flash_attn_interface")):
    collect_ignore.append("test_libraries.py")  # what it tests is tried over the stand-ins
else:
    sys.path.insert(0, str(Path(__file__).parent / "standins"))
    registry.refresh()
