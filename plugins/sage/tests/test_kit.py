"""Every adapter of this wheel, held to its declaration by the conformance kit: on a GPU as it is, on the CPU over a stand-in."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from attn_core.testing import parametrize_with_checks

STAND_INS = (
    "sage_1_on_cpu",
    "sage_2_on_cpu",
    "sage_2_fp16_triton_on_cpu",
    "sage_2_fp16_cuda_on_cpu",
    "sage_2_fp8_cuda_on_cpu",
    "sage_2_fp8_sm90_on_cpu",
)
ON_CPU = STAND_INS if find_spec("sageattention") is None else ()


@parametrize_with_checks("sage", "sage_fp16_triton", "sage_fp16_cuda", "sage_fp8_cuda", "sage_fp8_sm90")
def test_a_backend_of_sageattention(check):
    check()


@parametrize_with_checks(*ON_CPU, quick=True)
def test_an_adapter_over_a_stand_in(check):
    check()


@pytest.mark.slow
@parametrize_with_checks(*ON_CPU)
def test_an_adapter_over_a_stand_in_in_full(check):
    check()
