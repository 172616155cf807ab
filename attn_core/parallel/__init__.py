"""One sequence over many devices: ring, ulysses, and both, over any backend that declares the pieces.

The names below are imported when first asked for, so that importing this package does not import torch.

Example:
    Run under ``torchrun``, each rank with the whole of q, k and v::

        mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("ring", "ulysses"))
        cp = ContextParallel(mesh)
        q, k, v = (cp.shard(x) for x in (q, k, v))
        out = cp.unshard(attention(q, k, v, causal=True, parallel=cp))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_core.parallel.context import ContextParallel
    from attn_core.parallel.scope import use_parallel

__all__ = ["ContextParallel", "use_parallel"]

_HOMES = {"ContextParallel": "context", "use_parallel": "scope"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib import import_module

    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
