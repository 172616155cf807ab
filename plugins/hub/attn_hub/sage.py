"""The adapter of ``sage_hub``, sageattention 2 of the hub. Importing it loads the kernel, which has to be fetched before."""

from __future__ import annotations

from attn_hub.fetching import loaded
from attn_sage.adapting import Kernel, adapted

forward = adapted(
    Kernel("sage_hub", loaded("sage_hub").sageattn, 128, chooses_granularity=False, smooths=True, float8=True),
    "attn_hub",
)
