"""The adapter of ``sage_hub``, sageattention 2 of the hub. Importing it loads the kernel, which has to be fetched before.

Its CUDA kernels read 16 bytes at a time, and do not look whether they may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_core.shaping import aligned
from attn_hub.fetching import loaded
from attn_sage.adapting import Kernel, adapted

if TYPE_CHECKING:
    import torch

_sageattn = loaded("sage_hub").sageattn


def _run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    return _sageattn(aligned(query), aligned(key), aligned(value), **options)


forward = adapted(
    Kernel("sage_hub", _run, 128, chooses_granularity=False, smooths=True, float8=True),
    "attn_hub",
)
