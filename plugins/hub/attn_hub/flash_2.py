"""The adapter of ``flash_hub``. Importing it loads the kernel, which has to be fetched before."""

from __future__ import annotations

from attn_hub.calls import FlashKernel, flash
from attn_hub.fetching import loaded

forward = flash(FlashKernel(loaded("flash_hub")))
