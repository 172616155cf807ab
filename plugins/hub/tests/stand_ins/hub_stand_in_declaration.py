"""The declarations of attn-hub, for the CPU, where kernels of the test's own repository run. All else is as declared."""

from __future__ import annotations

from dataclasses import replace

from attn_core.plugin import hookimpl
from attn_hub.declarations import AITER, FLASH, FLASH_3, FLASH_4, SAGE_BLACKWELL, SAGE_HUB


def _on_cpu(spec):
    alternatives = tuple(replace(item, platforms={"cpu"}, compute_capability=None) for item in spec.alternatives)
    return replace(
        spec, name=f"{spec.name}_on_cpu", aliases=(), needs=None, constraints=alternatives, first_call_compiles=False
    )


@hookimpl
def attn_backends():
    yield from map(_on_cpu, (FLASH, FLASH_3, FLASH_4, AITER, SAGE_HUB, SAGE_BLACKWELL))
