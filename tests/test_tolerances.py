"""Tolerances and drawn calls: an honest kernel passes at every dtype, and each planted defect is found."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import pytest
import torch

from attn_core.errors import AttnError
from attn_core.masks import visible_mask
from attn_core.reading import cast, read
from attn_core.running import empty_result
from attn_core.testing import Case, assert_close, bounds, compare, draw, reference, tolerance
from attn_core.testing.spoiling import SPOIL

DEFAULTS = {
    "attn_mask": None, "causal": False, "scale": None, "window_size": None, "softcap": None, "dropout_p": 0.0,
    "deterministic": False, "return_lse": False, "parallel": None,
}  # fmt: skip


def rounded(tensor, dtype):
    """Rounded in the forward and, the gradient, in the backward, as half-precision kernels do before each product."""
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: gradient.to(dtype).to(gradient.dtype))
    return tensor.to(dtype).to(tensor.dtype)


def kernel(query, key, value, *, lie=None, **options):
    """Attention in plain torch as an honest kernel has it, or with one planted defect."""
    call = read(query, key, value, {**DEFAULTS, **options})
    options = dict(call.options)
    if call.autocast is not None:
        query, key, value = (cast(tensor, call.autocast) for tensor in (query, key, value))
        options["attn_mask"] = cast(options.get("attn_mask"), call.autocast)
    if call.empty:
        return empty_result(query, key, value, **options)
    with torch.autocast(query.device.type, enabled=False):
        out, lse = computed(query, key, value, lie, **options)
    return (out, lse) if options.get("return_lse") else out


def computed(
    query, key, value, lie, *, scale, attn_mask=None, causal=False, window_size=None, softcap=None,
    deterministic=False, return_lse=False,
):  # fmt: skip
    dtype = query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    group = query.shape[2] // key.shape[2]
    if lie == "an input scaled in place":
        query.detach().mul_(1.5)
    keys, values = (tensor.to(wide).repeat_interleave(group, 2) for tensor in (key, value))
    if lie == "heads interleaved":
        keys = key.to(wide).repeat(1, 1, group, 1)
    if lie == "scale dropped":
        scale = query.shape[-1] ** -0.5
    scores = torch.einsum("bihd,bjhd->bhij", query.to(wide), keys) * scale
    if softcap is not None and lie != "softcap dropped":
        scores = softcap * (scores / softcap).tanh()
    if lie == "window off by one on the left" and window_size and window_size[0] >= 0:
        window_size = (window_size[0] + 1, window_size[1])
    if lie == "window off by one on the right" and window_size and window_size[1] >= 1:
        window_size = (window_size[0], window_size[1] - 1)
    if lie == "causal top-left" and causal:
        causal, window_size = False, (-1, max(query.shape[1] - key.shape[1], 0))
    visible = visible_mask(query, key, attn_mask=attn_mask, causal=causal, window_size=window_size)
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype != torch.bool and lie != "float mask dropped":
        scores = scores + (attn_mask.detach() if lie == "gradient of the mask lost" else attn_mask).to(wide)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    if lie != "NaN for a query that sees nothing":
        scores = scores.masked_fill(nothing, 0)
    weights = scores.softmax(-1).masked_fill(nothing, 0)
    out = torch.einsum("bhij,bjhd->bihd", rounded(weights, dtype), values).to(dtype)
    if lie == "three eps too much":
        out = out * (1 + 3 * torch.finfo(dtype).eps)
    if lie == "graph lost":
        out = out.detach()
    lse = scores.detach().logsumexp(-1).masked_fill(nothing[..., 0], -torch.inf)
    if lie == "lse in base two":
        lse = lse * 1.4426950408889634
    if lie == "the result is an input" and out.shape == query.shape:
        query.detach().copy_(out.detach())
        out = query.detach() + 0 if out.requires_grad else query
    return out, lse


LIES = (
    "an input scaled in place", "heads interleaved", "scale dropped", "softcap dropped", "window off by one on the left",
    "window off by one on the right", "causal top-left", "float mask dropped", "gradient of the mask lost",
    "NaN for a query that sees nothing", "graph lost", "lse in base two", "the result is an input",
)  # fmt: skip


def outcomes(calls, lie=None, limits=None, *, enough=None):
    """Count what became of drawn calls, until ``enough`` were caught."""
    chooser, found = random.Random(3), Counter()
    for _ in range(calls):
        if found["caught"] == enough:
            break
        case = draw(chooser.choice, limits)
        try:
            refusal = compare(case, partial(kernel, lie=lie))
        except (AssertionError, RuntimeError):
            found["caught"] += 1
            if lie is None:
                raise
        else:
            found["right" if refusal is None else "refused"] += 1
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_an_honest_kernel_passes(dtype):
    found = outcomes(150, limits={"dtype": [dtype]})
    assert found["right"] > 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught_at_every_dtype(lie, dtype):
    assert outcomes(400, lie, {"dtype": [dtype], "spoiled": [None], "autocast": [None]}, enough=2)["caught"] == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_bounds_leave_no_room_for_a_few_eps(dtype):
    limits = {"dtype": [dtype], "spoiled": [None], "autocast": [None], "queries": [1, 2, 4], "keys": [1]}
    assert outcomes(60, "three eps too much", limits, enough=5)["caught"] == 5


@pytest.mark.parametrize("spoiled", SPOIL)
def test_every_senseless_call_is_refused_by_the_core(spoiled):
    chooser = random.Random(5)
    for _ in range(5):
        refusal = compare(draw(chooser.choice, {"spoiled": [spoiled]}), kernel)
        assert isinstance(refusal, AttnError)


def test_an_admitted_senseless_call_is_a_failure():
    def careless(query, key, value, **options):
        return query.clone()

    with pytest.raises(AssertionError, match="admitted"):
        compare(Case(spoiled="scale is NaN"), careless)


def test_bounds_grow_with_the_length_and_stay_far_below_one_key():
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 4096, 1, 16)
    allowed = bounds(query, key, key, grad_out=query)
    short = bounds(query, key[:, :16], key[:, :16])
    assert allowed.out.max() < 1e-3
    assert short.out.max() < 1e-4
    assert tolerance(torch.float32, 16) < tolerance(torch.float32, 4096) < 1e-3


def test_bounds_of_what_is_hidden_are_nothing():
    query = torch.randn(1, 4, 1, 8, dtype=torch.bfloat16)
    allowed = bounds(query, query, query, grad_out=query, causal=True, window_size=(-1, -1))
    assert allowed.out.shape == query.shape
    hidden = bounds(query, query, query, grad_out=query, attn_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    assert max(float(bound.max()) for bound in (hidden.out, hidden.query, hidden.key, hidden.value)) < 1e-30


def test_assert_close_names_the_worst_element():
    expected = torch.zeros(2, 3, dtype=torch.float64)
    found = expected.float().index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.0))
    with pytest.raises(
        AssertionError, match=r"out \(torch.float32\): 1 of 6 elements .* \(1, 2\): found 1, expected 0"
    ):
        assert_close(found, expected, torch.float32, "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_assert_close_wants_nan_and_infinities_where_they_are(bad):
    numbers = torch.tensor([1.0, bad])
    assert_close(numbers, numbers.double(), torch.float32, "lse")
    for found, expected in ((torch.ones(2), numbers), (numbers, torch.ones(2))):
        with pytest.raises(AssertionError, match="1 of 2"):
            assert_close(found, expected.double(), torch.float32, "lse")
    with pytest.raises(AssertionError, match="shape"):
        assert_close(numbers[:1], numbers, torch.float32, "lse")


def test_a_case_prints_as_the_code_that_makes_it():
    chooser = random.Random(7)
    for _ in range(50):
        case = draw(chooser.choice)
        assert eval(repr(case), {"Case": Case}) == case


def test_a_case_makes_the_same_call_each_time_and_leaves_the_random_state_alone():
    case = Case(
        mask="float", dtype="bfloat16", gradients=("query", "attn_mask"), layouts=("sliced", "transposed", "offset")
    )
    state = torch.get_rng_state()
    first, second = case.build(), case.build()
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.inputs().items():
        assert torch.equal(tensor, second.inputs()[name])
        assert tensor.requires_grad == (name in case.gradients)
    assert not first.query.is_contiguous()
    assert torch.equal(
        reference(first.query, first.key, first.value)[0], reference(first.query, first.key, first.value)[0]
    )
