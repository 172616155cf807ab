"""Infinite scores, and NaN where nobody looks: what must come through does, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attn_core import KeyPadding, attention
from attn_core.testing import reference
from attn_native import sdpa

HALF = (torch.float16, torch.bfloat16)
ON_CPU = ("native", "native_flash", "native_math")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("keys", [8, 16, 32, 100, 128])
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_score_of_infinity_is_nan_in_half_precision_at_every_length(backend, keys, dtype):
    query, key = torch.randn(1, 12, 2, 64, dtype=dtype), torch.randn(1, keys, 2, 64, dtype=dtype)
    query[0, 5, 0, 3] = torch.inf
    key[0, 1, 0, 3] = 1.0
    out = attention(query, key, key, backend=backend)
    assert out[0, 5, 0].isnan().all()
    assert out.isnan().any(-1).sum() == 1


def test_values_of_zero_are_not_taken_for_it(monkeypatch):
    query = torch.randn(1, 32, 2, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(sdpa, "_general", None)  # what would compute again
    assert (attention(query, query, torch.zeros_like(query), backend="native") == 0.0).all()


def test_fake_tensors_outside_of_their_mode_are_not_looked_at():
    with FakeTensorMode():
        query = torch.empty(2, 32, 4, 16, dtype=torch.float16)
    assert attention(query, query, query, backend="native").shape == (2, 32, 4, 16)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("form", ["key_padding", "bool", "float"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_query_of_nan_that_sees_nothing_is_in_nothing(backend, form, return_lse, number):
    query, key = torch.randn(2, 20, 2, 8), torch.randn(2, 24, 2, 8)
    query[0, 3] = number
    keep = torch.ones(2, 24, dtype=torch.bool)
    keep[0] = False
    mask = KeyPadding(keep)
    if form != "key_padding":
        mask = keep[:, None, None].expand(-1, -1, 20, -1)
    if form == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected, expected_lse = reference(query.nan_to_num(posinf=0.0), key, key, attn_mask=mask)
    query.requires_grad_()
    key.requires_grad_()
    found = attention(query, key, key, attn_mask=mask, backend=backend, return_lse=return_lse)
    out, lse = found if return_lse else (found, expected_lse)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (query, key)))


@pytest.mark.parametrize(
    "backend",
    [
        *ON_CPU,
        pytest.param(
            "flex", marks=pytest.mark.skipif(torch.__version__ < (2, 9), reason="flex needs torch 2.9 on a CPU")
        ),
    ],
)
def test_kernels_do_not_look_at_the_default_device(backend):
    query, key = torch.randn(1, 9, 2, 16), torch.randn(1, 5, 2, 16)
    causal = attention(query, key, key, causal=True, backend="native_math")
    plain = attention(query, key, key, backend="native_math")
    with torch.device("meta"):
        torch.testing.assert_close(attention(query, key, key, causal=True, backend=backend), causal)
        torch.testing.assert_close(attention(query, key, key, backend=backend), plain)
