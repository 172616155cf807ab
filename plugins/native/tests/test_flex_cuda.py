"""flex on a GPU: everything that it declares there, against the float64 reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.utils import counters

from attn_core import attention
from attn_core.masks import KeyPadding, Packed
from attn_core.testing.reference import reference
from attn_native import flex

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def tensors(batch, queries, keys, heads=4, key_heads=2, head_dim=64, value_dim=None, dtype=torch.float32):
    sizes = [(queries, heads, head_dim), (keys, key_heads, head_dim), (keys, key_heads, value_dim or head_dim)]
    return [torch.randn(batch, *size, dtype=dtype, device="cuda", requires_grad=True) for size in sizes]


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def packed(queries, keys):
    return Packed(offsets(0, 0, queries - 20, queries), offsets(0, 15, keys - 5, keys))


def padding(batch, keys):
    keep = torch.rand(batch, keys, device="cuda") > 0.4
    keep[0] = False
    return KeyPadding(keep)


def wrong_by(found, wanted):
    assert found.shape == wanted.shape
    assert not found.isnan().any()
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-2)).item()


def assert_right(inputs, call=flex.forward, **options):
    """Result, lse and every gradient."""
    options = {"scale": inputs[0].shape[-1] ** -0.5, **options}
    mask = options.get("attn_mask")
    asked = [*inputs, mask] if isinstance(mask, torch.Tensor) and mask.requires_grad else inputs
    out, lse = call(*inputs, return_lse=True, **options)
    wanted, wanted_lse = reference(*inputs, **options)
    limit = ROUNDING[inputs[0].dtype]
    assert out.dtype == inputs[0].dtype
    assert lse.dtype == torch.float32
    assert wrong_by(out.detach(), wanted.detach()) < limit
    torch.testing.assert_close(lse.detach().double(), wanted_lse, atol=limit, rtol=limit)
    grad_out = torch.randn_like(out)
    found = torch.autograd.grad(out, asked, grad_out)
    right = torch.autograd.grad(wanted, asked, grad_out.double())
    for name, one, other in zip(("dq", "dk", "dv", "dmask"), found, right):  # noqa: B905 (dmask where asked for)
        assert wrong_by(one, other.double()) < limit, name
    with torch.no_grad():
        assert wrong_by(call(*inputs, **options), wanted.detach()) < limit


CASES = {
    "plain": ((2, 300, 300), {}),
    "blocks that fit": ((2, 256, 256), {"causal": True}),
    "causal, fewer queries": ((2, 200, 300), {"causal": True}),
    "causal, more queries": ((2, 300, 200), {"causal": True}),
    "window": ((2, 300, 260), {"window_size": (17, 5)}),
    "window, causal": ((2, 300, 700), {"window_size": (150, 0), "causal": True}),
    "groups of three": ((2, 300, 260, 6, 2), {"causal": True}),
    "groups of three, one query": ((2, 1, 260, 6, 2), {"causal": True}),
    "one query": ((2, 1, 300), {"causal": True}),
    "few queries": ((2, 7, 300, 8, 2), {"causal": True}),
    "other value dim": ((2, 300, 260, 4, 2, 64, 32), {}),
    "scale 0": ((2, 130, 130), {"scale": 0.0, "causal": True}),
    "softcap and a scale": ((2, 300, 300), {"softcap": 3.0, "scale": 0.7, "causal": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_is_right(case, dtype):
    sizes, options = CASES[case]
    assert_right(tensors(*sizes, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 17, 24, 40, 80, 96, 128, 192, 256])
def test_head_dims(head_dim, dtype):
    if dtype == torch.float32 and head_dim > 128:
        pytest.skip("declared as refused: more shared memory than the GPU has")
    assert_right(tensors(1, 300, 300, head_dim=head_dim, dtype=dtype), causal=True)


@pytest.mark.parametrize("pair", [(16, 256), (192, 128), (33, 20)])
def test_value_head_dims(pair):
    assert_right(tensors(1, 300, 300, 4, 2, *pair, dtype=torch.bfloat16), causal=True)


MASKS = {
    "key_padding": lambda _, keys: padding(2, keys),
    "bool": lambda queries, keys: torch.rand(2, 1, queries, keys, device="cuda") > 0.5,
    "bool, one for all": lambda *_: torch.zeros(1, 1, 1, 1, dtype=torch.bool, device="cuda"),
    "float": lambda queries, keys: torch.randn(2, 4, queries, keys, device="cuda"),
    "float, rows of -inf": lambda queries, keys: torch.randn(2, 1, queries, keys, device="cuda").masked_fill(
        torch.rand(2, 1, queries, 1, device="cuda") > 0.7, -torch.inf
    ),
}


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (40, 20), "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, options):
    assert_right(tensors(2, 300, 260), attn_mask=MASKS[kind](300, 260), **options)


@pytest.mark.parametrize("kind", MASKS)
def test_masks_for_one_query(kind):
    assert_right(tensors(2, 1, 260), attn_mask=MASKS[kind](1, 260))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (40, 20)}], ids=str)
def test_packed(options):
    assert_right(tensors(1, 300, 260), attn_mask=packed(300, 260), **options)


def test_twice_the_same_bits():
    inputs = tensors(2, 300, 300, dtype=torch.bfloat16)
    grad_out = torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16)
    runs = []
    for _ in range(5):
        out = flex.forward(*inputs, scale=0.1, causal=True, deterministic=True)
        runs.append([out.detach(), *torch.autograd.grad(out, inputs, grad_out)])
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


def test_backward_of_parts_of_the_keys_adds_up_to_the_whole():
    query, key, value = tensors(2, 200, 300)
    out, lse = reference(query, key, value, scale=0.1)
    grad_out = torch.randn(2, 200, 4, 64, device="cuda")
    wanted = torch.autograd.grad(out, (query, key, value), grad_out.double())
    query, key, value = (tensor.detach() for tensor in (query, key, value))
    out, lse = out.detach().float(), lse.float()
    (dq, dk, dv), (more_dq, *more) = (
        flex.backward(grad_out, query, key[:, keys], value[:, keys], out, lse, scale=0.1)
        for keys in (slice(0, 90), slice(90, 300))
    )
    found = (dq + more_dq, *(torch.cat(pair, 1) for pair in zip((dk, dv), more, strict=True)))
    assert all(wrong_by(one, other.double()) < 2e-5 for one, other in zip(found, wanted, strict=True))


def test_backward_of_what_sees_nothing_is_zero():
    query, key, value = (tensor.detach() for tensor in tensors(2, 130, 140))
    nothing = KeyPadding(torch.zeros(2, 140, dtype=torch.bool, device="cuda"))
    lse = torch.full((2, 4, 130), -torch.inf, device="cuda")
    gradients = flex.backward(torch.randn_like(query), query, key, value, query * 0, lse, scale=0.1, attn_mask=nothing)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dynamic", [False, True])
def test_becomes_part_of_code_that_is_compiled(dynamic):
    def model(query, key, value):
        out, lse = flex.forward(query * 2, key, value, scale=0.1, causal=True, return_lse=True)
        return out * 2, lse

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for length in (200, 300):
        inputs = tensors(2, length, length)
        wanted, wanted_lse = reference(inputs[0] * 2, *inputs[1:], scale=0.1, causal=True)
        out, lse = compiled(*inputs)
        assert wrong_by(out.detach(), wanted.detach() * 2) < 2e-5
        torch.testing.assert_close(lse.detach().double(), wanted_lse, atol=1e-4, rtol=1e-4)
        grad_out = torch.randn_like(out)
        found = torch.autograd.grad(out, inputs, grad_out)
        right = torch.autograd.grad(wanted * 2, inputs, grad_out.double())
        assert all(wrong_by(one, other.double()) < 2e-5 for one, other in zip(found, right, strict=True))


def test_a_decoding_loop_compiles_a_few_times():
    before = counters["stats"]["unique_graphs"]
    for keys in range(90, 1200, 37):
        inputs = [tensor.detach() for tensor in tensors(1, 1, keys, dtype=torch.bfloat16)]
        wanted, _ = reference(*inputs, scale=0.1, causal=True)
        assert wrong_by(flex.forward(*inputs, scale=0.1, causal=True), wanted) < 2e-2
    assert counters["stats"]["unique_graphs"] - before <= 5


def test_streams_and_threads_that_start_at_once_are_all_right():
    def call(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            query = torch.randn(2, 211, 2, 32, device="cuda", generator=generator)
            found = flex.forward(query, query, query, scale=0.1, causal=True)
            torch.cuda.current_stream().synchronize()
        return wrong_by(found, reference(query, query, query, scale=0.1, causal=True)[0])

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(call, range(8))) < 2e-5


def test_memory_stays_far_below_a_dense_mask():
    length = 32768
    query, key, value = (tensor.detach() for tensor in tensors(1, length, length, 2, 2, 64, dtype=torch.bfloat16))
    mask = KeyPadding(torch.rand(1, length, device="cuda") > 0.4)
    flex.forward(query, key, value, scale=0.1, causal=True, attn_mask=mask)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flex.forward(query, key, value, scale=0.1, causal=True, attn_mask=KeyPadding(~mask.keep))
    assert torch.cuda.max_memory_allocated() - before < length * length / 8


@pytest.mark.parametrize("changed", ["query", "key", "value", "attn_mask"])
def test_what_the_backward_reads_may_not_have_changed(changed):
    made = {name: torch.randn(1, 40, 2, 16, device="cuda") for name in ("query", "key", "value")}
    mask = torch.rand(1, 1, 40, 40, device="cuda") > 0.3
    inputs = [tensor * 1.0 for tensor in (leaf.requires_grad_() for leaf in made.values())]  # leaves can't be changed
    out = attention(*inputs, attn_mask=mask, backend="flex")
    with torch.no_grad():
        {**dict(zip(made, inputs, strict=True)), "attn_mask": mask}[changed].zero_()
    with pytest.raises(RuntimeError, match=f"{changed} was changed in place|modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("kind", ["none", "bool", "key_padding"])
def test_more_heads_than_a_grid_has_places_for(kind):
    query, key, value = (torch.randn(32768, 3, 2, 16, device="cuda", requires_grad=True) for _ in range(3))
    keep = torch.rand(32768, 3, device="cuda") > 0.4
    mask = {"none": None, "bool": keep[:, None, None, :], "key_padding": KeyPadding(keep)}[kind]
    out, lse = attention(query, key, value, attn_mask=mask, backend="flex", return_lse=True)
    expected, expected_lse = reference(query, key, value, attn_mask=mask)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=2e-5)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), grad)
    for one, other in zip(found, torch.autograd.grad(expected, (query, key, value), grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("queries", [5, 200])
def test_a_query_of_nan_has_it_in_its_lse(queries):
    query, key, value = (tensor.detach() for tensor in tensors(2, queries, 300))
    query[0, 2, 1, 7] = torch.nan
    out, lse = attention(query, key, value, backend="flex", return_lse=True)
    assert out[0, 2, 1].isnan().all()
    assert lse.isnan().nonzero().tolist() == [[0, 1, 2]]
