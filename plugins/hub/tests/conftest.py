"""A cache of kernel repositories of the tests' own, from which the real ``kernels`` package loads what the adapters ask for."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from attn_core import registry

STAND_INS = Path(__file__).parent / "stand_ins"
CACHE = Path(tempfile.mkdtemp(prefix="attn-hub-cache-"))
ADAPTERS = ("flash_2", "flash_3", "flash_4", "aiter", "sage", "sage_blackwell")

sys.path.insert(0, str(STAND_INS))


def load_adapters():
    from kernel_cache import commit_of, write_kernel, write_lock
    from kernel_sources import SOURCES

    os.environ["KERNELS_CACHE"] = str(CACHE)
    for repository, source in SOURCES.items():
        write_kernel(CACHE, repository, source)
    lock = write_lock(CACHE / "kernels.lock", {repository: commit_of(repository) for repository in SOURCES})
    settings = {"ATTN_ALLOW_REMOTE_KERNELS": "1", "ATTN_KERNELS_LOCK": str(lock)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    for adapter in ADAPTERS:
        import_module(f"attn_hub.{adapter}")
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


if find_spec("kernels") is not None:
    load_adapters()
registry.refresh()
