"""Stand-ins of torch_npu and torch_xla, and a distribution that declares their backends for the CPU.

Where one of the two is itself installed there are none: an adapter module is bound to one library for the whole process.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from attn_core import registry

STAND_INS = Path(__file__).parent / "stand_ins"
DECLARED = Path(__file__).parent / "declared"


def load_adapters():
    """With the stand-ins, which are gone again afterwards: what is not installed has to look as if it were not."""
    sys.path.insert(0, str(STAND_INS))
    before = set(sys.modules)
    for adapter in ("attn_native.npu", "attn_native.xla"):
        import_module(adapter)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("torch_npu", "torch_xla"):
            del sys.modules[name]
    sys.path.remove(str(STAND_INS))


if find_spec("torch_npu") is None and find_spec("torch_xla") is None:
    load_adapters()
    sys.path.insert(0, str(DECLARED))
    registry.refresh()
