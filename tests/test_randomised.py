"""Every native backend against the float64 reference, over all options together: right within tolerance, or refused.

A failure prints the smallest ``Case`` that shows it; to look at it again:

    from functools import partial
    from attn_core import attention
    from attn_core.testing import Case, compare
    compare(Case(...), partial(attention, backend="native"))
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_core import AttnError, attention
from attn_core.requirements import library_reason
from attn_core.testing import assert_close, bounds, compare, draw, reference
from attn_native.specs.flex import FLEX

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]

BACKENDS = {  # of the calls that make sense, how many at least are admitted, by device
    "native": {"cpu": 0.4, "cuda": 0.4},
    "native_math": {"cpu": 0.95, "cuda": 0.95},
    "native_flash": {"cpu": 0.1, "cuda": 0.02},
    "native_efficient": {"cpu": 0.0, "cuda": 0.05},
    "native_cudnn": {"cpu": 0.0, "cuda": 0.01},
    "flex": {"cpu": 0.9 if library_reason(FLEX.alternatives[0].library) is None else 0.0, "cuda": 0.5},
}
PLAIN_SHARES = {"native": 0.95, "native_flash": 0.1, "native_efficient": 0.1, "native_cudnn": 0.05}
"""The same for calls drawn from ``PLAIN``; on a CPU nothing reaches the kernels that are CUDA's alone."""

PLAIN = {
    "spoiled": [None], "autocast": [None], "amplitude": [1.0], "deterministic": [False], "scale": [None, 0.3],
    "softcap": [None], "value_dim": [None], "mask": ["none", "none", "float", "key_padding", "packed"],
}  # fmt: skip
"""Fewer unusual options at once, so that the kernels that can do little are tried more often."""

MANY = {
    "native": 4000, "native_math": 4000, "native_flash": 3000, "native_efficient": 500, "native_cudnn": 500, "flex": 60,
}  # fmt: skip
"""How many calls the slow run draws on a CPU."""

FLEX_FORMS = {
    "dtype": ["float32"], "heads": [(4, 2)], "dim": [16], "value_dim": [None], "return_lse": [False], "gradients": [()],
    "mask": ["none", "key_padding"], "softcap": [None, 2.0], "window_size": [None], "scale": [None], "autocast": [None],
    "deterministic": [False], "queries": [4, 17, 130], "keys": [None, 33], "batch": [2], "layouts": ["contiguous", "sliced"],
}  # fmt: skip
"""What is given to flex, which compiles each form of call for seconds."""

PLAINEST = {"keys": [None], "layouts": ["contiguous"], "mode": ["grad"], "amplitude": [1.0]}

FLEX_LIMITS = {
    ("cpu", True): {**FLEX_FORMS, "mask": ["key_padding"], "causal": [True], "softcap": [None], "queries": [17], **PLAINEST},
    ("cpu", False): FLEX_FORMS,
    ("cuda", True): {**FLEX_FORMS, "gradients": [(), ("query", "key", "value")], "return_lse": [True], "softcap": [2.0]},
    ("cuda", False): {
        **FLEX_FORMS, "dtype": ["float32", "bfloat16"], "mask": ["none", "bool", "float", "key_padding", "packed"],
        "gradients": [(), ("query", "key", "value")], "return_lse": [False, True], "window_size": [None, (3, 1)],
    },
}  # fmt: skip
"""The forms for flex by device and whether the run is the ordinary one."""


def cases(limits=None, device="cpu"):
    return st.composite(lambda choose: draw(lambda values: choose(st.sampled_from(values)), limits, device=device))()


def run(strategy, backend, calls, *, ordinary):
    """Hold the drawn calls to the reference, and count what became of them."""
    outcome = Counter()
    call = partial(attention, backend=backend)

    def holds(case):
        refusal = compare(case, call)
        outcome["spoiled" if case.spoiled else "right" if refusal is None else "refused"] += 1

    check = given(strategy)(holds)
    settings(
        max_examples=calls, derandomize=ordinary, print_blob=not ordinary, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )(check)()  # fmt: skip
    share = outcome["right"] / max(outcome["right"] + outcome["refused"], 1)
    print(f"{backend}: {dict(outcome)}, {share:.0%} of what makes sense is admitted")
    return share


