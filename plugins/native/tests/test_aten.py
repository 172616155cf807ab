"""``native_flash`` on the CPU, against the float64 reference."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from attn_core import attention
from attn_core.declaration import Backward
from attn_core.facts import Facts
from attn_core.masks import KeyPadding
from attn_core.testing import assert_close, bounds, reference
from attn_native import aten_corner
from attn_native.aten import flash_backward, flash_forward
from attn_native.specs.aten import CUDNN, EFFICIENT, FLASH

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("dense", "heads first", "strided head dim", "expanded batch", "expanded heads", "expanded rows", "sliced")


def laid_out(layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Draw (B, S, H, D) numbers, in memory as ``layout`` says."""
    batch, rows, heads, width = shape
    if layout == "heads first":
        return torch.randn(batch, heads, rows, width).to(dtype).transpose(1, 2)
    if layout == "strided head dim":
        return torch.randn(batch, rows, heads, 2 * width).to(dtype)[..., ::2]
    if layout == "expanded batch":
        return torch.randn(1, rows, heads, width).to(dtype).expand(shape)
    if layout == "expanded heads":
        return torch.randn(batch, rows, 1, width).to(dtype).expand(shape)
    if layout == "expanded rows":
        return torch.randn(batch, 1, heads, width).to(dtype).expand(shape)
    if layout == "sliced":
        return torch.randn(batch, rows + 3, heads + 1, width + 5).to(dtype)[:, 2:-1, 1:, 3:-2]
    return torch.randn(shape).to(dtype)


def check(inputs: list[torch.Tensor], call: Any, *, scale: float, **options: Any) -> None:
    """Compare result, lse and gradients of ``call`` with the reference, on the same numbers."""
    query, key, value = inputs
    dtype = query.dtype
    leaves = [item.detach().requires_grad_() for item in inputs]
    out, lse = call(*leaves, scale=scale, return_lse=True, **options)
    exact = [item.detach().double().requires_grad_() for item in inputs]
    expected, expected_lse = reference(*exact, scale=scale, **options)
    grad_out = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    allowed = bounds(query, key, value, grad_out=grad_out, scale=scale, **options)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not lse.requires_grad
    assert_close(out, expected, dtype, "out", bound=allowed.out)
    assert_close(lse, expected_lse, dtype, "lse", bound=allowed.lse)
    found = torch.autograd.grad(out, leaves, grad_out)
    wanted = torch.autograd.grad(expected, exact, grad_out.double())
    for name, item, right in zip(("query", "key", "value"), found, wanted, strict=True):
        assert_close(item, right, dtype, f"gradient of {name}", bound=getattr(allowed, name))
    with torch.no_grad():
        alone = call(query, key, value, scale=scale, **options)
        if dtype in (torch.float32, torch.float64):
            assert alone.equal(out), "the result depends on the lse or the graph being asked for"
        else:  # with the lse, half precision is computed in float32
            assert_close(alone, expected, dtype, "out without lse", bound=allowed.out)
    plain = call(*leaves, scale=scale, **options)
    for name, item, right in zip(
        ("query", "key", "value"), torch.autograd.grad(plain, leaves, grad_out), wanted, strict=True
    ):
        assert_close(item, right, dtype, f"gradient of {name} without lse", bound=getattr(allowed, name))


def mask_for(kind: str, batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype) -> Any:
    """Draw a mask whose dimensions are sometimes given once for all, and which leaves some queries blind."""
    if kind == "none":
        return None
    if kind == "key_padding":
        return KeyPadding(torch.rand(batch, keys) < random.choice((0.2, 0.7)))
    shape = [random.choice((1, size)) for size in (batch, heads, queries, keys)]
    visible = torch.rand(shape) < random.choice((0.2, 0.7))
    if kind == "bool":
        return visible
    return torch.randn(shape).masked_fill(~visible, float("-inf")).to(random.choice((dtype, torch.float32)))


