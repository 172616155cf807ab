"""A backward computes what its forward was of, whatever autocast is open around it."""

from __future__ import annotations

import pytest
import torch

from attn_core import attention
from attn_core.loading import Adapter
from attn_core.running import with_backward
from attn_native import math

ADAPTER = Adapter(math.forward, math.backward)


def core_graph(query):
    with torch.autocast("cpu", enabled=False):  # as the core has it around a call
        return with_backward(ADAPTER, query, query, query, scale=0.3, causal=True)


def gradient(call, *, forward, backward):
    query = torch.randn(1, 24, 2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward):
        out = call(query)
    grad_out = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward):
        out.backward(grad_out)
    return query.grad


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("compiler", [None, "eager", "inductor"])
def test_autocast_changes_no_backward_of_the_core(compiler, forward):
    torch._dynamo.reset()
    call = core_graph if compiler is None else torch.compile(core_graph, fullgraph=True, backend=compiler)
    wanted = gradient(core_graph, forward=False, backward=False)
    for backward in (False, True):
        torch.testing.assert_close(gradient(call, forward=forward, backward=backward), wanted)


def test_autocast_reaches_no_backward_of_tensors_without_data():
    query = torch.empty(1, 4, 2, 8, device="meta", requires_grad=True)
    with torch.autocast("cpu"):
        with_backward(ADAPTER, query, query, query, scale=1.0).sum().backward()
    assert query.grad.device.type == "meta"


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_autocast_changes_no_backward_of_the_example(compiler):
    torch._dynamo.reset()

    def chunked(query):
        return attention(query, query, query, backend="chunked")

    call = chunked if compiler is None else torch.compile(chunked, fullgraph=True, backend=compiler)
    for forward in (False, True):
        found, wanted = (gradient(call, forward=forward, backward=backward) for backward in (True, False))
        torch.testing.assert_close(found, wanted)
