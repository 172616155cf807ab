"""Attention kernels of the Hugging Face kernel hub as backends of attn: somebody else's code, pinned and opted into."""

from attn_hub.fetching import fetch

__all__ = ["fetch"]
