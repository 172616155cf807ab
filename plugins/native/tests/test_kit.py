"""Every backend of this wheel, held to its own declaration by the conformance kit."""

from __future__ import annotations

from attn_core.testing import parametrize_with_checks

EACH_CALL_COMPILES = ("flex",)
ALL_OTHERS = ("native", "native_math", "native_flash", "native_efficient", "native_cudnn")


@parametrize_with_checks(*ALL_OTHERS)
def test_a_backend_of_torch(check):
    check()


@parametrize_with_checks(*EACH_CALL_COMPILES, quick=True)
def test_a_backend_that_compiles(check):
    check()
