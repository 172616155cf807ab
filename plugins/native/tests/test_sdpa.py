"""``native`` on the CPU at its edges: every option, queries that see nothing, no dense mask, and which kernel tells the lse."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from attn_core import KeyPadding, Packed, attention
from attn_core.testing import Case, compare
from attn_native import math, sdpa

TRAINED = ("query", "key", "value")
call = partial(attention, backend="native")


def drawn(batch, queries, keys, heads=2, dim=8, *, grad=True):
    shapes = ((batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim))
    return [torch.randn(shape, requires_grad=grad) for shape in shapes]


OPTIONS = {
    "plain": {},
    "few keys": {"keys": 7},  # fewer than the lanes of a vector
    "causal": {"causal": True, "keys": None},
    "causal, few keys": {"causal": True, "queries": 7, "keys": None},
    "causal, fewer queries": {"causal": True},
    "causal, more queries": {"causal": True, "keys": 17},
    "causal, one query": {"causal": True, "queries": 1},
    "causal, one key": {"causal": True, "keys": 1},
    "window": {"window_size": (2, 1)},
    "window, one side": {"window_size": (-1, 2)},
    "window, more queries": {"window_size": (1, 0), "keys": 17},
    "scale 0": {"scale": 0.0, "causal": True},
    "scale below 0": {"scale": -0.3},
    "one head each": {"heads": (2, 2)},
    "other value dim": {"value_dim": 5},
    "last strided": {"layouts": ("last strided",) * 3},
    "bool": {"mask": "bool", "mask_hides": "rows"},
    "bool, keys once": {"mask": "bool", "mask_once": (True, True, False, True)},
    "float": {"mask": "float", "mask_hides": "rows", "gradients": (*TRAINED, "attn_mask")},
    "float, far": {"mask": "float", "mask_hides": "far"},
    "float, alone": {"mask": "float", "mask_once": (True, False, True, False), "gradients": ("attn_mask",)},
    "float32": {"mask": "float", "mask_dtype": "float32"},
    "key padding": {"mask": "key_padding", "mask_hides": "left"},
    "key padding, nothing real": {"mask": "key_padding", "mask_hides": "everything"},
    "packed": {"mask": "packed", "batch": 1, "causal": True},
    "together": {
        "mask": "float", "mask_hides": "rows", "causal": True, "window_size": (4, 0), "scale": 0.7,
        "gradients": (*TRAINED, "attn_mask"),
    },
}  # fmt: skip


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_right(option, dtype, return_lse):
    fields = OPTIONS[option]
    if fields.get("mask_dtype") == "float32" and dtype == "float64":
        pytest.skip("a float32 mask of a float64 query is none of its dtype's cases")
    usual = {"batch": 2, "queries": 19, "keys": 21, "heads": (4, 2), "dim": 16, "gradients": TRAINED}
    refusal = compare(Case(**{**usual, "dtype": dtype, "return_lse": return_lse, **fields}), call)
    assert refusal is None, refusal


# --- queries that see nothing -------------------------------------------------------------------------------------------


def _rows_hidden(fill, start):
    return fill.clone().index_fill_(2, torch.arange(3), start)


BLIND = {  # of 20 queries on 17 keys, the first three see nothing
    "bool": lambda: {"attn_mask": _rows_hidden(torch.ones(1, 1, 20, 17, dtype=torch.bool), False)},
    "float": lambda: {"attn_mask": _rows_hidden(torch.randn(1, 2, 20, 17), -torch.inf)},
    "causal": lambda: {"causal": True},
    "window": lambda: {"window_size": (0, 0)},
    "packed": lambda: {"attn_mask": Packed(*(torch.tensor(n, dtype=torch.int32) for n in ([0, 3, 20], [0, 0, 17])))},
}


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("kind", BLIND)
def test_a_query_that_sees_nothing_has_result_0_lse_of_minus_infinity_and_gradient_0(kind, return_lse):
    query, key, value = drawn(1, 20, 17)
    result = call(query, key, value, return_lse=return_lse, **BLIND[kind]())
    out, lse = result if return_lse else (result, None)
    assert not out[:, :3].any()
    if lse is not None:
        assert bool((lse[:, :, :3] == -torch.inf).all())
        assert bool(lse[:, :, 3:].isfinite().all())
    gradients = torch.autograd.grad(out, (query, key, value), torch.randn_like(out))
    assert not gradients[0][:, :3].any()
    assert bool(gradients[0][:, 3:].any())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_batch_row_of_which_no_key_is_real_is_0_with_its_gradients():
    query, key, value = drawn(2, 4, 20)
    keep = torch.tensor([[False] * 20, [True] * 20])
    out, lse = call(query, key, value, attn_mask=KeyPadding(keep), return_lse=True)
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert not any(tensor[0].any() for tensor in (out, *gradients))
    assert bool((lse[0] == -torch.inf).all())
    assert all(tensor[1].any() for tensor in (out, *gradients))


@pytest.mark.parametrize("lengths", [(3, 8), (8, 3), (20, 33), (33, 20), (1, 20), (20, 1), (20, 20)])
def test_the_last_query_sits_on_the_last_key(lengths):
    tensors = drawn(1, *lengths, grad=False)
    visible = torch.ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0])[None, None]
    torch.testing.assert_close(call(*tensors, causal=True), call(*tensors, attn_mask=visible))


# --- no dense mask ------------------------------------------------------------------------------------------------------

LENGTH = 2048
DENSE = LENGTH * LENGTH  # bytes of one bool mask


@pytest.fixture
def one_thread():
    """The kernel's own buffers are as many as there are threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def largest_allocation(**options):
    query, key, value = drawn(1, LENGTH, LENGTH, heads=1, dim=16)
    result = call(query, key, value, **options)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call(query, key, value, **options)
        out = result[0] if isinstance(result, tuple) else result
        out.sum().backward()
    return max(event.cpu_memory_usage for event in recorded.events())


