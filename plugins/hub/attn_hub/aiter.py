"""The adapter of ``aiter_hub``. Importing it loads the kernel, which has to be fetched before.

It has kernels for head dims of 64 and 128 alone; others are padded.
"""

from __future__ import annotations

from attn_hub.calls import Library, flash
from attn_hub.fetching import loaded

forward, _ = flash(
    Library("aiter_hub", loaded("aiter_hub"), step=64, lse_option="return_lse", knows_deterministic=False)
)
