"""The backend in chunks against the float64 reference, with tiles small enough that every call has several."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from attn_core import KeyPadding, Packed, attention, explain
from attn_core.testing import assert_close, bounds, compare, draw, reference
from attn_example import chunked

call = partial(attention, backend="chunked")

SENSIBLE = {"spoiled": [None], "batch": [1, 2], "queries": [4, 7, 17, 65], "keys": [None, None, 7, 33, 70]}
"""Calls that are refused for their own sake are the core's matter."""

LENGTH = 16_384


@pytest.fixture(params=[(512, 512), (16, 24)], ids="{0[0]}x{0[1]}".format)
def tiles(request, monkeypatch):
    monkeypatch.setattr(chunked, "QUERIES", request.param[0])
    monkeypatch.setattr(chunked, "KEYS", request.param[1])


def numbers(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def inputs(length, heads=2, dim=16, **options):
    return [numbers(1, length, heads, dim, seed=seed, **options) for seed in range(3)]


def ends(*offsets):
    return torch.tensor(offsets, dtype=torch.int32)


def check(found, tensors, grad_out=None, **options):
    """Hold (out, lse), and gradients where there is a grad_out, to the reference."""
    dtype = tensors[0].dtype
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected, lse = reference(*exact, **options)
    allowed = bounds(*exact, grad_out=grad_out, dtype=dtype, **options)
    assert_close(found[0], expected, dtype, "out", bound=allowed.out)
    assert_close(found[1], lse, dtype, "lse", bound=allowed.lse)
    if grad_out is None:
        return
    gradients = torch.autograd.grad(found[0], tensors, grad_out)
    for name, gradient, wanted in zip(
        ("query", "key", "value"), gradients, torch.autograd.grad(expected, exact, grad_out.double()), strict=True
    ):
        assert_close(gradient, wanted, dtype, name, bound=getattr(allowed, name))


@pytest.mark.parametrize("seed", range(3))
def test_drawn_calls_are_right_or_refused(tiles, seed):
    choose = random.Random(seed).choice
    outcomes = [compare(draw(choose, SENSIBLE), call) for _ in range(40)]
    assert sum(outcome is None for outcome in outcomes) > 30


@pytest.mark.parametrize("mask", ["packed", "key_padding", "bool", "float"])
def test_drawn_masks_are_right_or_refused(tiles, mask):
    choose = random.Random(mask).choice
    limits = {
        **SENSIBLE,
        "mask": [mask],
        "window_size": [None, (2, 1), (0, -1), (-1, 3)],
        "gradients": [("query", "key", "value")],
    }
    assert [compare(draw(choose, limits), call) for _ in range(20)] == [None] * 20


@pytest.mark.parametrize(
    "mask",
    [
        None,
        KeyPadding(torch.arange(300)[None] % 7 > 2),
        Packed(ends(0, 90, 90, 131, 300), ends(0, 3, 60, 200, 300)),
    ],
    ids=["none", "key_padding", "packed"],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_is_right_at_each_length(dynamic, mask, monkeypatch):
    monkeypatch.setattr(chunked, "QUERIES", 64)
    torch._dynamo.reset()
    options = {} if mask is None else {"attn_mask": mask}
    compiled = torch.compile(
        partial(call, return_lse=True, causal=True, softcap=8.0), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for length in (300,) if mask is not None else (300, 301, 70):
        tensors = [tensor.requires_grad_() for tensor in inputs(length, heads=4)]
        found = compiled(*tensors, **options)
        check(found, tensors, numbers(1, length, 4, 16), causal=True, softcap=8.0, **options)


def test_a_compiled_call_is_one_node_whatever_its_length():
    graphs = []

    def keep(graph, _):
        graphs.append(sum("attn_example" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    torch.compile(call, fullgraph=True, backend=keep)(*inputs(3000))
    assert graphs == [1]


def test_operators_keep_what_torch_asks_of_them():
    tensors = [*inputs(9), 0.25, None, -1, 0, False, torch.zeros(9).long(), torch.arange(9), None, None]
    torch.library.opcheck(torch.ops.attn_example.attend.default, tensors)
    out, lse = torch.ops.attn_example.attend(*tensors)
    torch.library.opcheck(torch.ops.attn_example.gradients.default, [numbers(*out.shape), out, lse, *tensors])


def largest_allocation(length, **options):
    tensors = [tensor.requires_grad_() for tensor in inputs(length, heads=1)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call(*tensors, **options).sum().backward()
    return max(event.self_cpu_memory_usage for event in recorded.events())


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (LENGTH // 4, {"causal": True}),
        (LENGTH, {"causal": True, "window_size": (600, 0)}),
        (LENGTH // 4, {"attn_mask": KeyPadding(torch.arange(LENGTH // 4)[None] > 999)}),
        (LENGTH // 4, {"attn_mask": Packed(ends(0, 3000, LENGTH // 4)), "causal": True}),
    ],
    ids=["causal", "window", "key_padding", "packed"],
)
def test_nothing_of_the_size_of_the_scores_is_made(length, options):
    largest = max(chunked.QUERIES * chunked.KEYS * 4, length * 16 * 4)  # a tile, or a tensor of the call
    assert largest_allocation(length, **options) <= largest < length * length // 8


def test_a_long_sequence_is_right():
    tensors = inputs(LENGTH, heads=1)
    out, lse = call(*tensors, causal=True, return_lse=True)
    last = [tensor[:, -64:] if n == 0 else tensor for n, tensor in enumerate(tensors)]
    check((out[:, -64:], lse[..., -64:]), last, causal=True)
    check((out[:, :64], lse[..., :64]), [tensor[:, :64] for tensor in tensors], causal=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"causal": True}, 10),  # of 4 x 4 tiles those on and below the diagonal
        ({"window_size": (0, 0)}, 4),
        ({"window_size": (16, 16)}, 10),
        ({"attn_mask": Packed(ends(0, 16, 32, 48, 64))}, 4),
        ({"attn_mask": Packed(ends(0, 32, 64)), "causal": True}, 6),
        ({}, 16),
    ],
)
def test_tiles_that_nobody_sees_are_left_out(options, expected, monkeypatch):
    monkeypatch.setattr(chunked, "QUERIES", 16)
    monkeypatch.setattr(chunked, "KEYS", 16)
    tiles = []
    real = chunked._tile
    monkeypatch.setattr(chunked, "_tile", lambda *arguments: tiles.append(arguments[2:]) or real(*arguments))
    call(*inputs(64), **options)
    assert len(tiles) == expected


def test_gradients_of_a_part_of_the_keys_add_up_from_the_global_lse():
    from attn_example.adapter import backward

    query, key, value = (tensor.requires_grad_() for tensor in inputs(50, dtype=torch.float64))
    grad_out = numbers(1, 50, 2, 16, dtype=torch.float64)
    out, lse = call(query, key, value, return_lse=True)
    whole = torch.autograd.grad(out, (query, key, value), grad_out)
    parts = [
        backward(grad_out, query, key[:, part], value[:, part], out, lse, scale=0.25)
        for part in (slice(0, 20), slice(20, 50))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for n in (1, 2):
        torch.testing.assert_close(torch.cat([part[n] for part in parts], 1), whole[n])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_of_a_key_that_is_seen_are_not_hidden(tiles, bad):
    query, key, value = inputs(40)
    key[0, 3, :, 0] = bad  # one number, or scores of both infinities add up to NaN
    found = call(query, key, value, causal=True, return_lse=True)
    expected = reference(query, key, value, causal=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.isinf(), other.isinf())


def test_what_it_cannot_do_it_refuses_with_its_reason():
    query, key, value = inputs(4)
    said = str(explain(query, key, value, dropout_p=0.5, backend="chunked"))
    assert "a draw would have to be kept for every pair" in said
    mask = torch.zeros(1, 1, 4, 4, requires_grad=True)
    assert "never written out" in str(explain(query, key, value, attn_mask=mask, backend="chunked"))
