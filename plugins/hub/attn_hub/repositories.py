"""Which repository of the hub each backend is in, and whose kernels may be loaded: data."""

from __future__ import annotations

from typing import NamedTuple

PUBLISHERS = frozenset({"kernels-community", "SageAttention"})
"""Whose kernels may be loaded; nobody else's, whatever a lock file says."""


class Repository(NamedTuple):
    """A repository of the kernel hub.

    Attributes:
        name: publisher and kernel.
        revision: the commit that attn-hub was tried with, 40 hex digits; None where there is none yet, and the user pins one.
    """

    name: str
    revision: str | None = None


REPOSITORIES = {
    "flash_hub": Repository("kernels-community/flash-attn2"),
    "flash_3_hub": Repository("kernels-community/flash-attn3"),
    "flash_4_hub": Repository("kernels-community/flash-attn4"),
    "sage_hub": Repository("SageAttention/sage-attention"),
    "sage_blackwell_hub": Repository("SageAttention/sage-blackwell"),
    "aiter_hub": Repository("kernels-community/aiter-flash-attn-ck"),
}
