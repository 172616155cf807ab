"""torch's kernels on a GPU: what was wrong there once, each in the smallest call that showed it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attn_core import AttnError, attention
from attn_core.testing import Case, assert_close, bounds, compare, reference
from attn_native import aten, aten_corner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

DEVICE = "cuda"
KERNELS = {
    "native_flash": (aten.flash_forward, aten.flash_backward),
    "native_efficient": (aten.efficient_forward, aten.efficient_backward),
    "native_cudnn": (aten.cudnn_forward, aten.cudnn_backward),
}
BACKENDS = ("native", *KERNELS)
TRAINED = ("query", "key", "value")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """A result that a kernel leaves unwritten shows up where the allocator hands out what held NaN."""
    if torch.cuda.is_available():
        _ = [torch.full((2**size,), torch.nan, device=DEVICE) for size in range(7, 22)]


def assert_right(call, **fields):
    """Result and gradients, against the reference."""
    refusal = compare(Case(**{"device": DEVICE, "batch": 2, "dim": 64, "gradients": TRAINED, **fields}), call)
    assert refusal is None, refusal


def compiled(backend, *, dynamic):
    torch._dynamo.reset()

    def call(query, key, value, **options):
        return attention(query, key, value, backend=backend, **options)

    return torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")


# --- inside torch.compile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "offset", "sliced"])  # offset: begins on 6 bytes
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_calls_are_right_wherever_their_tensors_begin(backend, dynamic, layout):
    call = compiled(backend, dynamic=dynamic)
    for queries in (65, 96):
        assert_right(call, dtype="bfloat16", queries=queries, heads=(4, 2), causal=True, layouts=(layout,) * 3)


@pytest.mark.parametrize("lengths", [(40, 96), (96, 40)])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_calls_are_right_where_the_lengths_differ(backend, dynamic, lengths):
    call = compiled(backend, dynamic=dynamic)
    assert_right(call, dtype="bfloat16", queries=lengths[0], keys=lengths[1], heads=(4, 2), causal=True)


@pytest.mark.parametrize("mask", ["bool", "float", "key_padding"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["native", "native_efficient"])
def test_compiled_calls_with_a_mask_are_right(backend, dynamic, mask):
    gradients = (*TRAINED, "attn_mask") if mask == "float" else TRAINED
    call = compiled(backend, dynamic=dynamic)
    assert_right(call, dtype="bfloat16", queries=65, keys=70, mask=mask, mask_hides="rows", gradients=gradients)


@pytest.mark.parametrize("layout", ["offset", "sliced", "last strided", "expanded keys"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_are_right_wherever_their_tensors_begin(backend, dtype, layout):
    assert_right(partial(attention, backend=backend), dtype=dtype, queries=65, causal=True, layouts=(layout,) * 3)


# --- masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("once", [(False,) * 4, (True, True, False, False), (False, True, False, True)])
@pytest.mark.parametrize("queries", [33, 64, 65, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["native", "native_efficient"])
def test_the_gradient_of_a_mask_is_written_behind_the_diagonal_too(backend, dtype, queries, once):
    assert_right(
        partial(attention, backend=backend), dtype=dtype, queries=queries, heads=(2, 2), causal=True, mask="float",
        mask_once=once, gradients=(*TRAINED, "attn_mask"),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "last strided", "expanded", "sliced"])
@pytest.mark.parametrize(
    "once", [(True, True, False, True), (True, True, True, False), (False, True, False, False), (True,) * 4], ids=str
)
@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["native", "native_efficient"])
def test_a_mask_is_read_right_in_any_layout(backend, dtype, mask, once, layout):
    call = partial(attention, backend=backend)
    trained = (*TRAINED, "attn_mask") if mask == "float" else TRAINED
    for keys, gradients in ((37, ()), (64, ()), (37, trained)):  # 37: rows that do not begin on 16 bytes
        assert_right(
            call, dtype=dtype, queries=33, keys=keys, heads=(4, 2), mask=mask, mask_once=once, mask_layout=layout,
            mask_hides="rows", gradients=gradients,
        )  # fmt: skip


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_mask_may_be_all_that_requires_a_gradient(dtype, causal, heads):
    assert_right(
        partial(attention, backend="native"), dtype=dtype, queries=65, heads=heads, causal=causal, mask="float",
        gradients=("attn_mask",),
    )  # fmt: skip
    torch.cuda.synchronize()  # an illegal access is told here at the latest


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "fields", "words"),
    [
        ("native_flash", {"mask": "bool"}, "FlashAttention-2 takes no mask"),
        ("native_flash", {"mask": "key_padding"}, "FlashAttention-2 takes no mask"),
        ("native_flash", {"dtype": "float32"}, "dtype: found float32"),
        ("native_flash", {"deterministic": True, "gradients": TRAINED}, "adds with atomics"),
        ("native_cudnn", {"mask": "bool"}, "written-out bias"),
        ("native_efficient", {"window_size": (4, 0)}, "forgets the window"),
        ("native", {"deterministic": True, "gradients": TRAINED}, "adds up with atomics"),
        ("native", {"mask": "float", "mask_dtype": "float32"}, "in query's dtype only"),
    ],
)
def test_a_refusal_is_in_the_words_of_this_device(backend, fields, words):
    built = Case(**{"device": DEVICE, "dtype": "bfloat16", "dim": 64, **fields}).build()
    with pytest.raises(AttnError, match=words) as refusal:
        attention(built.query, built.key, built.value, backend=backend, **built.options)
    assert "device: found" not in str(refusal.value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hidden", [-1e38, -2.5e38, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "native_efficient"])
def test_a_row_of_the_smallest_numbers_hides_nothing(backend, dtype, hidden, causal):
    """The scores are alike, so that it is no matter whether such numbers swallow them: all keys that are left count alike."""
    query, key, value = (torch.randn(2, 9, 2, 16, device=DEVICE, dtype=dtype) for _ in range(3))
    query.zero_()
    mask = torch.zeros(1, 1, 9, 9, device=DEVICE, dtype=dtype)
    mask[:, :, 4] = torch.finfo(dtype).min if hidden is None else hidden
    out, lse = attention(query, key, value, attn_mask=mask, causal=causal, return_lse=True, backend=backend)
    seen = value[:, :5] if causal else value
    torch.testing.assert_close(out[:, 4], seen.float().mean(1).to(dtype), rtol=0, atol=0.02)
    torch.testing.assert_close(lse[:, :, 4], mask[:, :, 4, :1].float().expand(2, 2, 1)[..., 0])


# --- the backward as a function of its own ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "offset", "transposed"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", KERNELS)
def test_backward_of_parts_of_the_keys_adds_up_to_the_whole(backend, dtype, heads, layout):
    forward, backward = KERNELS[backend]
    case = Case(
        device=DEVICE, batch=2, dim=64, dtype=dtype, queries=70, keys=150, heads=heads, layouts=(layout,) * 3
    )  # fmt: skip
    built = case.build()
    query, grad_out = built.query, built.grad_out
    parts = [(built.key[:, keys], built.value[:, keys]) for keys in (slice(0, 61), slice(61, 150))]
    done = [forward(query, *part, scale=0.125, return_lse=True) for part in parts]
    out, lse = aten_corner.merge(*done[0], *done[1])
    grads = [backward(grad_out, query, *part, out, lse, scale=0.125) for part in parts]
    found = grads[0][0] + grads[1][0], *(torch.cat(pair, 1) for pair in list(zip(*grads, strict=True))[1:])

    exact = [tensor.detach().double().requires_grad_() for tensor in (query, built.key, built.value)]
    expected, expected_lse = reference(*exact, scale=0.125)
    allowed = bounds(*exact, grad_out=grad_out, dtype=query.dtype, scale=0.125)
    assert_close(out, expected, query.dtype, "result", bound=allowed.out)
    assert_close(lse, expected_lse, query.dtype, "lse", bound=allowed.lse)
    wanted = torch.autograd.grad(expected, exact, grad_out.double())
    for name, gradient, right in zip(TRAINED, found, wanted, strict=True):
        assert_close(gradient, right, query.dtype, f"gradient of {name}", bound=getattr(allowed, name))
