"""Stand-ins of both versions of sageattention, and a distribution that declares the backends for the CPU."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from attn_core import registry

STAND_INS = Path(__file__).parent / "stand_ins"
FOR = {"attn_sage.first": "sageattention_first", "attn_sage.second": "sageattention_second"}

sys.path.insert(0, str(STAND_INS))
for adapter, stand_in in FOR.items():
    own = sys.modules.pop("sageattention", None)
    sys.modules["sageattention"] = import_module(stand_in)
    import_module(adapter)
    del sys.modules["sageattention"]
    if own is not None:
        sys.modules["sageattention"] = own
registry.refresh()
