"""sageattention itself, on a GPU: what the kit does not measure."""

from __future__ import annotations

import pytest
import torch

from attn_core import attention, registry
from attn_core.errors import BackendNotUsable, CallRefused
from attn_core.testing import reference

NAMES = ("sage", "sage_fp16_triton", "sage_fp16_cuda", "sage_fp8_cuda", "sage_fp8_sm90")
FIRST_IS_HELD_TO = 0.02
"""sageattention 1 has one kernel, with values in float16: "sage" declares the error of the float8 ones of version 2."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def usable(name):
    row = registry.meant(f"attn-sage:{name}")
    if row.status != registry.AVAILABLE:
        pytest.skip(str(row))
    return row


def drawn(*shape, seed, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def off(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def held_to(row):
    from importlib.metadata import version

    return FIRST_IS_HELD_TO if version("sageattention").startswith("1.") else row.spec.numerics.error


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (1024, 77), (300, 300), (1, 700), (256, 4096)])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_the_error_is_what_is_declared_at_lengths_that_blocks_divide_and_at_others(name, queries, keys, dim):
    row = usable(name)
    query, key, value = (drawn(2, length, 4, dim, seed=n) for n, length in enumerate((queries, keys, keys)))
    before = key.clone()
    try:
        out = attention(query, key, value, backend=name)
    except (BackendNotUsable, CallRefused) as refusal:
        pytest.skip(str(refusal))
    expected, _ = reference(query, key, value)
    assert off(out, expected) < held_to(row)
    assert torch.equal(key, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_on_another_gpu_leaves_the_current_one_as_it_is(name):
    usable(name)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    query = drawn(1, 128, 2, 64, seed=0).to("cuda:1")
    try:
        out = attention(query, query, query, backend=name)
    except (BackendNotUsable, CallRefused) as refusal:
        pytest.skip(str(refusal))
    assert torch.cuda.current_device() == 0
    assert off(out, reference(query, query, query)[0]) < 0.06
