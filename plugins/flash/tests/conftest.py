"""Stand-ins of the libraries, installed as a distribution, before tests are collected: the kit reads declarations."""

from __future__ import annotations

import sys
from pathlib import Path


def _install():
    sys.path.insert(0, str(Path(__file__).parent / "standins"))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]  # the real one, where it is installed
    if "attn_core.registry" in sys.modules:
        sys.modules["attn_core.registry"].refresh()


_install()