@pytest.mark.parametrize("return_lse", [False, True])
def test_causal_and_key_padding_make_no_dense_mask(one_thread, return_lse):
    padding = KeyPadding(torch.arange(LENGTH)[None] > LENGTH // 3)
    for options in ({}, {"causal": True}, {"attn_mask": padding}):
        assert largest_allocation(return_lse=return_lse, **options) < DENSE / 2, options
    assert largest_allocation(return_lse=return_lse, window_size=(5, 0)) >= DENSE, "the measure sees a dense mask"


# --- the log-sum-exp ----------------------------------------------------------------------------------------------------


@pytest.fixture
def written_out(monkeypatch):
    """How often the scores were written out."""
    calls = []

    def counted(*tensors, **options):
        calls.append(options)
        return math.forward(*tensors, **options)

    monkeypatch.setattr(sdpa, "math_forward", counted)
    return calls


@pytest.mark.parametrize(
    ("fused", "options"),
    [
        (True, {}),
        (True, {"causal": True}),
        (True, {"attn_mask": torch.ones(1, 1, 20, 20, dtype=torch.bool).tril(3)}),
        (True, {"attn_mask": KeyPadding(torch.arange(20)[None] > 3)}),
        (False, {"dropout_p": 0.5}),
        (False, {"attn_mask": torch.zeros(1, 1, 1, 20, requires_grad=True)}),
    ],
)
def test_the_lse_comes_from_the_kernel_that_gives_the_result_alone(written_out, fused, options):
    tensors = drawn(1, 20, 20)
    out, lse = sdpa.forward(*tensors, scale=0.3, return_lse=True, **options)
    assert len(written_out) == (not fused)
    assert not lse.requires_grad
    if fused:
        assert torch.equal(out, sdpa.forward(*tensors, scale=0.3, **options))


def test_the_lse_is_written_out_where_the_fused_kernel_takes_no_such_head_dims(written_out):
    query, key, _ = drawn(1, 20, 20)
    sdpa.forward(query, key, torch.randn(1, 20, 2, 5), scale=0.3, return_lse=True)
    assert len(written_out) == 1
