"""What the adapters hand to kernels, and what their declarations say, held to what the libraries take."""

from __future__ import annotations

import pytest

pytest.importorskip("kernels", reason="kernels is not installed: pip install 'attn-hub[hub]'")

import torch

from attn_core import KeyPadding, Packed, attention
from attn_core.facts import Facts
from attn_hub import declarations, fetching
from attn_hub.plugin import attn_backends

FLASH = ("flash_hub", "flash_3_hub", "flash_4_hub")
ALL = (*FLASH, "aiter_hub")
READING_ON = ("flash_3_hub", "flash_4_hub")
LEFT = KeyPadding(torch.tensor([[True] * 7, [False] * 3 + [True] * 4]))
HOLES = KeyPadding(torch.tensor([[True, False, True, True, False, True, True], [False] * 6 + [True]]))
NOTHING = KeyPadding(torch.zeros(2, 7, dtype=torch.bool))


def inputs(head_dim=16, *, queries=7, keys=7, heads=(4, 2), batch=2, gradients=True):
    shapes = ((batch, queries, heads[0], head_dim), *[(batch, keys, heads[1], head_dim)] * 2)
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.bfloat16, requires_grad=gradients) for shape in shapes]


def gradients(out, tensors):
    return torch.autograd.grad(out.float().square().sum(), tensors)


def agree(found, exact):
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=0.05, rtol=0.02)


def held_to_exact(name, tensors, **options):
    """The result and, of a kernel that has them, gradients, held to those of native_math; the result is returned."""
    out = attention(*tensors, backend=f"{name}_on_cpu", **options)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    expected = attention(*exact, backend="native_math", **options)
    agree([out], [expected])
    if out.requires_grad:
        agree(gradients(out, tensors), gradients(expected, exact))
    return out


@pytest.fixture
def handed(monkeypatch):
    """The head dims of each call of the library."""
    widths = []
    for name in ALL:
        module = fetching._fetched[name]
        for function in ("flash_attn_func", "flash_attn_varlen_func"):
            monkeypatch.setattr(module, function, spying(getattr(module, function), widths))
    return widths


def spying(real, widths):
    def spied(query, *others, **options):
        widths.append(query.shape[-1])
        return real(query, *others, **options)

    return spied


@pytest.mark.parametrize("head_dim", [8, 40, 72, 104, 112])
def test_flash_4_takes_head_dims_in_the_steps_in_which_its_backward_is_read(head_dim, handed):
    held_to_exact("flash_4_hub", inputs(head_dim, heads=(6, 2)))
    assert [width % 32 for width in handed] == [0]


@pytest.mark.parametrize(("head_dim", "width"), [(8, 64), (64, 64), (65, 128), (128, 128)])
def test_aiter_is_given_the_head_dims_that_it_is_built_for(head_dim, width, handed):
    held_to_exact("aiter_hub", inputs(head_dim, gradients=False))
    held_to_exact("aiter_hub", inputs(head_dim, gradients=False), attn_mask=LEFT)
    assert handed == [width, width]


@pytest.mark.parametrize("name", FLASH)
def test_padding_that_hides_every_key_is_a_result_and_gradients_of_zero(name):
    tensors = inputs()
    out = attention(*tensors, attn_mask=NOTHING, backend=f"{name}_on_cpu")
    assert not out.any()
    assert not any(grad.any() for grad in gradients(out, tensors))


@pytest.mark.parametrize("name", FLASH)
def test_a_nan_in_the_scores_is_in_the_lse(name, monkeypatch):
    monkeypatch.setattr("attn_core.shaping._SPLIT_QUERIES", 0)  # as of a call of many queries
    query, key, value = inputs(gradients=False)
    query[0, 6, 1, 0] = torch.nan
    _, lse = attention(query, key, value, causal=True, return_lse=True, backend=f"{name}_on_cpu")
    assert lse[0, 1, 6].isnan()
    assert int(lse.isnan().sum()) == 1


@pytest.mark.parametrize("mask", [LEFT, HOLES, NOTHING], ids=["left", "holes", "nothing"])
@pytest.mark.parametrize("name", ALL)
def test_causal_with_padding_hides_what_is_padded_and_moves_no_diagonal(name, mask):
    for head_dim in (16, 120):
        held_to_exact(name, inputs(head_dim, gradients=name in FLASH), attn_mask=mask, causal=True)


