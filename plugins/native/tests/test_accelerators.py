"""The adapters of other accelerators' kernels, over stand-ins that have the libraries' limits."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from attn_core import CallRefused, Packed, attention

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


# --- NPU --------------------------------------------------------------------------------------------------------------------


def starts(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32)


def test_npu_takes_256_heads_and_2048_sequences_at_most():
    tensors = inputs(4, 4, heads=(256, 256), head_dim=16)
    assert attention(*tensors, backend="native_npu_on_cpu").shape == (1, 4, 256, 16)
    tensors = inputs(4, 4, heads=(257, 257), head_dim=16)
    with pytest.raises(CallRefused, match="more than 256 query heads are excluded"):
        attention(*tensors, backend="native_npu_on_cpu")
    for count in (2048, 2049):
        tensors, each = inputs(count, count, head_dim=16), starts(*range(1, count + 1))
        if count == 2048:
            assert attention(*tensors, attn_mask=Packed(each, each), backend="native_npu_on_cpu").shape[1] == count
            continue
        with pytest.raises(CallRefused, match="found 2049 packed sequences; accepted: up to 2048"):
            attention(*tensors, attn_mask=Packed(each, each), backend="native_npu_on_cpu")


def call(option, visible, ends, *tensors):
    """A call of a kind, as a model would make it inside compiled code."""
    mask = Packed(ends, ends, max_seqlen_q=4, max_seqlen_k=4) if option == "packed" else None
    mask = visible if option == "bool" else mask
    others = {option: True} if option in ("causal", "return_lse") else {}
    return attention(*tensors, attn_mask=mask, backend="native_npu_on_cpu", **others)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("option", ["", "causal", "bool", "packed", "return_lse"])
def test_npu_is_whole_in_compiled_code_with_its_gradients(option, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (7, 9):
        tensors = inputs(length, length, heads=(4, 2), head_dim=16)
        visible, ends = torch.rand(1, 4, length, length) > 0.3, starts(3, length - 2, length)
        visible[:, :, 2] = False
        results = [function(option, visible, ends, *tensors) for function in (call, compiled)]
        outs = [result[0] if option == "return_lse" else result for result in results]
        agree(outs[:1], outs[1:])
        if option == "return_lse":
            agree(results[0][1:], results[1][1:])
        agree(gradients(outs[0], tensors), gradients(outs[1], tensors))
    torch.compiler.reset()


def test_npu_refuses_an_empty_sequence_in_compiled_code_when_it_is_run():
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = inputs(7, 7, head_dim=16)
    with pytest.raises(CallRefused, match="found an empty sequence"):
        compiled("packed", None, starts(3, 3, 7), *tensors)
    torch.compiler.reset()


def test_the_operators_of_npu_keep_what_torch_asks_of_them():
    query, key, value = (tensor.detach() for tensor in inputs(7, 7, heads=(4, 2), head_dim=16, batch=2))
    operators = torch.ops.attn_native
    one = [tensor[0].requires_grad_() for tensor in (query, key, value)]
    dense = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    for tensors, given in ((dense, (None, None, None)), (one, (None, starts(3, 7), starts(3, 7)))):
        torch.library.opcheck(operators.npu_forward.default, (*tensors, *given, 0.25, 0))
        detached = [tensor.detach() for tensor in tensors]
        found = operators.npu_forward.default(*detached, *given, 0.25, 0)
        torch.library.opcheck(operators.npu_backward.default, (found[0], *detached, *found, *given, 0.25, 0))