@pytest.mark.parametrize("seed", range(120))
def test_drawn_calls_are_right_forward_lse_and_gradients(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    dtype = random.choice(DTYPES)
    batch, key_heads, groups = random.choice((1, 2)), random.choice((1, 2)), random.choice((1, 1, 3))
    queries, keys = random.choice((1, 2, 7, 40)), random.choice((1, 2, 7, 40, 130))
    keys = random.choice((keys, queries))
    head_dim = random.choice((1, 3, 8, 16, 33, 64))
    value_head_dim = random.choice((head_dim, head_dim, 5, 40))
    heads = key_heads * groups
    inputs = [
        laid_out(random.choice(LAYOUTS), (batch, rows, count, width), dtype)
        for rows, count, width in (
            (queries, heads, head_dim),
            (keys, key_heads, head_dim),
            (keys, key_heads, value_head_dim),
        )
    ]
    options: dict[str, Any] = {}
    if random.random() < 0.5:
        options["causal"] = True
    mask = mask_for(random.choice(("none", "bool", "float", "key_padding")), batch, heads, queries, keys, dtype)
    if mask is not None:
        options["attn_mask"] = mask
    check(inputs, flash_forward, scale=random.choice((head_dim**-0.5, 0.3, 0.0, -0.4)), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 9), (9, 3), (1, 9), (9, 1), (70, 300)])
def test_causal_is_bottom_right_at_every_pair_of_lengths(dtype: torch.dtype, queries: int, keys: int) -> None:
    inputs = [torch.randn(2, rows, 2, 16).to(dtype) for rows in (queries, keys, keys)]
    check(inputs, flash_forward, scale=0.25, causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-3, 30.0])