@pytest.mark.parametrize("name", FLASH)
def test_a_gradient_that_no_kernel_can_read_is_copied(name):
    tensors = inputs()
    out = attention(*tensors, backend=f"{name}_on_cpu")
    wide = torch.randn(2, 7, 4, 19, dtype=torch.bfloat16)
    found = torch.autograd.grad(out, tensors, wide[..., 3:])
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    agree(found, torch.autograd.grad(attention(*exact, backend="native_math"), exact, wide[..., 3:].double()))


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FLASH)
def test_no_sequence_of_a_padded_batch_gets_the_nan_of_another(name, causal, readable, monkeypatch):
    if not readable:
        monkeypatch.setattr("attn_core.packing._readable", lambda _: False)
    keep = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    tensors = inputs(batch=3)
    for tensor in tensors:
        tensor.data[1] = torch.nan
    out = attention(*tensors, attn_mask=KeyPadding(keep), causal=causal, backend=f"{name}_on_cpu")
    grad_out = torch.ones_like(out)
    grad_out[1] = torch.nan
    grads = torch.autograd.grad(out, tensors, grad_out)
    for row in (0, 2):
        alone = [tensor[row : row + 1].detach().double().requires_grad_() for tensor in tensors]
        expected = attention(*alone, attn_mask=KeyPadding(keep[row : row + 1]), causal=causal, backend="native_math")
        agree([out[row : row + 1]], [expected])
        agree([grad[row : row + 1] for grad in grads], torch.autograd.grad(expected.sum(), alone))


# --- in compiled code -------------------------------------------------------------------------------------------------------


