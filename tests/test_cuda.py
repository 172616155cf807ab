"""On a GPU: choices in autograd's own threads, streams, graphs, and no dense mask where none is needed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attn_core import AttnError, KeyPadding, attention, plan, use_backend
from attn_core.testing import assert_close
from attn_core.testing.reference import reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("stubs"),
]

BACKENDS = ["native", "native_flash", "native_efficient", "native_cudnn", "native_math"]


def drawn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(64, 64), (40, 96), (96, 40)])
def test_the_call_is_right_on_the_gpu(backend, causal, lengths):
    query, key, value = drawn(2, lengths[0], 4, 64), drawn(2, lengths[1], 2, 64), drawn(2, lengths[1], 2, 64)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    expected, expected_lse = reference(query, key, value, causal=causal)
    try:
        out, lse = attention(query, key, value, causal=causal, return_lse=True, backend=backend)
    except AttnError as refusal:
        assert "not supported" in str(refusal) or "accepted" in str(refusal)  # noqa: PT017
        return
    assert_close(out, expected, torch.bfloat16, "out")
    assert_close(lse, expected_lse, torch.bfloat16, "lse")
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (query, key, value))
    wanted = torch.autograd.grad((expected * weights.double()).sum(), (query, key, value))
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, torch.bfloat16, "gradient")


def test_recomputation_in_autograds_thread_uses_the_scope_of_the_forward():
    seen = []

    def recorded(query):
        out = attention(query, query, query)
        seen.append(out.flatten()[0].item())
        return out.sin()

    query = drawn(1, 4, 2, 8).requires_grad_()
    with use_backend("alpha"):
        out = checkpoint(recorded, query, use_reentrant=False)
    with use_backend("beta"):
        out.sum().backward()
    assert seen == [1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_stream_and_a_graph_give_the_same(backend):
    query = drawn(2, 64, 4, 64)
    expected = attention(query, query, query, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = attention(query, query, query, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(query, query, query, backend=backend)
    query.copy_(drawn(2, 64, 4, 64))
    graph.replay()
    torch.cuda.synchronize()
    assert_close(captured, attention(query, query, query, backend=backend).double(), torch.bfloat16, "out")


LENGTH = 8192
DENSE = LENGTH * LENGTH  # bytes of one bool mask


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("native", {"causal": True}),
        ("native_flash", {"causal": True}),
        ("native_flash", {"causal": True, "window_size": (256, -1)}),
        ("native_cudnn", {"causal": True}),
        ("native_efficient", {"causal": True}),
        ("native_efficient", {"padding": True}),
        ("native", {"padding": True}),
    ],
)
def test_no_dense_mask_is_made_where_the_kernel_needs_none(backend, options):
    query = drawn(1, LENGTH, 2, 64)
    options = dict(options)
    if options.pop("padding", False):
        keep = torch.arange(LENGTH, device="cuda")[None] > LENGTH // 3
        options["attn_mask"] = KeyPadding(keep)
    planned = plan(query, query, query, backend=backend, **options)
    planned(query, query, query)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    planned(query, query, query)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < DENSE / 2


def test_tensors_on_two_devices_are_refused():
    query = drawn(1, 4, 2, 8)
    with pytest.raises(AttnError, match="device: query, key and value are on cuda:0, cpu, cuda:0"):
        attention(query, query.cpu(), query)