@pytest.mark.parametrize("causal", [False, True])
def test_any_finite_scale_is_right(scale: float, causal: bool) -> None:
    check(
        [torch.randn(1, 6, 2, 8) for _ in range(3)], flash_forward, scale=scale, **({"causal": True} if causal else {})
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("position", range(3))
def test_any_strides_are_right(layout: str, position: int) -> None:
    inputs = [torch.randn(2, 12, 3, 8) for _ in range(3)]
    inputs[position] = laid_out(layout, (2, 12, 3, 8), torch.float32)
    check(inputs, flash_forward, scale=0.3)


def parts(dtype: torch.dtype, **options: Any) -> None:
    """Split the keys, take forward and backward of each part as a ring does, and compare with the whole."""
    query, key, value = (torch.randn(2, rows, heads, 16).to(dtype) for rows, heads in ((7, 4), (20, 2), (20, 2)))
    mask = options.pop("attn_mask", None)
    masks = [{}, {}] if mask is None else [{"attn_mask": mask[..., :8]}, {"attn_mask": mask[..., 8:]}]
    halves = [(key[:, :8], value[:, :8]), (key[:, 8:], value[:, 8:])]
    done = [
        flash_forward(query, *half, scale=0.25, return_lse=True, **part)
        for half, part in zip(halves, masks, strict=True)
    ]
    out, lse = aten_corner.merge(*done[0], *done[1])
    exact = [item.double().requires_grad_() for item in (query, key, value)]
    expected, expected_lse = reference(*exact, scale=0.25, attn_mask=mask)
    grad_out = torch.randn_like(out)
    allowed = bounds(query, key, value, grad_out=grad_out, scale=0.25, attn_mask=mask)
    assert_close(out, expected, dtype, "out", bound=allowed.out)
    assert_close(lse, expected_lse, dtype, "lse", bound=allowed.lse)
    grads = [
        flash_backward(grad_out, query, *half, out, lse, scale=0.25, **part)
        for half, part in zip(halves, masks, strict=True)
    ]
    found = (
        grads[0][0] + grads[1][0],
        torch.cat((grads[0][1], grads[1][1]), 1),
        torch.cat((grads[0][2], grads[1][2]), 1),
    )
    wanted = torch.autograd.grad(expected, exact, grad_out.double())
    for name, item, right in zip(("query", "key", "value"), found, wanted, strict=True):
        assert_close(item, right, dtype, f"gradient of {name}", bound=getattr(allowed, name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_each_part_from_the_global_result_gives_the_gradients_of_the_whole(dtype: torch.dtype) -> None:
    parts(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_parts_is_right_where_some_queries_see_nothing_in_one_part_or_in_both(dtype: torch.dtype) -> None:
    mask = torch.rand(2, 1, 7, 20) < 0.5
    mask[0, :, 0] = False
    mask[0, :, 1, :8] = False
    mask[1, :, 2, 8:] = False
    parts(dtype, attn_mask=mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize(("scale", "value_head_dim"), [(0.3, 8), (-0.3, 12), (0.0, 5)])
def test_backward_function_agrees_with_the_graph(
    causal: bool, queries: int, keys: int, scale: float, value_head_dim: int
) -> None:
    shapes = ((queries, 4, 8), (keys, 2, 8), (keys, 2, value_head_dim))
    inputs = [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    options = {"scale": scale, **({"causal": True} if causal else {})}
    out, lse = flash_forward(*inputs, return_lse=True, **options)
    grad_out = torch.randn_like(out)
    wanted = torch.autograd.grad(out, inputs, grad_out)
    with torch.no_grad():
        found = flash_backward(grad_out, *inputs, out, lse, **options)
    for item, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(item, right)


def test_gradients_arriving_expanded_or_strided_are_read_right() -> None:
    inputs = [torch.randn(2, 9, 2, 8, requires_grad=True) for _ in range(3)]
    exact = [item.detach().double().requires_grad_() for item in inputs]
    for keys in (9, 4):
        cut = [inputs[0], inputs[1][:, :keys], inputs[2][:, :keys]]
        exact_cut = [exact[0], exact[1][:, :keys], exact[2][:, :keys]]
        for grad_out in (
            torch.ones(()).expand(2, 9, 2, 8),
            torch.randn(2, 9, 2, 16)[..., ::2],
            torch.randn(8, 2, 9, 2).T,
        ):
            found = torch.autograd.grad(flash_forward(*cut, scale=0.3, causal=True), inputs, grad_out)
            wanted = torch.autograd.grad(reference(*exact_cut, scale=0.3, causal=True)[0], exact, grad_out.double())
            for item, right in zip(found, wanted, strict=True):
                torch.testing.assert_close(item.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_a_mask_whose_keys_are_not_side_by_side_is_read_right(layout: str) -> None:
    """torch 2.6 reads it as if they were."""
    inputs = [torch.randn(1, 20, 2, 8) for _ in range(3)]
    mask = {
        "strided": lambda: torch.randn(1, 2, 20, 40)[..., ::2],
        "transposed": lambda: torch.randn(1, 2, 20, 20).transpose(2, 3),
        "expanded": lambda: torch.randn(1, 2, 20, 1).expand(1, 2, 20, 20),
    }[layout]()
    exact = [item.double().requires_grad_() for item in inputs]
    right, right_lse = reference(*exact, scale=0.3, attn_mask=mask.double())
    wanted = torch.autograd.grad(right.sum(), exact)
    out, lse = flash_forward(*inputs, scale=0.3, attn_mask=mask, return_lse=True)
    found = flash_backward(torch.ones_like(out), *inputs, out, lse, scale=0.3, attn_mask=mask)
    for item, expected in zip((out, lse, *found), (right, right_lse, *wanted), strict=True):
        torch.testing.assert_close(item.double(), expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [*range(1, 20), 31, 33, 513, 514])
@pytest.mark.parametrize("causal", [False, True])
def test_nan_in_what_a_query_sees_is_never_hidden(dtype: torch.dtype, length: int, causal: bool) -> None:
    draw = torch.randn(3, 1, length, 1, 8).to(dtype)
    for spoiled, rows in (
        (0, slice(length // 2, length // 2 + 1)),
        (1, slice(0, 1)),
        (1, slice(None)),
        (2, slice(0, 1)),
    ):
        inputs = draw.clone()
        inputs[spoiled, :, rows] = float("nan")
        expected, expected_lse = reference(*inputs, scale=0.3, causal=causal)
        out, lse = flash_forward(*inputs, scale=0.3, causal=causal, return_lse=True)
        must = expected.isnan()
        assert out.isnan()[must].all()
        assert lse.isnan()[expected_lse.isnan()].all()
        assert flash_forward(*inputs, scale=0.3, causal=causal).isnan()[must].all()


def test_the_same_bits_twice() -> None:
    inputs = [torch.randn(2, 300, 2, 32, requires_grad=True) for _ in range(3)]

    def once() -> list[torch.Tensor]:
        out = flash_forward(inputs[0][:, :70], *inputs[1:], scale=0.2, causal=True)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    assert all(first.equal(second) for first, second in zip(once(), once(), strict=True))


def test_key_padding_costs_no_dense_mask_and_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.Tensor] = []
    from attn_native import aten_cpu

    op = aten_cpu._FLASH
    monkeypatch.setattr(
        aten_cpu, "_FLASH", lambda *args, **options: (taken.append(options["attn_mask"]), op(*args, **options))[1]
    )
    query = torch.randn(2, 5, 1, 8)
    padding = KeyPadding(torch.tensor([[True] * 3 + [False] * 2, [False] + [True] * 4]))
    for _ in range(2):
        flash_forward(query, query, query, scale=0.3, attn_mask=padding, causal=True)
    assert taken[0].shape == (2, 1, 1, 5)
    assert taken[0] is taken[1]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param(backend, options, marks=[pytest.mark.slow] if wholly and set(options) != wholly else [])
        for backend, wholly in (("aot_eager", None), ("inductor", {"mask", "causal"}))
        for options in (
            {},
            {"causal": True},
            {"causal": True, "return_lse": True},
            {"mask": "bool"},
            {"mask": "key_padding", "causal": True},
        )
    ],
    ids=str,
)
def test_compiled_calls_are_right_static_and_dynamic(dynamic: bool, backend: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    options = dict(options)
    kind = options.pop("mask", None)

    def call(query: Any, key: Any, value: Any, keep: Any) -> Any:
        masks = {"bool": keep, "key_padding": None if keep is None else KeyPadding(keep[:, 0, 0])}
        extra = {} if kind is None else {"attn_mask": masks[kind]}
        result = flash_forward(query, key, value, scale=0.3, **extra, **options)
        return result[0] if isinstance(result, tuple) else result

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=backend)
    for queries, keys in ((6, 6), (5, 11), (12, 7)):
        inputs = [
            torch.randn(2, rows, heads, 8, requires_grad=True) for rows, heads in ((queries, 4), (keys, 2), (keys, 2))
        ]
        keep = torch.rand(2, 1, 1, keys) < 0.6 if kind else None
        expected = call(*inputs, keep)
        out = compiled(*inputs, keep)
        torch.testing.assert_close(out, expected)
        grad_out = torch.randn_like(out)
        for found, wanted in zip(
            torch.autograd.grad(out, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out), strict=True
        ):
            torch.testing.assert_close(found, wanted)


def test_compiled_self_attention_takes_one_tensor_three_times() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: flash_forward(x[:, 2:], x, x, scale=0.3, causal=True), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(1, 6, 1, 8, requires_grad=True)
    out = compiled(x)
    expected = flash_forward(x[:, 2:], x, x, scale=0.3, causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))


# --- the declarations ---------------------------------------------------------------------------------------------------

ON_HOPPER = {"platform": "cuda", "compute_capability": (9, 0), "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("spec", "facts", "words"),
    [
        (FLASH, {"window_size": (4, 0)}, "no window"),
        (FLASH, {"mask": "float", "mask_gradient": True}, "no gradient of its mask"),
        (FLASH, {"dropout": True}, "draws nothing"),
        (FLASH, {**ON_HOPPER, "window_size": (4, -1), "lengths": "more queries"}, "right side"),
        (FLASH, {**ON_HOPPER, "window_size": (4, 4), "lengths": "more queries"}, "right side"),
        (FLASH, {**ON_HOPPER, "mask": "bool"}, "takes no mask"),
        (FLASH, {**ON_HOPPER, "head_dim": 264, "value_head_dim": 264}, "head_dim"),
        (FLASH, {**ON_HOPPER, "deterministic": True, "backward": True}, "atomics"),
        (FLASH, {**ON_HOPPER, "compute_capability": (8, 9), "head_dim": 256, "backward": True}, "above 192"),
        (FLASH, {**ON_HOPPER, "dtype": "float32"}, "dtype"),
        (EFFICIENT, {**ON_HOPPER, "window_size": (4, 0)}, "forgets the window"),
        (EFFICIENT, {**ON_HOPPER, "mask": "float", "mask_dtype": "float32"}, "rounded"),
        (EFFICIENT, {**ON_HOPPER, "compute_capability": (7, 5)}, "bfloat16 needs"),
        (CUDNN, {**ON_HOPPER, "mask": "bool"}, "written-out bias"),
        (CUDNN, {**ON_HOPPER, "dropout": True, "causal": True, "lengths": "fewer queries"}, "draw separately"),
        (CUDNN, {**ON_HOPPER, "compute_capability": (8, 0), "head_dim": 256, "value_head_dim": 256}, "head_dim"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_with_its_reason(spec: Any, facts: dict[str, Any], words: str) -> None:
    made = Facts(**facts)
    here = [item for item in spec.alternatives if made.platform in item.platforms]
    assert all(any(words in reason for reason in item.reasons(made)) for item in here[:1])


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        (FLASH, {"causal": True, "lengths": "more queries", "mask": "key_padding", "backward": True}),
        (FLASH, {**ON_HOPPER, "window_size": (4, 0), "lengths": "more queries", "dropout": True, "backward": True}),
        (FLASH, {**ON_HOPPER, "window_size": (4, 4), "mask": "packed", "lengths": "more queries", "backward": True}),
        (FLASH, {**ON_HOPPER, "compute_capability": (8, 9), "head_dim": 256}),
        (EFFICIENT, {**ON_HOPPER, "mask": "float", "mask_dtype": "bfloat16", "mask_gradient": True, "backward": True}),
        (CUDNN, {**ON_HOPPER, "causal": True, "lengths": "fewer queries", "backward": True, "head_dim": 256}),
    ],
)
def test_what_a_kernel_can_do_is_admitted(spec: Any, facts: dict[str, Any]) -> None:
    assert spec.reasons(Facts(**facts)) == []


@pytest.mark.parametrize("spec", [FLASH, EFFICIENT, CUDNN])
def test_the_backward_is_narrower_only_in_what_it_says(spec: Any) -> None:
    for alternative in spec.alternatives:
        assert alternative.backward is True or isinstance(alternative.backward, Backward)
        assert alternative.lse


def test_code_compiled_for_any_length_asks_for_few_relations_of_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    call = partial(attention, causal=True, backend="native_flash")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for queries, keys in [
        (20, 33),
        (19, 80),
        (33, 20),
        (80, 30),
        (50, 50),
        (30, 100),
        (100, 3),
        (3, 5),
        (5, 7),
        (6, 6),
    ]:
        query, key = torch.randn(1, queries, 2, 8), torch.randn(1, keys, 1, 8)
        assert_close(compiled(query, key, key), reference(query, key, key, causal=True)[0], torch.float32, "out")
    assert counter.frame_count <= 3  # fewer queries, more, as many
