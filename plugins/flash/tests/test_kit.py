"""The adapters, held to their declarations by the conformance kit over stand-ins of the libraries."""

from __future__ import annotations

from attn_core.testing import parametrize_with_checks


@parametrize_with_checks("flash_standin", "flash_3_standin", "flash_4_standin")
def test_on_a_standin(check):
    check()
