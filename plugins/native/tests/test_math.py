"""``native_math`` at its edges: every option, queries that see nothing, and every kind of derivative."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from attn_core import KeyPadding, Packed, attention
from attn_core.testing import Case, assert_close, bounds, compare, reference
from attn_native import math

TRAINED = ("query", "key", "value")
call = partial(attention, backend="native_math")


def assert_right(**fields):
    """Result, lse and gradients, against the reference."""
    usual = {"batch": 2, "queries": 9, "keys": 12, "heads": (4, 2), "dim": 16, "return_lse": True, "gradients": TRAINED}
    refusal = compare(Case(**{**usual, **fields}), call)
    assert refusal is None, refusal


def drawn(batch, queries, keys, heads=2, dim=8, dtype=torch.float32, *, grad=True):
    shapes = ((batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim))
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


OPTIONS = {
    "plain": {},
    "causal, fewer queries": {"causal": True},
    "causal, more queries": {"causal": True, "keys": 5},
    "causal, one query": {"causal": True, "queries": 1},
    "causal, one key": {"causal": True, "keys": 1},
    "window": {"window_size": (2, 1)},
    "window, one side": {"window_size": (-1, 2)},
    "window, more queries": {"window_size": (1, 0), "keys": 5},
    "scale 0": {"scale": 0.0, "causal": True},
    "scale below 0": {"scale": -0.3},
    "softcap": {"softcap": 0.5, "scale": 1.0},
    "other value dim": {"value_dim": 5},
    "bool": {"mask": "bool", "mask_hides": "rows"},
    "bool, keys once": {"mask": "bool", "mask_once": (True, True, False, True)},
    "float": {"mask": "float", "mask_hides": "rows", "gradients": (*TRAINED, "attn_mask")},
    "float, far": {"mask": "float", "mask_hides": "far", "gradients": (*TRAINED, "attn_mask")},
    "float, once": {"mask": "float", "mask_once": (True, False, True, False), "gradients": ("attn_mask",)},
    "float32": {"mask": "float", "mask_dtype": "float32"},
    "key padding": {"mask": "key_padding", "mask_hides": "left"},
    "key padding, nothing real": {"mask": "key_padding", "mask_hides": "everything"},
    "packed": {"mask": "packed", "batch": 1, "causal": True},
    "packed, window": {"mask": "packed", "batch": 1, "window_size": (2, 1), "softcap": 2.0},
    "together": {
        "mask": "float", "mask_hides": "rows", "causal": True, "window_size": (4, 0), "softcap": 2.0, "scale": 0.7,
        "gradients": (*TRAINED, "attn_mask"),
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_right(option, dtype):
    fields = OPTIONS[option]
    if fields.get("mask_dtype") == "float32" and dtype == "float64":
        pytest.skip("a float32 mask of a float64 query is none of its dtype's cases")
    assert_right(dtype=dtype, **fields)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("softcap", [1e6, 1e39, 1e300])  # beyond float16, beyond float32, and nearly beyond float64
def test_a_softcap_beyond_the_range_of_the_dtype_caps_nothing(softcap, dtype):
    assert_right(dtype=dtype, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [1e-40, 1e-50, 1e-310])  # subnormal in float32, 0 there, and subnormal in float64
def test_a_softcap_below_the_range_of_the_dtype_leaves_all_scores_alike(softcap, dtype):
    query, key, value = drawn(2, 9, 12, dtype=dtype)
    with torch.no_grad():
        query[:, 1] = 0.0  # and its scores: they are 0 / 0 where the cap is
    out = call(query, key, value, softcap=softcap)
    torch.testing.assert_close(out, value.float().mean(1, keepdim=True).to(dtype).expand_as(out), rtol=1e-2, atol=1e-2)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (query, key, value)))


# --- queries that see nothing -------------------------------------------------------------------------------------------


def _rows_hidden(fill, start):
    return fill.clone().index_fill_(2, torch.arange(3), start)


BLIND = {  # of nine queries on six keys, the first three see nothing
    "bool": lambda: {"attn_mask": _rows_hidden(torch.ones(1, 1, 9, 6, dtype=torch.bool), False)},
    "float": lambda: {"attn_mask": _rows_hidden(torch.randn(1, 2, 9, 6), -torch.inf)},
    "causal": lambda: {"causal": True},
    "causal and bool": lambda: {"causal": True, "attn_mask": torch.ones(1, 1, 9, 6, dtype=torch.bool)},
    "window": lambda: {"window_size": (1, 0)},
    "packed": lambda: {"attn_mask": Packed(*(torch.tensor(n, dtype=torch.int32) for n in ([0, 3, 9], [0, 0, 6])))},
}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", BLIND)
def test_a_query_that_sees_nothing_has_result_0_lse_of_minus_infinity_and_gradient_0(kind, softcap):
    query, key, value = drawn(1, 9, 6)
    out, lse = call(query, key, value, return_lse=True, softcap=softcap, **BLIND[kind]())
    assert not out[:, :3].any()
    assert bool((lse[:, :, :3] == -torch.inf).all())
    assert bool(lse[:, :, 3:].isfinite().all())
    gradients = torch.autograd.grad(out, (query, key, value), torch.randn_like(out))
    assert not gradients[0][:, :3].any()
    assert bool(gradients[0][:, 3:].any())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_batch_row_of_which_no_key_is_real_is_0_with_its_gradients():
    query, key, value = drawn(2, 4, 5)
    keep = torch.tensor([[False] * 5, [True] * 5])
    out, lse = call(query, key, value, attn_mask=KeyPadding(keep), return_lse=True)
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert not any(tensor[0].any() for tensor in (out, *gradients))
    assert bool((lse[0] == -torch.inf).all())
    assert all(tensor[1].any() for tensor in (out, *gradients))


@pytest.mark.parametrize("lengths", [(3, 8), (8, 3), (1, 5), (5, 1), (4, 4)])
def test_the_last_query_sits_on_the_last_key(lengths):
    tensors = drawn(1, *lengths, grad=False)
    visible = torch.ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0])[None, None]
    for found, expected in zip(
        call(*tensors, causal=True, return_lse=True), call(*tensors, attn_mask=visible, return_lse=True), strict=True
    ):
        torch.testing.assert_close(found, expected)


# --- derivatives --------------------------------------------------------------------------------------------------------

DERIVED = {
    "plain": {},
    "causal, more queries": {"causal": True},
    "window": {"window_size": (1, 0)},
    "softcap": {"softcap": 1.5},
    "padding": {"attn_mask": KeyPadding(torch.tensor([[True, False, True]]))},
}


@pytest.mark.parametrize("kind", DERIVED)
def test_first_second_and_forward_derivatives_are_right(kind):
    inputs = drawn(1, 4, 3, dim=2, dtype=torch.float64)
    function = partial(call, **DERIVED[kind])
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


def test_a_float_mask_has_first_second_and_forward_derivatives():
    inputs = drawn(1, 3, 3, dim=2, dtype=torch.float64)
    mask = torch.randn(1, 2, 1, 3, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, mask):
        return call(query, key, value, attn_mask=mask, softcap=2.0)

    assert gradcheck(function, (*inputs, mask), check_forward_ad=True)
    assert gradgradcheck(function, (*inputs, mask))


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0}, {"window_size": (1, 0)}], ids=str)
def test_vmap_is_one_call_for_each(options):
    query, key, value = (torch.randn(3, 2, 5, 2, 8) for _ in range(3))
    expected = torch.stack([call(*each, **options) for each in zip(query, key, value, strict=True)])
    torch.testing.assert_close(torch.vmap(partial(call, **options))(query, key, value), expected)
    apart = torch.vmap(lambda one: call(one, key[0], value[0], **options))(query)
    torch.testing.assert_close(apart[1], call(query[1], key[0], value[0], **options))


def test_vmap_over_the_mask_alone():
    query, key, value = drawn(1, 4, 5, grad=False)
    masks = torch.rand(3, 1, 1, 4, 5) < 0.5
    found = torch.vmap(lambda mask: call(query, key, value, attn_mask=mask))(masks)
    torch.testing.assert_close(found, torch.stack([call(query, key, value, attn_mask=mask) for mask in masks]))


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"causal": True}, {"window_size": (2, 2)}], ids=str)
def test_the_backward_function_is_the_gradient(options):
    tensors = drawn(2, 7, 5, dtype=torch.float64)
    out, lse = reference(*tensors, scale=0.4, **options)
    grad_out = torch.randn_like(out)
    wanted = torch.autograd.grad(out, tensors, grad_out)
    allowed = bounds(*tensors, grad_out=grad_out, scale=0.4, **options)
    plain = [tensor.detach() for tensor in tensors]
    found = math.backward(grad_out, *plain, out.detach(), lse, scale=0.4, **options)
    for name, one, other in zip(TRAINED, found, wanted, strict=True):
        assert_close(one, other, torch.float64, f"gradient of {name}", bound=getattr(allowed, name))


@pytest.mark.parametrize("described", [True, False])
def test_a_mask_made_in_inference_mode_hides_keys_of_a_call_with_a_graph(described):
    with torch.inference_mode():
        keep = torch.tensor([[True, False, True, True]])
    query = torch.randn(1, 4, 1, 8, requires_grad=True)
    mask = KeyPadding(keep) if described else keep[:, None, None, :]
    attention(query, query, query, attn_mask=mask, backend="native_math").sum().backward()
    copy = query.detach().requires_grad_()
    reference(copy, copy, copy, attn_mask=KeyPadding(keep.clone()))[0].sum().backward()
    torch.testing.assert_close(query.grad, copy.grad)
