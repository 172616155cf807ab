"""Stand-ins of both versions of sageattention, and a distribution that declares the backends for the CPU.

Where sageattention itself is installed there are none: an adapter module is bound to one library for the whole process.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from attn_core import registry

STAND_INS = Path(__file__).parent / "stand_ins"
FOR = {"attn_sage.first": "sageattention_first", "attn_sage.second": "sageattention_second"}

collect_ignore = []
if find_spec("sageattention") is not None:
    collect_ignore.append("test_sage.py")  # what it tests is tried over the stand-ins
else:
    sys.path.insert(0, str(STAND_INS))
    for adapter, stand_in in FOR.items():
        sys.modules["sageattention"] = import_module(stand_in)
        import_module(adapter)
        del sys.modules["sageattention"]
    registry.refresh()