def call(name, option, keep, starts, *tensors):
    """A call of a kind, as a model would make it inside compiled code."""
    mask = {
        "padding": lambda: KeyPadding(keep),
        "packed": lambda: Packed(starts, starts, max_seqlen_q=4, max_seqlen_k=4),
    }
    options = {"attn_mask": mask[option]()} if option in mask else {option: True} if option else {}
    return attention(*tensors, backend=f"{name}_on_cpu", **options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name in FLASH for option in ("", "causal", "padding", "packed", "return_lse")]
    + [("aiter_hub", option) for option in ("causal", "padding", "packed")],
)
def test_compiled_code_holds_a_whole_call_and_its_gradients(name, option, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (7, 9):
        batch = 1 if option == "packed" else 2
        tensors = inputs(64, queries=length, keys=length, batch=batch, gradients=name in FLASH)
        keep = torch.arange(length) >= torch.tensor([[0], [3]])
        starts = torch.tensor([0, 3, 3, length - 2, length], dtype=torch.int32)
        results = [function(name, option, keep, starts, *tensors) for function in (call, compiled)]
        outs = [result[0] if option == "return_lse" else result for result in results]
        agree(outs[:1], outs[1:])
        if option == "return_lse":
            agree(results[0][1:], results[1][1:])
        if name in FLASH:
            agree(gradients(outs[0], tensors), gradients(outs[1], tensors))
    torch.compiler.reset()


@pytest.mark.parametrize("name", ALL)
def test_the_operators_keep_what_torch_asks_of_them(name):
    query, key, value = (tensor.detach().contiguous() for tensor in inputs(64))
    given = (None, None, None, None, None, 0.125, True, False)
    forward = getattr(torch.ops.attn_hub, name).default
    torch.library.opcheck(forward, (query, key, value, *given))
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    packed = (None, starts, starts, 4, 4, 0.125, False, False)
    torch.library.opcheck(forward, (query[0], key[0], value[0], *packed))
    if name in FLASH:
        backward = getattr(torch.ops.attn_hub, f"{name}_backward").default
        out, lse = forward(query, key, value, *given)
        torch.library.opcheck(backward, (out, query, key, value, out, lse, *given))
        out, lse = forward(query[0], key[0], value[0], *packed)
        torch.library.opcheck(backward, (out, query[0], key[0], value[0], out, lse, *packed))
    if name in READING_ON:
        shortened = (torch.tensor([7, 4], dtype=torch.int32), None, None, None, None, 0.125, False, False)
        torch.library.opcheck(forward, (query, key, value, *shortened))
        out, lse = forward(query, key, value, *shortened)
        found = backward(out, query, key, value, out, lse, *shortened)
        plan = [
            torch.empty_like(item) for item in (query, key, value)
        ]  # values of hidden keys are anything: no opcheck
        assert [(item.shape, item.stride()) for item in found] == [(item.shape, item.stride()) for item in plan]


# --- what is declared -------------------------------------------------------------------------------------------------------

HOPPER = {"platform": "cuda", "compute_capability": (9, 0), "dtype": "bfloat16"}
INSTINCT = {**HOPPER, "platform": "rocm", "compute_capability": (9, 4)}
SMALL_BLACKWELL = {**HOPPER, "compute_capability": (12, 0)}


@pytest.mark.parametrize(
    ("spec", "facts", "reason"),
    [
        (declarations.FLASH_3, {**HOPPER, "head_dim": 192, "deterministic": True, "backward": True}, None),
        (declarations.FLASH_3, {**HOPPER, "head_dim": 256, "deterministic": True}, None),
        (
            declarations.FLASH_3,
            {**HOPPER, "head_dim": 200, "deterministic": True, "backward": True},
            "deterministic excludes head dims above 192 with gradients",
        ),
        (declarations.FLASH, {**HOPPER, "head_dim": 248, "causal": True, "mask": "key_padding"}, None),
        (
            declarations.FLASH,
            {**HOPPER, "head_dim": 256, "causal": True, "mask": "key_padding"},
            "head dims above 248 exclude key padding together with causal",
        ),
        (declarations.SAGE_HUB, HOPPER, None),
        (declarations.SAGE_HUB, SMALL_BLACKWELL, "compute capability"),
        (declarations.SAGE_BLACKWELL, SMALL_BLACKWELL, None),
        (declarations.SAGE_BLACKWELL, {**SMALL_BLACKWELL, "compute_capability": (10, 0)}, "compute capability"),
        (declarations.AITER, INSTINCT, None),
        (declarations.AITER, {**INSTINCT, "compute_capability": (9, 5)}, None),
        (declarations.AITER, {**INSTINCT, "compute_capability": (9, 0)}, "compute capability"),
        (declarations.AITER, {**INSTINCT, "dtype": "float16"}, "float16"),
        (declarations.AITER, {**INSTINCT, "head_dim": 136, "value_head_dim": 136}, "136"),
    ],
)
def test_declarations_say_what_the_builds_take(spec, facts, reason):
    reasons = spec.reasons(Facts(**facts))
    assert not reasons if reason is None else reason in str(reasons)


# --- sageattention ----------------------------------------------------------------------------------------------------------


def test_float4_hides_no_size_of_keys_and_values():
    query, key, value = inputs(64, heads=(2, 2), gradients=False)
    expected = attention(query, key, value, backend="native_math").double()
    for size in (1e-5, 2.0**-20, 1.0, 3e4):
        out = attention(query / size, key * size, value * size, backend="sage_blackwell_hub_on_cpu").double() / size
        assert float((out - expected).norm() / expected.norm()) < 0.2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_float4_hides_nothing_that_is_not_finite(place, bad):
    tensors = inputs(64, heads=(2, 2), gradients=False)
    tensors[place][0, 3, 0, 0] = bad
    out = attention(*tensors, backend="sage_blackwell_hub_on_cpu")
    assert not out[0, :, 0, 0].isfinite().any()
    assert out[1].isfinite().all()
    assert out[0, :, 1].isfinite().all()


def test_every_kernel_that_compiles_when_it_is_called_says_so():
    compiling = {spec.name for spec in attn_backends() if spec.first_call_compiles}
    assert compiling == {"flash_4_hub", "sage_hub", "sage_blackwell_hub"}


def test_float4_traces():
    torch.compiler.reset()
    query, key, value = inputs(64, heads=(2, 2), gradients=False)
    for causal in (False, True):
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        found = compiled(query, key, value, causal=causal, backend="sage_blackwell_hub_on_cpu")
        assert torch.equal(found, attention(query, key, value, causal=causal, backend="sage_blackwell_hub_on_cpu"))
    torch.library.opcheck(torch.ops.attn_hub.sage_blackwell_hub.default, (query, key, value, 0.125, False))
    torch.compiler.reset()


def test_sage_is_given_what_it_can_read():
    storage = torch.randn(3, 2, 128 * 2 * 64 + 1, dtype=torch.bfloat16)
    query, key, value = (part[:, 1:].unflatten(1, (128, 2, 64)) for part in storage)
    out = attention(query, key, value, backend="sage_hub_on_cpu")
    agree([out], [attention(query, key, value, backend="native_math")])
