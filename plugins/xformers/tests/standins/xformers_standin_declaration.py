"""The declarations of the wheel, of a library that stands in for the real one: on a CPU, and otherwise the same."""

from __future__ import annotations

from dataclasses import replace

from attn_core.plugin import hookimpl
from attn_xformers.specs import CUTLASS, FLASH, SPLITK, XFORMERS


def on_cpu(spec):
    newest = [item for item in spec.alternatives if (9, 0) in item.compute_capability]
    alternatives = [replace(item, platforms={"cpu"}, compute_capability=None) for item in newest]
    return replace(spec, name=f"{spec.name}_standin", needs=None, constraints=alternatives, first_call_compiles=False)


@hookimpl
def attn_backends():
    yield from map(on_cpu, (XFORMERS, CUTLASS, FLASH, SPLITK))