def limits_of(backend, device, *, ordinary):
    return FLEX_LIMITS[device, ordinary] if backend == "flex" else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_drawn_call_is_right_or_refused(backend, device):
    limits = limits_of(backend, device, ordinary=True)
    share = run(cases(limits, device), backend, 25 if backend == "flex" else 100, ordinary=True)
    assert share >= BACKENDS[backend][device]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", PLAIN_SHARES)
def test_a_drawn_call_with_few_options_is_right_or_refused(backend, device):
    share = run(cases(PLAIN, device), backend, 100, ordinary=True)
    assert share >= (PLAIN_SHARES[backend] if BACKENDS[backend][device] else 0)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("backend", "calls"), MANY.items())
def test_ten_thousand_drawn_calls_are_right_or_refused(backend, calls, device):
    calls = 3000 if device == "cuda" and backend != "flex" else calls
    share = run(cases(limits_of(backend, device, ordinary=False), device), backend, calls, ordinary=False)
    assert share >= BACKENDS[backend][device]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", PLAIN_SHARES)
def test_thousands_of_drawn_calls_with_few_options_are_right_or_refused(backend, device):
    share = run(cases(PLAIN, device), backend, 2000, ordinary=False)
    assert share >= (PLAIN_SHARES[backend] if BACKENDS[backend][device] else 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "flex"])
def test_one_tensor_may_be_query_key_and_value(backend, dtype, return_lse, device):
    tensor = torch.randn(2, 9, 2, 16, device=device).to(getattr(torch, dtype)).requires_grad_()
    before = tensor.detach().clone()
    try:
        result = attention(tensor, tensor, tensor, causal=True, return_lse=return_lse, backend=backend)
    except AttnError:
        assert backend in ("native_flash", "native_efficient", "native_cudnn")
        return
    out = result[0] if return_lse else result
    grad_out = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, [tensor], grad_out)
    leaf = tensor.detach().double().requires_grad_()
    expected, _ = reference(leaf, leaf, leaf, causal=True)
    (exact,) = torch.autograd.grad(expected, [leaf], grad_out.double())
    allowed = bounds(leaf, leaf, leaf, grad_out=grad_out, dtype=tensor.dtype, causal=True)
    assert_close(out, expected, tensor.dtype, "result", bound=allowed.out)
    allowance = allowed.query + allowed.key + allowed.value
    assert_close(gradient, exact, tensor.dtype, "gradient", bound=allowance)
    assert torch.equal(tensor, before)


# --- NaN and inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "flex"])
def test_what_a_query_sees_is_never_hidden(backend, device):
    limits = {
        **PLAIN, "mask": ["none", "bool", "float", "key_padding", "packed"], "mode": ["grad"], "gradients": [()],
        "return_lse": [False], "batch": [1, 2], "queries": [1, 3, 8, 17], "keys": [None, 1, 5, 33], "layouts": ["contiguous"],
    }  # fmt: skip

    @settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        cases(limits, device),
        st.sampled_from(["value", "key", "query"]),
        st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    )
    def passes_through(case, name, bad):
        built = case.build()
        tensors = {"query": built.query, "key": built.key, "value": built.value}
        bad = bad if name == "value" else torch.nan  # an infinite key or query can honestly have a weight of zero
        row = tensors[name].shape[1] // 2
        tensors[name][0, row, 0, 0] = bad
        try:
            out = attention(**tensors, **built.options, backend=backend)
        except AttnError:
            return
        sees = visible_keys(built)[0]
        group = case.heads[0] // case.heads[1]
        if name == "query":
            hit = out[0, row, :1][sees[:1, row].any(-1)]
        elif name == "key":
            hit = out[0, :, :group][sees[:group, :, row].T]
        else:
            hit = out[0, :, :group, 0][sees[:group, :, row].T]
        assert not bool(hit.isfinite().any())

    passes_through()


def visible_keys(built):
    """bool (B, Hq, Sq, Skv): scores are all equal, so that the probability of what is seen is far from 0."""
    keys = built.key.shape[1]
    unit = torch.eye(keys, device=built.key.device)[None, :, None].expand(
        built.key.shape[0], -1, built.key.shape[2], -1
    )
    options = {name: option for name, option in built.options.items() if name != "deterministic"}
    out, _ = reference(built.query * 0, built.key * 0, unit, **{**options, "scale": 0})
    return out.transpose(1, 2) > 0


