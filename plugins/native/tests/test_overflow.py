"""Scores that are -inf throughout, of infinite inputs or of finite ones that overflow: a query that sees them gets NaN."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attn_core import KeyPadding, attention
from attn_core.testing import reference

BACKENDS = ["native", "native_flash", "native_math"]
with_lse = partial(attention, return_lse=True)


def inputs(queries=2, keys=20, heads=(1, 1), size=float("inf"), dtype=torch.float32):
    query = torch.ones(1, queries, heads[0], 8, dtype=dtype)
    value = torch.randn(1, keys, heads[1], 8, dtype=dtype)
    if size != float("inf"):
        query = query * size
    return query, torch.full((1, keys, heads[1], 8), -size, dtype=dtype), value


@pytest.mark.parametrize("lengths", [(2, 20), (2, 6), (20, 20), (6, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [float("inf"), 1e20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_nan_and_no_finite_lse(backend, size, causal, lengths):
    tensors = inputs(*lengths, heads=(2, 1), size=size)
    out, lse = with_lse(*tensors, causal=causal, backend=backend)
    seeing = slice(max(lengths[0] - lengths[1], 0) if causal else 0, None)
    assert out[:, seeing].isnan().all()
    assert not lse.isfinite().any()
    assert not out[:, : seeing.start].any()


def test_without_the_lse_native_flash_tells_too():
    assert attention(*inputs(), backend="native_flash").isnan().all()
    query, key, value = (tensor.requires_grad_() for tensor in inputs())
    out = attention(query, key, value, backend="native_flash")
    assert all(grad.isnan().any() for grad in torch.autograd.grad(out.sum(), (query, key, value)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_is_none_of_them(backend):
    query, key, value = inputs(keys=4)
    out, lse = with_lse(query, key, value, attn_mask=KeyPadding(torch.zeros(1, 4, dtype=torch.bool)), backend=backend)
    assert not out.any()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_neither_is_one_whose_value_and_lse_are_0(backend):
    zeros = torch.zeros(1, 1, 1, 8)
    for query in (zeros, zeros + 1e20):
        out, lse = with_lse(query, zeros, zeros, backend=backend)
        assert not out.any()
        assert not lse.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_weight_0_hide_none_of_the_others(backend):
    """The first part of two has scores of -inf alone."""
    query, key, value = inputs(queries=3, keys=20)
    key[:, 17:] = 0.5
    out, lse = with_lse(query, key, value, causal=True, backend=backend)
    expected = reference(query, key, value, causal=True)
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code_tells_where_the_lse_is_asked_for(backend):
    torch._dynamo.reset()
    compiled = torch.compile(partial(with_lse, backend=backend), fullgraph=True, backend="aot_eager")
    out, lse = compiled(*inputs())
    assert out.isnan().all()
    assert not lse.isfinite().any()
