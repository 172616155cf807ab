"""The adapter of ``aiter_hub``. Importing it loads the kernel, which has to be fetched before."""

from __future__ import annotations

from attn_hub.calls import FlashKernel, flash
from attn_hub.fetching import loaded

forward = flash(FlashKernel(loaded("aiter_hub"), lse_option="return_lse", knows_deterministic=False))
