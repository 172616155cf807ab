"""Which repository of the hub each backend is in, and whose kernels may be loaded: data."""

from __future__ import annotations

from typing import NamedTuple

PUBLISHERS = frozenset({"kernels-community", "SageAttention"})
"""Whose kernels may be loaded; nobody else's, whatever a lock file says."""


class Repository(NamedTuple):
    """A repository of the kernel hub.

    Attributes:
        name: publisher and kernel.
        revision: the commit that is loaded where the user pins no other, 40 hex digits; None where the user has to.
    """

    name: str
    revision: str | None = None


# These two are what `kernels lock` resolved for version 3 of flash-attn2 and version 1 of flash-attn3, in lock files that others
# publish and run with. Of the others no such record was found.
REPOSITORIES = {
    "flash_hub": Repository("kernels-community/flash-attn2", "81fb77c12b2ad5d69380669b46739d5868614502"),
    "flash_3_hub": Repository("kernels-community/flash-attn3", "43f0bd269777115d94ff826e0d113ce9c1c9087b"),
    "flash_4_hub": Repository("kernels-community/flash-attn4"),
    "sage_hub": Repository("SageAttention/sage-attention"),
    "sage_blackwell_hub": Repository("SageAttention/sage-blackwell"),
    "aiter_hub": Repository("kernels-community/aiter-flash-attn-ck"),
}
