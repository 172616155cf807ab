"""Every backend of this wheel, held to its own declaration by the conformance kit."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from attn_core.testing import parametrize_with_checks

INSTALLED = [name for name in ("torch_npu", "torch_xla") if find_spec(name) is not None]
ON_CPU = () if INSTALLED else ("native_npu_on_cpu", "native_xla_on_cpu")
EACH_CALL_COMPILES = ("flex",)
ALL_OTHERS = ("native", "native_math", "native_flash", "native_efficient", "native_cudnn")


@parametrize_with_checks(*ALL_OTHERS)
def test_a_backend_of_torch(check):
    check()


@parametrize_with_checks(*EACH_CALL_COMPILES, quick=True)
def test_a_backend_that_compiles(check):
    check()


@parametrize_with_checks(*ON_CPU, quick=True)
def test_a_kernel_of_another_accelerator_over_a_stand_in(check):
    check()


@pytest.mark.slow
@parametrize_with_checks(*ON_CPU)
def test_a_kernel_of_another_accelerator_over_a_stand_in_in_full(check):
    check()
