"""Each adapter, over a kernel of the tests' own repository, held to its declaration by the conformance kit."""

from __future__ import annotations

import pytest

from attn_core.testing import parametrize_with_checks

pytest.importorskip("kernels", reason="kernels is not installed: pip install 'attn-hub[hub]'")

ON_CPU = (
    "flash_hub_on_cpu",
    "flash_3_hub_on_cpu",
    "flash_4_hub_on_cpu",
    "aiter_hub_on_cpu",
    "sage_hub_on_cpu",
    "sage_blackwell_hub_on_cpu",
)


@parametrize_with_checks(*ON_CPU, quick=True)
def test_an_adapter_over_a_kernel_of_the_hub_s_format(check):
    check()


@pytest.mark.slow
@parametrize_with_checks(*ON_CPU)
def test_an_adapter_over_a_kernel_of_the_hub_s_format_in_full(check):
    check()
