"""The adapters, held to their declarations by the conformance kit over a stand-in of the library."""

from __future__ import annotations

from attn_core.testing import parametrize_with_checks

STANDINS = ("xformers_standin", "xformers_cutlass_standin", "xformers_flash_standin", "xformers_splitk_standin")


@parametrize_with_checks(*STANDINS)
def test_on_a_standin(check):
    check()
