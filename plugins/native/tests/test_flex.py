"""flex on CPU, and what of its GPU path can be shown without a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch._dynamo.utils import counters

from attn_core.errors import BackendNotUsable
from attn_core.facts import Facts
from attn_core.masks import KeyPadding, Packed, visible_mask
from attn_core.requirements import library_reason
from attn_core.testing.reference import reference
from attn_native import flex, flex_blocks, flex_compiled, flex_operands
from attn_native.specs.flex import FLEX

SCALE = 0.2
ON_CPU, ON_CUDA = (library_reason(constraints.library) for constraints in FLEX.alternatives)
if ON_CUDA is not None:
    pytest.skip(f"flex {ON_CUDA}", allow_module_level=True)
COMPILED = pytest.mark.skipif(ON_CPU is not None, reason=f"flex on CPU {ON_CPU}")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def quick(monkeypatch):
    """Instances of this test's own, traced but run by eager kernels: the same graphs in a tenth of the time."""
    flex_compiled._compiled.cache_clear()
    monkeypatch.setattr(flex_compiled, "COMPILER", "aot_eager")
    yield
    flex_compiled._compiled.cache_clear()


def tensors(
    batch, queries, keys, heads=4, key_heads=2, head_dim=32, value_dim=None, dtype=torch.float32, *, grad=False
):
    sizes = [(queries, heads, head_dim), (keys, key_heads, head_dim), (keys, key_heads, value_dim or head_dim)]
    return [torch.randn(batch, *size, dtype=dtype, requires_grad=grad) for size in sizes]


def wrong_by(found, wanted):
    """The largest error, relative to the largest value."""
    assert found.shape == wanted.shape
    assert not found.isnan().any()
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)).item()


def assert_right(query, key, value, **options):
    options = {"scale": SCALE, **options}
    found = flex.forward(query, key, value, **options)
    wanted, _ = reference(query, key, value, **options)
    assert found.dtype == query.dtype
    assert wrong_by(found, wanted) < ROUNDING[query.dtype]


def graphs():
    return counters["stats"]["unique_graphs"]


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


def packed(queries, keys):
    """Three sequences; one without queries, one with more queries than keys."""
    return Packed(offsets(0, 0, queries - 20, queries), offsets(0, 15, keys - 5, keys))


def padding(batch, keys):
    """Holes, and a first batch row of which nothing is real."""
    keep = torch.rand(batch, keys) > 0.4
    keep[0] = False
    return KeyPadding(keep)


# --- the block mask -----------------------------------------------------------------------------------------------------


def walked(blocks, query_length, key_length):
    """Which pairs the kernel visits at all, and for which it skips the mask."""
    found = []
    for number, indices in (blocks[:2], blocks[2:4]):
        grid = torch.zeros_like(indices, dtype=torch.bool)
        chosen = torch.arange(indices.shape[-1]) < number[..., None]
        grid.scatter_(3, indices.long(), chosen)
        dense = grid.repeat_interleave(flex_blocks.BLOCK, 2).repeat_interleave(flex_blocks.BLOCK, 3)
        found.append(dense[:, :, :query_length, :key_length])
    return found[0] | found[1], found[1]


