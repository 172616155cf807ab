"""The declarations of native_npu and native_xla, for the CPU, where stand-ins of their libraries run."""

from __future__ import annotations

from dataclasses import replace

from attn_core.plugin import hookimpl
from attn_native.specs.accelerators import NPU, XLA


def _on_cpu(spec):
    alternatives = tuple(replace(item, platforms={"cpu"}) for item in spec.alternatives)
    return replace(spec, name=f"{spec.name}_on_cpu", aliases=(), needs=None, constraints=alternatives)


@hookimpl
def attn_backends():
    yield from map(_on_cpu, (NPU, XLA))
