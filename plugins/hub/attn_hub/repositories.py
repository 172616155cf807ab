"""Which repository of the hub each backend is in, and whose kernels may be loaded: data."""

from __future__ import annotations

from typing import NamedTuple

PUBLISHERS = frozenset({"kernels-community", "SageAttention"})
"""Whose kernels may be loaded; nobody else's, whatever a lock file says."""


class Repository(NamedTuple):
    """A repository of the kernel hub.

    Attributes:
        name: publisher and kernel.
        source: what the adapter was written against.
        revision: the commit that is loaded where the user pins no other, 40 hex digits; None where the user has to.
    """

    name: str
    source: str
    revision: str | None = None


_COMMUNITY = "of huggingface/kernels-community at 40d4194"

# The names are those that the dispatcher of diffusers 0.42 loads. The sources that are public are other ones for the two of
# SageAttention: kernels-community has a sage-attention (version 2 at 40d4194, version 3 by its pull request 1095, which is the
# version that diffusers asks for) and a sage-blackwell (06b7b50), and nothing was found of the repositories of this name.
#
# The two revisions are what `kernels lock` resolved for version 3 of flash-attn2 and version 1 of flash-attn3, in lock files
# that others publish and run with. Of the others no such record was found.
REPOSITORIES = {
    "flash_hub": Repository(
        "kernels-community/flash-attn2",
        f"flash-attn2 (version 3) {_COMMUNITY}",
        "81fb77c12b2ad5d69380669b46739d5868614502",
    ),
    "flash_3_hub": Repository(
        "kernels-community/flash-attn3",
        f"flash-attn3 (version 1) {_COMMUNITY}",
        "43f0bd269777115d94ff826e0d113ce9c1c9087b",
    ),
    "flash_4_hub": Repository(
        "kernels-community/flash-attn4", f"flash-attn4 (version 0, flash-attn 4.0.0.beta8) {_COMMUNITY}"
    ),
    "sage_hub": Repository("SageAttention/sage-attention", f"sage-attention (version 2) {_COMMUNITY}"),
    "sage_blackwell_hub": Repository(
        "SageAttention/sage-blackwell",
        "sageattention3_blackwell of thu-ml/SageAttention at d1a57a5, built as sage-blackwell (version 1) of "
        "huggingface/kernels-community at 06b7b50",
    ),
    "aiter_hub": Repository("kernels-community/aiter-flash-attn-ck", f"aiter-flash-attn-ck (version 1) {_COMMUNITY}"),
}