# --- dropout ----------------------------------------------------------------------------------------------------------

DROPPED = {
    "spoiled": [None], "autocast": [None], "dim": [16], "value_dim": [None], "deterministic": [False], "amplitude": [1.0],
    "batch": [1, 2], "queries": [16, 5, 33, 1], "keys": [16], "gradients": [("query", "key", "value"), ("query",)],
    "mode": ["grad"],
}  # fmt: skip
DROPS = {"native": 10, "native_math": 30, "native_flash": 0, "native_efficient": 0, "native_cudnn": 0}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", DROPS)
def test_dropout_scales_what_it_keeps_and_its_backward_uses_the_same_draw(backend, device):
    """With the unit vectors for values (as many keys as dimensions), the result is the dropped probabilities themselves."""
    outcome = Counter()

    @settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(DROPPED, device), st.sampled_from([0.25, 0.5, 0.9]))
    def holds(case, dropout_p):
        built = case.build()
        with torch.no_grad():
            built.value.copy_(torch.eye(16)[None, :, None].expand(built.value.shape)) if is_dense(built.value) else None
        if not is_dense(built.value):
            return
        try:
            result = attention(
                built.query, built.key, built.value, **built.options, dropout_p=dropout_p, backend=backend
            )
        except AttnError:
            outcome["refused"] += 1
            return
        outcome["right"] += 1
        check_dropout(case, built, dropout_p, result, outcome)

    holds()
    print(backend, dict(outcome))
    if device == "cpu":
        assert outcome["right"] >= DROPS[backend]
    assert abs(outcome["kept"] - outcome["expected"]) <= 6 * outcome["variance"] ** 0.5


def is_dense(tensor):
    return all(stride > 0 or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def check_dropout(case, built, dropout_p, result, outcome):
    dtype = built.query.dtype
    out, lse = result if case.return_lse else (result, None)
    options = {name: option for name, option in built.options.items() if name != "return_lse"}
    leaves = [tensor.detach().double().requires_grad_() for tensor in (built.query, built.key, built.value)]
    plain, plain_lse = reference(*leaves, **options)
    found = out.detach().double().transpose(1, 2)
    kept = found != 0
    sure = plain.transpose(1, 2) > 1e-3  # far enough from underflow for "not 0" to mean "kept"
    outcome["kept"] += int(kept[sure].sum())
    outcome["expected"] += int(sure.sum()) * (1 - dropout_p)
    outcome["variance"] += int(sure.sum()) * dropout_p * (1 - dropout_p)
    expected, _ = reference(*leaves, **options, dropout_p=dropout_p, kept=kept)
    allowed = bounds(*leaves, grad_out=built.grad_out, dtype=dtype, **options, dropout_p=dropout_p, kept=kept)
    assert_close(out, expected, dtype, "result", bound=allowed.out)
    if lse is not None:
        assert_close(lse, plain_lse, dtype, "lse", bound=allowed.lse)
    wanted = dict(zip(("query", "key", "value"), leaves, strict=True))
    for name in case.gradients:
        given_tensor = getattr(built, name)
        (gradient,) = torch.autograd.grad(out, [given_tensor], built.grad_out, retain_graph=True)
        (exact,) = torch.autograd.grad(expected, [wanted[name]], built.grad_out.double(), retain_graph=True)
        assert_close(gradient, exact, dtype, f"gradient of {name}", bound=getattr(allowed, name))


@pytest.mark.parametrize("backend", ["native", "native_math"])
def test_dropout_keeps_the_mean_and_each_call_draws_anew(backend):
    torch.manual_seed(11)
    query, key, value = (torch.randn(1, 8, 2, 16) for _ in range(3))
    call = partial(attention, query, key, value, dropout_p=0.4, backend=backend)
    draws = torch.stack([call() for _ in range(2000)]).double()
    assert not torch.equal(draws[0], draws[1])
    expected, _ = reference(query, key, value)
    deviation = draws.std(0) / 2000**0.5
    assert bool(((draws.mean(0) - expected).abs() < 6 * deviation + 1e-6).all())
    torch.manual_seed(12)
    first = call()
    torch.manual_seed(12)
    assert torch.equal(first, call())
