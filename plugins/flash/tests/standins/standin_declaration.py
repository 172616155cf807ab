"""The declarations of the wheel, of libraries that stand in for the real ones: on a CPU, and otherwise the same."""

from __future__ import annotations

from dataclasses import replace

from attn_core.plugin import hookimpl
from attn_flash.specs import FLASH, FLASH_3, FLASH_4


def on_cpu(spec):
    """As the first alternative has it, and the backend is called by another name."""
    first = replace(spec.alternatives[0], platforms={"cpu"}, compute_capability=None)
    return replace(
        spec, name=f"{spec.name}_standin", aliases=(), needs=None, constraints=first, first_call_compiles=False
    )


@hookimpl
def attn_backends():
    yield from map(on_cpu, (FLASH, FLASH_3, FLASH_4))