@pytest.mark.parametrize("kind", ["none", "key_padding", "bool", "packed"])
@pytest.mark.parametrize("limits", [(-1, 0), (-1, -1), (100, -1), (30, 60), (0, 0), (500, 0)])
@pytest.mark.parametrize("lengths", [(1, 300), (300, 300), (256, 256), (300, 700), (700, 300), (20, 30)])
def test_blocks_visit_all_that_is_visible_and_skip_the_mask_only_where_nothing_is_hidden(kind, limits, lengths):
    queries, keys = lengths
    if kind == "packed" and queries < 20:
        pytest.skip("one query is no three sequences")
    query, key, _ = tensors(2, *lengths)
    block_wise = (
        (torch.rand(2, 1, queries // 128 + 1, keys // 128 + 1) > 0.5)
        .repeat_interleave(128, 2)
        .repeat_interleave(128, 3)
    )
    attn_mask = {
        "none": lambda: None,
        "key_padding": lambda: padding(2, keys),
        "bool": lambda: block_wise[:, :, :queries, :keys],
        "packed": lambda: packed(*lengths),
    }[kind]()
    _, operands = flex_operands.prepare(query, key, attn_mask, SCALE, *limits, None, lse=False)
    wanted = visible_mask(query, key, attn_mask=attn_mask, window_size=limits)
    if wanted is None:
        assert operands.blocks is None
        return
    visited, skipped = walked(operands.blocks, queries, keys)
    assert not (wanted & ~visited).any()
    assert not (skipped & ~wanted).any()
    if kind == "none" and limits == (-1, 0) and 2 * flex_blocks.BLOCK < queries <= keys:
        assert skipped.any()
        assert not visited.all()


@pytest.mark.parametrize(
    ("queries", "heads", "forced"),
    [
        ((1, 64, 300), (4, 4), False),
        ((1, 32, 64), (4, 2), False),  # 64 queries of 2 heads are one block of 128 rows
        ((65, 100, 127, 300), (4, 2), True),
        ((32,), (8, 2), False),
        ((33,), (8, 2), True),
        ((1, 42), (6, 2), True),  # the kernel for short queries takes groups of powers of two
    ],
)
def test_grouped_queries_beyond_one_block_are_kept_from_the_kernel_for_short_queries(queries, heads, forced):
    for length in queries:
        query, key, _ = tensors(1, length, 300, *heads)
        form, _ = flex_operands.prepare(query, key, None, SCALE, -1, -1, None, lse=False)
        assert form.forced is forced, length


def test_the_block_mask_is_made_once_for_lengths_and_again_for_others():
    query, key, _ = tensors(1, 300, 300)
    first, second = (flex_operands.prepare(query, key, None, SCALE, -1, 0, None, lse=False)[1].blocks for _ in range(2))
    other = flex_operands.prepare(query[:, :200], key, None, SCALE, -1, 0, None, lse=False)[1].blocks
    assert first is second
    assert other is not first
    assert flex_operands._made.cache_info().maxsize


def test_a_description_keeps_its_block_mask_until_it_is_changed():
    query, key, _ = tensors(2, 300, 300)
    mask = KeyPadding(torch.ones(2, 300, dtype=torch.bool))
    first, second = (
        flex_operands.prepare(query, key, mask, SCALE, -1, -1, None, lse=False)[1].blocks for _ in range(2)
    )
    assert first is second
    mask.keep[:, 128:] = False
    changed = flex_operands.prepare(query, key, mask, SCALE, -1, -1, None, lse=False)[1].blocks
    assert changed.full_kv_num_blocks.flatten().tolist() != first.full_kv_num_blocks.flatten().tolist()


def test_no_tensor_of_queries_by_keys_is_made_for_a_block_mask():
    length = 2**18  # its square would be 64 GiB
    blocks = flex_blocks.blocks(flex_blocks.diagonal(length, length, -1000, 0, torch.device("cpu")))
    visited = blocks.kv_num_blocks + blocks.full_kv_num_blocks
    assert visited.max() == 9  # 128 queries see 1128 keys, in up to 9 blocks


# --- results ------------------------------------------------------------------------------------------------------------


CASES = {
    "plain": (tensors, (2, 150, 150), {}, {}),
    "causal, fewer queries": (tensors, (2, 100, 150), {}, {"causal": True}),
    "causal, more queries": (tensors, (2, 150, 100), {}, {"causal": True}),
    "window, groups of three, other value dim": (tensors, (2, 150, 140, 6, 2, 33, 16), {}, {"window_size": (17, 5)}),
    "half precision, head dim 80": (tensors, (2, 150, 150, 6, 2, 80), {"dtype": torch.bfloat16}, {"causal": True}),
    "float16, head dim 256": (tensors, (1, 60, 60, 2, 2, 256), {"dtype": torch.float16}, {"causal": True}),
    "head dim 1": (tensors, (2, 50, 60, 2, 2, 1, 3), {}, {}),
    "one query": (tensors, (2, 1, 150), {}, {"causal": True}),
    "scale 0": (tensors, (2, 30, 30), {}, {"causal": True, "scale": 0.0}),
    "softcap": (tensors, (2, 130, 130), {}, {"softcap": 3.0, "scale": 1.0, "causal": True}),
}


@COMPILED
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_is_right(case):
    make, sizes, more, options = CASES[case]
    assert_right(*make(*sizes, **more), **options)


def leave_nan_in_freed_memory():
    sizes = (64, 256, 512, 1024, 2048, 4096, 8192, 65536)
    _ = [torch.full((size,), float("nan")) for size in sizes for _ in range(4)]


@COMPILED
@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("keys", [8, 12, 40])
def test_small_head_dims_are_right_whatever_lies_beyond_the_last_key(head_dim, keys):
    for _ in range(3):
        made = tensors(2, 9, keys, head_dim=head_dim)
        leave_nan_in_freed_memory()
        assert_right(*made)


@COMPILED
@pytest.mark.parametrize("softcap", [1e-300, 1e-45, 1e-6, 1e6, 3e38, 1e39, 1e308])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_softcap_is_right(softcap, dtype):
    assert_right(*tensors(1, 9, 8, dtype=dtype), softcap=softcap)


@COMPILED
def test_everything_together_is_right_at_several_lengths_with_one_compilation():
    before = graphs()
    for queries, keys in ((140, 150), (170, 233), (190, 250)):
        mask = torch.randn(2, 1, queries, keys).masked_fill(torch.rand(2, 1, queries, 1) > 0.7, -torch.inf)
        assert_right(*tensors(2, queries, keys), attn_mask=mask, causal=True, window_size=(60, 0), softcap=3.0)
    assert graphs() - before <= 1


@COMPILED
def test_padding_hides_keys_and_a_row_that_sees_nothing_is_zero():
    query, key, value = tensors(2, 140, 150)
    mask = padding(2, 150)
    assert_right(query, key, value, attn_mask=mask)
    assert not flex.forward(query, key, value, scale=SCALE, attn_mask=mask)[0].any()


@COMPILED
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_packed_sequences_see_themselves(causal):
    assert_right(*tensors(1, 180, 190), attn_mask=packed(180, 190), causal=causal)


@COMPILED
@pytest.mark.slow
@pytest.mark.parametrize("given", [(1, 1, 1, 1), (0, 1, 1, 0), (1, 0, 1, 0), (0, 0, 0, 0), (1, 1, 0, 1), (1, 1, 0, 0)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast(given, kind):
    shape = [1 if once else size for once, size in zip(given, (2, 4, 140, 150), strict=True)]
    mask = torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape)
    assert_right(*tensors(2, 140, 150), attn_mask=mask, window_size=(-1, 30))


@COMPILED
def test_a_decoding_loop_compiles_once_not_once_per_length():
    before = graphs()
    for keys in range(130, 256, 5):
        assert_right(*tensors(1, 1, keys), causal=True)
    assert graphs() - before == 1


def test_one_code_is_for_all_batches_and_marks_no_tensor_of_the_caller(quick):
    before = graphs()
    for batch in (2, 3, 5, 3, 2):  # those that come again are not marked
        made = tensors(batch, 10 * batch, 40 * batch)
        assert_right(*made)
        assert not any(hasattr(tensor, "_dynamo_weak_dynamic_indices") for tensor in made)
    assert graphs() - before == 1


def test_a_long_decoding_loop_compiles_a_few_times(quick):
    before = graphs()
    for keys in range(90, 900, 20):
        assert_right(*tensors(1, 1, keys), causal=True)
    assert 0 < graphs() - before <= 5  # up to one block of keys 2, beyond it 3


@pytest.mark.parametrize("change", ["slices of one", "expanded", "transposed", "last stride 2", "one tensor"])
def test_any_strides_are_right_and_inputs_untouched(change, quick):
    query, key, value = tensors(2, 30, 30, 4, 4, 16)
    if change == "slices of one":
        query, key, value = torch.randn(2, 30, 3, 4, 16).unbind(2)
    elif change == "expanded":
        key = torch.randn(2, 1, 1, 16).expand(2, 30, 4, 16)
    elif change == "transposed":
        query, value = (torch.randn(2, 4, 30, 16).transpose(1, 2) for _ in range(2))
    elif change == "last stride 2":
        query = torch.randn(2, 30, 4, 32)[..., ::2]
    else:
        key = value = query
    copies = [tensor.clone() for tensor in (query, key, value)]
    assert_right(query, key, value, causal=True)
    assert all(torch.equal(one, other) for one, other in zip(copies, (query, key, value), strict=True))


def test_requires_grad_without_grad_mode_is_admitted(quick):
    with torch.no_grad():
        assert_right(*tensors(1, 30, 30, grad=True))


# --- inside a user's compiled code --------------------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("inference", [False, True])
def test_the_first_call_of_a_kind_may_be_a_compiled_one(inference):
    """flex is then compiled inside an operator, for one length and later for others."""
    heads = 7 if inference else 5  # a kind that no other test has compiled before

    def model(query, key, value):
        return flex.forward(query, key, value, scale=SCALE)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode(inference):
        for length in (33, 70, 130, 40):
            query, key, value = tensors(2, length, length, heads=heads, key_heads=heads)
            expected, _ = reference(query, key, value, scale=SCALE)
            torch.testing.assert_close(compiled(query, key, value).double(), expected, rtol=0, atol=1e-5)


@COMPILED
def test_what_was_compiled_may_be_forgotten():
    """Code compiled anew inside a user's dynamic=True would take every size for a variable, and not compile on a CPU."""
    query, key, value = tensors(2, 130, 130, heads=3, key_heads=3)
    mask = torch.rand(2, 1, 130, 130) < 0.5

    def model(query, key, value):
        return flex.forward(query, key, value, scale=SCALE, attn_mask=mask, window_size=(-1, 2), softcap=2.0)

    expected, _ = reference(query, key, value, scale=SCALE, attn_mask=mask, window_size=(-1, 2), softcap=2.0)
    with torch.no_grad():
        model(query, key, value)
        torch.compiler.reset()
        found = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")(query, key, value)
    assert wrong_by(found, expected) < ROUNDING[torch.float32]


@COMPILED
@pytest.mark.parametrize("length", [16, 33])
@pytest.mark.parametrize("name", ["query", "key"])
def test_nan_is_not_hidden(name, length):
    """torch's code for CPU passes over it where it looks for the largest score."""
    given = dict(zip(("query", "key", "value"), tensors(1, length, length, heads=2, key_heads=2), strict=True))
    given[name][0, 3, 1, 2] = torch.nan
    expected, _ = reference(**given, scale=SCALE, causal=True)
    assert torch.equal(flex.forward(**given, scale=SCALE, causal=True).isnan(), expected.isnan())


@COMPILED
@pytest.mark.parametrize(
    ("dynamic", "kind"),
    [
        (True, "key_padding"),
        pytest.param(True, "none", marks=pytest.mark.slow),
        pytest.param(True, "packed", marks=pytest.mark.slow),
        pytest.param(False, "none", marks=pytest.mark.slow),
        pytest.param(False, "key_padding", marks=pytest.mark.slow),
        pytest.param(False, "packed", marks=pytest.mark.slow),
    ],
)
def test_composes_with_the_code_around_it_under_torch_compile(dynamic, kind):
    """The CPU kernel itself can't: "Unsupported for `epilogue_nodes`"."""

    def model(query, key, value, *mask):
        attn_mask = {"none": lambda: None, "key_padding": lambda: KeyPadding(*mask), "packed": lambda: Packed(*mask)}[
            kind
        ]()
        return flex.forward(query * 2, key, value, scale=SCALE, causal=True, attn_mask=attn_mask) * 2

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for length in (40, 50, 60):
        batch = 1 if kind == "packed" else 2
        query, key, value = tensors(batch, length, length)
        described, mask = None, ()
        if kind == "key_padding":
            described = padding(batch, length)
            mask = (described.keep,)
        elif kind == "packed":
            described = packed(length, length)
            mask = (described.cu_seqlens_q, described.cu_seqlens_k)
        wanted, _ = reference(query * 2, key, value, scale=SCALE, causal=True, attn_mask=described)
        assert wrong_by(compiled(query, key, value, *mask), wanted * 2) < ROUNDING[torch.float32]


# --- never eager --------------------------------------------------------------------------------------------------------


def test_reaching_the_recompile_limit_is_an_error_that_says_what_to_do(quick):
    made = tensors(1, 20, 20)
    with torch._dynamo.config.patch(recompile_limit=1):
        assert_right(*made)
        torch.set_default_dtype(torch.bfloat16)  # what is compiled is for one default
        try:
            with pytest.raises(BackendNotUsable, match=r"flex: .*compiled 1 times.*recompile_limit.*native"):
                flex.forward(*made, scale=SCALE)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_right(*made)


def test_is_refused_where_torch_compile_is_switched_off(quick):
    with torch._dynamo.config.patch(disable=True), pytest.raises(BackendNotUsable, match="switched off"):
        flex.forward(*tensors(1, 23, 23), scale=SCALE)


def test_is_refused_with_advice_without_a_c_compiler():
    missing = {"cpp.cxx": ("a-compiler-that-is-not-there",), "force_disable_caches": True}
    with torch._inductor.config.patch(missing), pytest.raises(BackendNotUsable, match=r"no C\+\+ compiler.*g\+\+"):
        flex.forward(*tensors(3, 24, 24, 5, 5, 8), scale=SCALE)


def test_forms_share_no_limit(quick):
    with torch._dynamo.config.patch(recompile_limit=1):
        for head_dim in (4, 8, 12):
            assert_right(*tensors(2, 20, 20, head_dim=head_dim))
            assert_right(*tensors(2, 20, 20, head_dim=head_dim), causal=True)


def test_threads_that_call_at_once_are_all_right_and_compile_once(quick):
    threads = 12
    before, together = graphs(), Barrier(threads)

    def call(number):
        generator = torch.Generator().manual_seed(number)
        query = torch.randn(2, 25, 2, 16, generator=generator)
        together.wait()
        found = flex.forward(query, query, query, scale=SCALE, causal=True)
        return wrong_by(found, reference(query, query, query, scale=SCALE, causal=True)[0])

    with ThreadPoolExecutor(threads) as pool:
        assert max(pool.map(call, range(threads))) < ROUNDING[torch.float32]
    assert graphs() - before == 1


# --- the GPU's path, by eager kernels on CPU ----------------------------------------------------------------------------


@pytest.fixture
def with_graph(quick, monkeypatch):
    """flex as on a GPU: lse and gradients, which torch has for its eager flex_attention on any device."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)

    def forward(
        query, key, value, *, scale, attn_mask=None, causal=False, window_size=None, softcap=None, return_lse=True
    ):
        left, right = window_size or (-1, -1)
        right = 0 if causal else right
        return flex_compiled.eager(query, key, value, attn_mask, scale, left, right, softcap, lse=return_lse)

    monkeypatch.setattr(flex, "forward", forward)


def test_what_torch_gets_wrong_on_a_gpu_is_refused():
    gpu = {"platform": "cuda", "compute_capability": (9, 0), "backward": True}
    floats = {"mask": "float", "mask_dtype": "float32"}
    assert not FLEX.reasons(Facts(**gpu, **floats))
    assert "shared memory" in str(FLEX.reasons(Facts(**gpu, **floats, mask_gradient=True)))
    assert not FLEX.reasons(Facts(**gpu, head_dim=192, value_head_dim=128, dtype="bfloat16"))
    assert "head dim above 128" in str(FLEX.reasons(Facts(**gpu, head_dim=192, value_head_dim=128)))
    assert not FLEX.reasons(Facts(**gpu, mask="packed"))
    assert "described mask" in str(FLEX.reasons(Facts(**gpu, mask="packed", compiled=True)))
    assert not FLEX.reasons(Facts(**gpu, **floats, compiled=True, deterministic=True))


GRADIENT_CASES = {
    "plain": lambda: ((2, 20, 20), {}),
    "causal, more queries": lambda: ((2, 200, 150, 4, 2, 16, 24), {"causal": True}),
    "window and padding": lambda: ((2, 150, 200), {"window_size": (20, 10), "attn_mask": padding(2, 200)}),
    "bool": lambda: ((2, 150, 200), {"attn_mask": torch.rand(2, 1, 150, 200) > 0.5}),
    "packed": lambda: ((1, 180, 190), {"causal": True, "attn_mask": packed(180, 190)}),
    "float": lambda: ((2, 150, 140), {"attn_mask": torch.randn(1, 4, 150, 140), "softcap": 2.0}),
    "float by key": lambda: ((2, 30, 40), {"attn_mask": torch.randn(1, 1, 1, 40)}),
    "float with rows of -inf": lambda: (
        (2, 30, 40),
        {"attn_mask": torch.randn(2, 1, 30, 40).masked_fill(torch.rand(2, 1, 30, 1) > 0.5, -torch.inf)},
    ),
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_lse_and_gradients_of_its_graph_are_right(case, with_graph):
    sizes, options = GRADIENT_CASES[case]()
    inputs = tensors(*sizes, grad=True)
    wanted, wanted_lse = reference(*inputs, scale=SCALE, **options)
    found, lse = flex.forward(*inputs, scale=SCALE, **options)
    assert wrong_by(found.detach(), wanted.detach()) < ROUNDING[torch.float32]
    torch.testing.assert_close(lse.detach().double(), wanted_lse, atol=1e-5, rtol=1e-5)
    grad_out = torch.randn_like(found)
    for gradient, right in zip(
        torch.autograd.grad(found, inputs, grad_out),
        torch.autograd.grad(wanted, inputs, grad_out.double()),
        strict=True,
    ):
        assert wrong_by(gradient, right.double()) < ROUNDING[torch.float32]


def test_backward_of_parts_of_the_keys_adds_up_to_the_whole(with_graph):
    query, key, value = tensors(2, 60, 90, grad=True)
    out, lse = reference(query, key, value, scale=SCALE, softcap=3.0)
    grad_out = torch.randn(2, 60, 4, 32)
    wanted = torch.autograd.grad(out, (query, key, value), grad_out.double())
    query, key, value = (tensor.detach() for tensor in (query, key, value))
    out, lse = out.detach().float(), lse.float()
    parts = [
        flex.backward(grad_out, query, key[:, keys], value[:, keys], out, lse, scale=SCALE, softcap=3.0)
        for keys in (slice(0, 30), slice(30, 90))
    ]
    (dq, dk, dv), (more_dq, *more) = parts
    found = (dq + more_dq, *(torch.cat(pair, 1) for pair in zip((dk, dv), more, strict=True)))
    assert all(
        wrong_by(one, other.double()) < ROUNDING[torch.float32] for one, other in zip(found, wanted, strict=True)
    )


def test_backward_of_what_sees_nothing_is_zero(with_graph):
    query, key, value = tensors(2, 30, 40)
    nothing = KeyPadding(torch.zeros(2, 40, dtype=torch.bool))
    lse = torch.full((2, 4, 30), -torch.inf)
    gradients = flex.backward(
        torch.randn_like(query), query, key, value, query * 0, lse, scale=SCALE, attn_mask=nothing
    )
    assert not any(gradient.any() for gradient in gradients)


def test_the_rows_of_a_block_mask_are_contiguous_both_ways():
    """The kernels for a GPU read them so; a transposed order gave wrong gradients of the keys there."""
    visible = flex_blocks.diagonal(300, 700, -flex_blocks.NO_LIMIT, 400, torch.device("cpu"))
    assert all(tensor.is_contiguous() for tensor in flex_blocks.blocks(visible))


@pytest.mark.parametrize("changed", ["query", "key", "value", "attn_mask", None])
@pytest.mark.parametrize("described", [False, True])
def test_a_backward_is_refused_where_what_it_reads_was_changed(changed, described):
    inputs = {name: torch.randn(1, 4, 2, 8) for name in ("query", "key", "value")}
    keep = torch.rand(1, 4) > 0.3
    mask = KeyPadding(keep) if described else keep[:, None, None, :]
    out = torch.ones(1, 4, 2, 8, requires_grad=True) * 2.0
    flex._refuse_changes(out, *inputs.values(), mask)
    if changed is None:
        out.sum().backward()
        return
    {**inputs, "attn_mask": keep}[changed].zero_()
    with pytest.raises(RuntimeError, match=f"{changed} was changed in place"):
        out.sum().backward()
