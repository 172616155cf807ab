"""Stand-ins of the libraries, installed as a distribution on disk, before tests are collected: the kit reads declarations."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

STANDINS = Path(__file__).parent / "standins"


def _install():
    folder = Path(tempfile.mkdtemp(prefix="attn-standins-"))
    metadata = folder / "attn_flash_standins-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: attn-flash-standins\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[attn.backends]\nstandins = standin_declaration\n")
    sys.path[:0] = [str(STANDINS), str(folder)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STANDINS), str(folder), os.environ.get("PYTHONPATH", "")])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]
    if "attn_core.registry" in sys.modules:
        sys.modules["attn_core.registry"].refresh()


_install()
