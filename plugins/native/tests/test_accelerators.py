"""The adapters of other accelerators' kernels, over stand-ins that have the libraries' limits."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from attn_core import attention

if find_spec("torch_npu") is not None or find_spec("torch_xla") is not None:
    pytest.skip("one of the libraries is installed", allow_module_level=True)


def inputs(queries, keys, *, heads=(2, 2), head_dim=64, batch=1, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = ((batch, queries, heads[0], head_dim), *[(batch, keys, heads[1], head_dim)] * 2)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(out, tensors):
    return torch.autograd.grad(out.float().square().sum(), tensors)


def agree(found, exact):
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=0.06, rtol=0.03)


def held_to_exact(backend, tensors, **options):
    out = attention(*tensors, backend=backend, **options)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = attention(*exact, backend="native_math", **options)
    agree([out, *gradients(out, tensors)], [expected, *gradients(expected, exact)])


@pytest.mark.parametrize(
    ("queries", "keys"), [(1300, 1300), (300, 300), (640, 640), (1536, 256), (77, 700), (513, 129), (1024, 512)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_xla_pads_lengths_to_the_blocks_of_the_backward(queries, keys, causal):
    held_to_exact("native_xla_on_cpu", inputs(queries, queries if causal else keys, heads=(1, 1)), causal=causal)
