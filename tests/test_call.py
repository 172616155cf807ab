"""What a call accepts, what it refuses, and what it hands to the kernel."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_core import (
    AttnError,
    BackendNotUsable,
    CallRefused,
    KeyPadding,
    Packed,
    attention,
    call,
    explain,
    loading,
    plan,
    registry,
    running,
    set_backend,
)
from attn_core.explanation import explain_facts

pytestmark = pytest.mark.usefixtures("stubs")

Q = torch.randn(2, 6, 4, 8)
KV = torch.randn(2, 9, 2, 8)


def options_seen(**options):
    """The options that reach a kernel which admits everything."""
    import stub_kernels

    stub_kernels.calls.clear()
    attention(Q, Q, Q, backend="spy", **options)
    assert len(stub_kernels.calls) == 1
    return stub_kernels.calls[0]


SCALE = 1 / 8**0.5


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, {"scale": SCALE}),
        ({"scale": 0}, {"scale": 0.0}),
        ({"scale": np.float32(0.5)}, {"scale": 0.5}),
        ({"scale": -2}, {"scale": -2.0}),
        ({"causal": True}, {"scale": SCALE, "causal": True}),
        ({"causal": 1}, {"scale": SCALE, "causal": True}),
        ({"causal": np.bool_(True)}, {"scale": SCALE, "causal": True}),
        ({"causal": 0}, {"scale": SCALE}),
        ({"window_size": (2, -1)}, {"scale": SCALE, "window_size": (2, -1)}),
        ({"window_size": [np.int64(2), 3.0]}, {"scale": SCALE, "window_size": (2, 3)}),
        ({"window_size": (-1, -1)}, {"scale": SCALE}),
        ({"window_size": (2, 5), "causal": True}, {"scale": SCALE, "causal": True, "window_size": (2, 0)}),
        ({"window_size": (-1, 5), "causal": True}, {"scale": SCALE, "causal": True}),
        ({"softcap": 30}, {"scale": SCALE, "softcap": 30.0}),
        ({"dropout_p": 0}, {"scale": SCALE}),
        ({"dropout_p": np.float64(0.25)}, {"scale": SCALE, "dropout_p": 0.25}),
        ({"deterministic": True}, {"scale": SCALE, "deterministic": True}),
    ],
)
def test_options_arrive_as_python_values_the_first_time_and_the_second(given, seen, again):
    for _ in range(again):
        found = options_seen(**given)
    assert found == seen
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in seen.items()}


def test_values_that_are_not_remembered_are_those_of_each_call():
    for scale, softcap, dropout in ((0.5, 3.0, 0.1), (0.25, 4.0, 0.2), (1, 5, 0.3)):
        found = options_seen(scale=scale, softcap=softcap, dropout_p=dropout)
        assert (found["scale"], found["softcap"], found["dropout_p"]) == (scale, softcap, dropout)


REFUSED = [
    ({"scale": float("nan")}, "scale: found nan"),
    ({"scale": float("inf")}, "scale: found inf"),
    ({"scale": "1"}, "scale: found '1'"),
    ({"scale": True}, "scale: found True"),
    ({"scale": torch.tensor(1.0)}, "scale: found tensor"),
    ({"causal": 2}, "causal: found 2"),
    ({"causal": None}, "causal: found None"),
    ({"causal": "yes"}, "causal: found 'yes'"),
    ({"causal": torch.ones(2, 2)}, "causal: found a Tensor of shape"),
    ({"window_size": 4}, "window_size: found 4"),
    ({"window_size": (1, 2, 3)}, "window_size: found"),
    ({"window_size": (-2, 0)}, "window_size: found"),
    ({"window_size": (1.5, 0)}, "window_size: found"),
    ({"window_size": (float("nan"), 0)}, "window_size: found"),
    ({"window_size": (None, 1)}, "window_size: found"),
    ({"window_size": (True, 1)}, "window_size: found"),
    ({"softcap": 0}, "softcap: found 0"),
    ({"softcap": -1.0}, "softcap: found -1.0"),
    ({"softcap": float("nan")}, "softcap: found nan"),
    ({"dropout_p": 1.0}, "dropout_p: found 1.0"),
    ({"dropout_p": -0.1}, "dropout_p: found -0.1"),
    ({"dropout_p": float("nan")}, "dropout_p: found nan"),
    ({"dropout_p": None}, "dropout_p: found None"),
    ({"deterministic": "no"}, "deterministic: found 'no'"),
    ({"return_lse": 3}, "return_lse: found 3"),
    ({"parallel": "ring"}, "parallel: found 'ring'"),
    ({"attn_mask": 3}, "attn_mask: found int"),
    ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, r"attn_mask: found shape \(6, 6\)"),
    ({"attn_mask": torch.ones(2, 6, dtype=torch.bool)}, "KeyPadding"),
    ({"attn_mask": torch.ones(2, 4, 6, 5, dtype=torch.bool)}, "attn_mask: found shape"),
    ({"attn_mask": torch.ones(2, 1, 6, 6, dtype=torch.int64)}, "attn_mask: found dtype int64"),
    ({"attn_mask": torch.ones(2, 1, 6, 6, dtype=torch.float16)}, "attn_mask: found dtype float16"),
    ({"attn_mask": torch.ones(2, 1, 6, 6, device="meta")}, "attn_mask: found on meta"),
    ({"attn_mask": KeyPadding(torch.ones(2, 5, dtype=torch.bool))}, "KeyPadding of shape"),
    ({"attn_mask": Packed(torch.tensor([0, 6], dtype=torch.int32))}, "batch of 2"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_with_found_and_accepted(options, message):
    attention(Q, Q, Q, backend="spy")
    with pytest.raises(CallRefused, match=message) as caught:
        attention(Q, Q, Q, backend="spy", **options)
    assert "accepted:" in str(caught.value)
    with pytest.raises(CallRefused, match=message):
        plan(Q, Q, Q, backend="spy", **options)
    assert message.split(":")[0] in str(explain(Q, Q, Q, **options))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((Q[0], Q, Q), "query: found shape"),
        ((Q, Q[..., 0], Q), "key: found shape"),
        ((Q, Q, None), "value: found NoneType"),
        ((Q.numpy(), Q, Q), "query: found ndarray"),
        ((Q.to_sparse(), Q, Q), "query: found a torch.sparse_coo tensor"),
        ((Q.int(), Q.int(), Q.int()), "query: found dtype int32"),
        ((Q, Q.double(), Q), "dtype: query, key and value have float32, float64, float32"),
        ((Q, Q, Q.half()), "dtype: query, key and value have"),
        ((Q, Q[:1], Q[:1]), "batch: found 2, 1 and 1"),
        ((Q, KV, Q), "key length"),
        ((Q, Q[:, :, :3], Q[:, :, :3]), "heads: found 4, 3 and 3"),
        ((Q, Q[:, :, :2], Q[:, :, :1]), "heads: found 4, 2 and 1"),
        ((Q, Q[:, :, :0], Q[:, :, :0]), "heads: found 4, 0 and 0"),
        ((Q, Q[..., :4], Q), "head_dim: found 8, 4 and 8"),
        ((Q[..., :0], Q[..., :0], Q), "head_dim: found 0, 0 and 8"),
        ((Q, Q.to("meta"), Q), "device: query, key and value are on cpu, meta, cpu"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, message):
    attention(Q, Q, Q, backend="spy")
    with pytest.raises(CallRefused, match=message) as caught:
        attention(*tensors, backend="spy")
    assert "accepted:" in str(caught.value)
    assert explain(*tensors).refusal is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": None}, "causal: found None"),
        ({"causal": ((1, 0), True, True, False, False)}, "causal: found"),
        ({"deterministic": None}, "deterministic: found None"),
        ({"return_lse": ""}, "return_lse: found ''"),
        ({"dropout_p": None}, "dropout_p: found None"),
        ({"softcap": False}, "softcap: found False"),
        ({"window_size": False}, "window_size: found False"),
        ({"window_size": (True, 0)}, "window_size: found (True, 0)"),
        ({"window_size": (1, False)}, "window_size: found (1, False)"),
        ({"parallel": False}, "parallel: found False"),
    ],
)
def test_what_is_as_false_as_a_default_is_refused_after_the_default_was_accepted(options, message):
    attention(Q, Q, Q, backend="spy")
    attention(Q, Q, Q, backend="spy", window_size=(1, 0))
    with pytest.raises(CallRefused, match=re.escape(message)):
        attention(Q, Q, Q, backend="spy", **options)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_tensor_elsewhere_is_refused_after_those_on_one_device_were_accepted(place):
    tensors = [Q, Q, Q]
    attention(*tensors, backend="spy")
    tensors[place] = Q.to("meta")
    with pytest.raises(CallRefused, match="device: query, key and value are on"):
        attention(*tensors, backend="spy")


def test_a_mask_elsewhere_is_refused_after_one_on_the_device_of_the_call_was_accepted():
    mask, keep = torch.ones(2, 1, 6, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    for here, elsewhere in ((mask, mask.to("meta")), (KeyPadding(keep), KeyPadding(keep.to("meta")))):
        attention(Q, Q, Q, attn_mask=here, backend="spy")
        with pytest.raises(CallRefused, match="attn_mask: found on meta"):
            attention(Q, Q, Q, attn_mask=elsewhere, backend="spy")


def test_masks_of_other_lengths_are_refused_after_right_ones_were_accepted():
    right = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    attention(Q, Q, Q, attn_mask=right, backend="spy")
    with pytest.raises(CallRefused, match="attn_mask: found shape"):
        attention(Q, Q, Q, attn_mask=right[:, :, :5], backend="spy")
    keep = KeyPadding(torch.ones(2, 6, dtype=torch.bool))
    attention(Q, Q, Q, attn_mask=keep, backend="spy")
    with pytest.raises(CallRefused, match="KeyPadding of shape"):
        attention(Q, Q[:, :5], Q[:, :5], attn_mask=keep, backend="spy")
    packed = Packed(torch.tensor([0, 2, 6], dtype=torch.int32))
    attention(Q[:1], Q[:1], Q[:1], attn_mask=packed, backend="spy")
    with pytest.raises(CallRefused, match="ends with 6"):
        attention(Q[:1, :5], Q[:1], Q[:1], attn_mask=packed, backend="spy")


@pytest.mark.parametrize("offsets", [[1, 3], [0, 3, 2], [0]], ids=["does not begin with 0", "falls", "no sequence"])
def test_offsets_that_make_no_sense_are_refused(offsets):
    with pytest.raises(CallRefused, match="Packed: cu_seqlens_q"):
        Packed(torch.tensor(offsets, dtype=torch.int32))


def test_offsets_without_values_are_refused():
    with pytest.raises(CallRefused, match="Packed: cu_seqlens_q holds values .*; found a tensor on meta"):
        Packed(torch.zeros(3, dtype=torch.int32, device="meta"))


@pytest.mark.parametrize("lse", [False, True])
def test_kernels_of_torch_that_the_user_has_switched_off_are_told(lse):
    for _ in range(2):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(CallRefused, match="outside of torch.nn.attention"):
            attention(Q, Q, Q, return_lse=lse, backend="native")
        attention(Q, Q, Q, return_lse=lse, backend="native")


def test_kernels_of_torch_that_take_no_dropout_are_told_where_no_others_are_left():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(CallRefused, match="outside of torch.nn.attention"):
        attention(Q, Q, Q, dropout_p=0.5, backend="native")


def test_descriptions_refuse_what_they_can_not_mean():
    with pytest.raises(CallRefused, match="KeyPadding"):
        KeyPadding(torch.ones(2, 3))
    with pytest.raises(CallRefused, match="int32"):
        Packed(torch.tensor([0, 3]))
    with pytest.raises(CallRefused, match="max_seqlen_q"):
        Packed(torch.tensor([0, 3], dtype=torch.int32), max_seqlen_q=2)


def test_what_was_prepared_from_a_description_is_made_again_when_it_changes():
    keep = torch.tensor([[True, True, False]])
    description = KeyPadding(keep)
    count = lambda: description.prepared("count", lambda: int(keep.sum()))  # noqa: E731
    assert count() == 2
    keep[0, 2] = True
    assert count() == 3


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("backend", ["native", "native_flash", "native_math"])
def test_a_description_changed_in_place_is_never_stale(inference, backend):
    with torch.inference_mode(inference):
        query = torch.randn(2, 6, 2, 16)
        padding = KeyPadding(torch.ones(2, 6, dtype=torch.bool))
        before = attention(query, query, query, attn_mask=padding, backend=backend)
        padding.keep[:, :3] = False
        after = attention(query, query, query, attn_mask=padding, backend=backend)
        expected = attention(query, query[:, 3:], query[:, 3:], backend=backend)
        torch.testing.assert_close(after, expected)
        assert not torch.allclose(before, after)
        with pytest.raises(AttributeError):
            padding.keep = torch.ones(2, 6, dtype=torch.bool)


@pytest.mark.parametrize("inference", [False, True])
def test_offsets_changed_in_place_are_never_stale(inference):
    with torch.inference_mode(inference):
        query = torch.randn(1, 6, 2, 16)
        packed = Packed(torch.tensor([0, 3, 6], dtype=torch.int32), max_seqlen_q=6, max_seqlen_k=6)
        attention(query, query, query, attn_mask=packed)
        packed.cu_seqlens_q[1] = 5
        expected = attention(query, query, query, attn_mask=Packed(torch.tensor([0, 5, 6], dtype=torch.int32)))
        torch.testing.assert_close(attention(query, query, query, attn_mask=packed), expected)
        packed.cu_seqlens_q[2] = 7
        with pytest.raises(CallRefused, match="max_seqlen_q|ends with 7"):
            attention(query, query, query, attn_mask=packed)


@pytest.mark.parametrize("backend", ["native", "native_math"])
def test_inference_offsets_changed_afterwards_change_no_part_of_a_description(backend):
    with torch.inference_mode():
        query = torch.randn(1, 6, 2, 16)
        offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
        packed = Packed(offsets)
        expected = attention(query, query, query, attn_mask=packed, backend=backend)
        offsets[1] = 5
        torch.testing.assert_close(attention(query, query, query, attn_mask=packed, backend=backend), expected)
        assert (packed.lengths_q, packed.max_seqlen_q) == ([3, 3], 3)
        assert packed.cu_seqlens_q.tolist() == [0, 3, 6]
        assert packed.cu_seqlens_q is packed.cu_seqlens_k
        count = []
        for _ in range(2):
            packed.prepared("counted", lambda: count.append(1))
        assert len(count) == 1
        again = attention(query, query, query, attn_mask=Packed(offsets), backend=backend)
        assert not torch.allclose(again, expected)


def test_a_refusal_names_who_accepts_the_call():
    with pytest.raises(CallRefused, match="gamma refused the call: .*softcap.*Accepted here by: .*alpha"):
        attention(Q, Q, Q, softcap=2.0, backend="gamma")


def test_a_refusal_of_several_says_of_each_why_and_once_who_accepts_the_call():
    with pytest.raises(CallRefused) as caught:
        attention(Q, Q, Q, softcap=2.0, backend=("gamma", "nobody_has_this", "native"))
    head, gamma, nobody, native, step = str(caught.value).splitlines()
    assert head == "none of gamma, nobody_has_this, native (chosen by backend=) can run this call:"
    assert gamma == "  gamma: softcap: not supported: not declared"
    assert nobody.startswith("  nobody_has_this: backend 'nobody_has_this' is not known.")
    assert native.startswith("  native: softcap: not supported: SDPA has no softcap")
    assert step.startswith("Accepted here by: alpha, ")


def test_every_reason_is_in_the_refusal():
    with pytest.raises(CallRefused) as caught:
        attention(Q.double(), Q.double(), Q.double(), causal=True, softcap=2.0, backend="gamma")
    for part in ("dtype: found float64; accepted: float32", "causal", "softcap"):
        assert part in str(caught.value)


def test_empty_calls_are_answered_by_the_core():
    import stub_kernels

    stub_kernels.calls.clear()
    for batch, queries, keys in ((0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)):
        query = torch.randn(batch, queries, 4, 8, requires_grad=True)
        key = torch.randn(batch, keys, 2, 8, requires_grad=True)
        value = torch.randn(batch, keys, 2, 5, requires_grad=True)
        out, lse = attention(query, key, value, return_lse=True, backend="spy")
        assert out.shape == (batch, queries, 4, 5)
        assert lse.shape == (batch, 4, queries)
        assert (out == 0).all()
        assert (lse == float("-inf")).all()
        out.sum().backward()
        assert all((tensor.grad == 0).all() for tensor in (query, key, value))
    assert stub_kernels.calls == []


def test_an_empty_call_that_the_backend_refuses_is_refused():
    with pytest.raises(CallRefused, match="softcap"):
        attention(Q[:, :0], Q, Q, softcap=1.0, backend="gamma")


def test_inf_in_the_inputs_of_an_empty_call_stays_out_of_its_gradients():
    query = torch.full((1, 2, 1, 4), float("inf"), requires_grad=True)
    attention(query, query[:, :0], query[:, :0]).sum().backward()
    assert (query.grad == 0).all()


def test_autocast_casts_first_and_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(Q, Q.bfloat16(), Q).dtype == torch.bfloat16
        assert attention(Q.double(), Q.double(), Q.double()).dtype == torch.float64
        mask = torch.zeros(2, 1, 6, 6)
        import stub_kernels

        stub_kernels.calls.clear()
        attention(Q, Q, Q, attn_mask=mask, backend="spy")
        attention(Q, Q, Q, attn_mask=mask, backend="spy")
        assert [options["attn_mask"].dtype for options in stub_kernels.calls] == [torch.bfloat16] * 2
        with pytest.raises(
            CallRefused, match="attn_mask: found dtype bfloat16 after autocast; accepted: .* float64 as query"
        ):
            attention(Q.double(), Q.double(), Q.double(), attn_mask=mask)
        with pytest.raises(CallRefused, match="query, key and value have float64, bfloat16, bfloat16 after autocast"):
            attention(Q.double(), Q, Q)
        with torch.autocast("cpu", enabled=False):
            assert attention(Q, Q, Q).dtype == torch.float32
            with pytest.raises(CallRefused, match="attn_mask: found dtype bfloat16; accepted"):
                attention(Q, Q, Q, attn_mask=mask.bfloat16())
    assert attention(Q, Q, Q).dtype == torch.float32


def test_lse_is_detached_and_gradients_flow():
    query = Q.clone().requires_grad_()
    for backend in ("alpha", "native_math"):
        out, lse = attention(query, Q, Q, return_lse=True, backend=backend)
        assert out.requires_grad
        assert not lse.requires_grad


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(call, "KINDS_REMEMBERED", 8)
    call.forget()
    for left in range(40):
        attention(Q, Q, Q, window_size=(left, 1), backend="alpha")
    assert len(call._memory) <= 8
    call.forget()
    for length in range(1, 40):
        attention(Q[:, :1].expand(2, length, 4, 8), Q, Q, backend="alpha")
    assert len(call._memory) <= 3


def test_a_plan_is_the_call_and_takes_another_mask():
    mask = torch.rand(2, 1, 6, 6) > 0.3
    mask[..., 0] = True
    planned = plan(Q, Q, Q, attn_mask=mask, scale=0.3, backend="native_math")
    torch.testing.assert_close(planned(Q, Q, Q), attention(Q, Q, Q, attn_mask=mask, scale=0.3, backend="native_math"))
    other = mask.flip(2)
    found = planned(Q, Q, Q, attn_mask=other)
    torch.testing.assert_close(found, attention(Q, Q, Q, attn_mask=other, scale=0.3, backend="native_math"))
    assert planned.facts.mask == "bool"
    for other_option in ({"causal": True}, {"scale": 1.0}):
        with pytest.raises(TypeError, match=r"^plan_with_mask\(\)"):
            planned(Q, Q, Q, **other_option)
        with pytest.raises(TypeError):
            plan(Q, Q, Q, causal=True)(Q, Q, Q, **other_option)
        with pytest.raises(TypeError, match=r"^plan_without_mask\(\)"):
            plan(Q, Q, Q)(Q, Q, Q, **other_option)
    assert planned.backend == "native_math"


def test_a_plan_of_an_empty_call_and_under_autocast():
    assert plan(Q[:, :0], Q, Q)(Q[:, :0], Q, Q).shape == (2, 0, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        planned = plan(Q, Q, Q)
    assert planned(Q, Q, Q).dtype == torch.bfloat16


def test_explain_has_every_backend_and_its_reasons(monkeypatch):
    monkeypatch.setattr(registry, "known_wheels", lambda: {"attn-elsewhere": ("elsewhere",)})
    found = explain(Q, Q, Q, softcap=2.0, backend="gamma")
    verdicts = {verdict.name: verdict for verdict in found.verdicts}
    assert verdicts["alpha"].admitted
    assert not verdicts["gamma"].admitted
    assert verdicts["gamma"].reasons == ("softcap: not supported: not declared",)
    assert found.chosen is None
    assert "softcap" in found.error
    missing = [verdict for verdict in found.verdicts if verdict.status == "not installed"]
    assert missing
    assert all("pip install" in verdict.reasons[0] for verdict in missing)
    assert "yes  alpha" in str(found)
    assert explain(Q, Q, Q).chosen == "native"
    set_backend("beta")
    assert explain(Q, Q, Q).chosen_by == "set_backend"


def test_explain_of_an_unknown_name_says_so_and_raises_nothing():
    assert "nosuchbackend" in explain(Q, Q, Q, backend="nosuchbackend").error


def test_explain_stops_where_the_call_does_at_a_mistyped_name_of_a_list():
    names = ("alpa", "beta")
    with pytest.raises(BackendNotUsable, match="Did you mean 'alpha'"):
        attention(Q, Q, Q, backend=names)
    found = explain(Q, Q, Q, backend=names)
    assert found.chosen is None
    assert "Did you mean 'alpha'" in found.error
    assert explain(Q, Q, Q, backend=("zzzzzzzz", "beta")).chosen == "beta"


def test_explain_finds_as_the_call_does_that_a_library_does_not_load(monkeypatch):
    def broken(_):
        raise OSError("libcudart.so.12")

    monkeypatch.setattr(loading, "_adapter", broken)
    monkeypatch.setattr(loading, "_loaded", {})
    with pytest.raises(BackendNotUsable, match="libcudart"):
        attention(Q, Q, Q, backend="alpha")
    found = explain(Q, Q, Q, backend="alpha")
    assert found.chosen is None
    assert "libcudart" in found.error
    verdicts = {verdict.name: verdict for verdict in found.verdicts}
    assert not verdicts["alpha"].admitted
    assert "libcudart" in verdicts["alpha"].reasons[0]
    assert verdicts["beta"].admitted  # not tried
    assert explain_facts(found.facts, "alpha").chosen == "alpha"  # a call of some other machine


def test_a_vmapped_call_is_refused_unless_declared():
    with pytest.raises(AttnError, match="vmap"):
        torch.vmap(lambda query: attention(query, query, query, backend="gamma"))(Q[None])


def test_threads_share_the_memory_safely():
    from concurrent.futures import ThreadPoolExecutor

    call.forget()

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            length = int(torch.randint(1, 9, (), generator=generator))
            query = torch.randn(1, length, 2, 8, generator=generator)
            causal = bool(torch.randint(0, 2, (), generator=generator))
            found = attention(query, query, query, causal=causal, backend="native_math")
            again = attention(query, query, query, causal=causal, backend="native_math")
            assert torch.equal(found, again)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


class TestAKernelThatRaises:
    def raising(self, monkeypatch, error, *, after=0):
        calls = []

        def forward(query, key, value, **options):
            calls.append(1)
            if len(calls) > after:
                raise error
            return query.clone()

        spec = registry.find("native_math").spec
        adapter = loading.load(spec)
        monkeypatch.setitem(loading._loaded, id(spec), (spec, replace(adapter, forward=forward)))
        call.forget()

    @pytest.mark.parametrize("after", [0, 1, 2])
    @pytest.mark.parametrize(
        "error", [RuntimeError("launch failed"), KeyError("no kernel"), AssertionError("sm89 alone")]
    )
    def test_is_named_with_the_call_and_leaves_the_process_usable(self, monkeypatch, error, after):
        q = torch.randn(1, 3, 2, 8)
        with monkeypatch.context() as context:
            self.raising(context, error, after=after)
            for _ in range(after):
                attention(q, q, q, backend="native_math")
            with pytest.raises(
                RuntimeError, match=r"native_math: its kernel raised .*query \(1, 3, 2, 8\).*Next: "
            ) as raised:
                attention(q, q, q, backend="native_math")
        assert isinstance(raised.value, AttnError)
        assert raised.value.__cause__ is error
        call.forget()
        assert attention(q, q, q, backend="native_math").isfinite().all()

    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"attn_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}])
    def test_in_a_plan_is_named_too(self, monkeypatch, options):
        q = torch.randn(1, 3, 2, 8)
        with monkeypatch.context() as context:
            self.raising(context, RuntimeError("launch failed"))
            planned = plan(q, q, q, backend="native_math", **options)
            with pytest.raises(
                RuntimeError, match=r"native_math: its kernel raised RuntimeError: launch failed.*Next: "
            ):
                planned(q, q, q)
        call.forget()

    def test_for_want_of_memory_is_an_error_of_memory(self, monkeypatch):
        q = torch.randn(1, 3, 2, 8)
        with monkeypatch.context() as context:
            self.raising(context, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
            with pytest.raises(
                torch.OutOfMemoryError, match=r"native_math: .*CUDA out of memory\. Tried.*Next: a smaller"
            ) as raised:
                attention(q, q, q, backend="native_math")
        assert isinstance(raised.value, AttnError)
        call.forget()

    def test_in_the_backward_that_the_core_calls(self, monkeypatch):
        q = torch.randn(1, 3, 2, 8, requires_grad=True)
        spec = registry.find("native_efficient").spec

        def forward(query, key, value, **options):
            return query.clone(), query.new_zeros(1, 2, 3)

        def backward(*given, **options):
            raise RuntimeError("no such kernel")

        adapter = loading.Adapter(forward, backward, spec.name)
        with pytest.raises(
            RuntimeError, match=r"native_efficient, backward: its kernel raised RuntimeError: no such kernel"
        ):
            running.with_backward(adapter, q, q, q, scale=1.0).sum().backward()

    def test_what_torch_says_to_itself_passes_as_it_is(self, monkeypatch):
        class Stop(Exception):  # noqa: N818 - as torch names its own
            pass

        q = torch.randn(1, 3, 2, 8)
        with monkeypatch.context() as context:
            self.raising(context, Stop())
            with pytest.raises(Stop):
                attention(q, q, q, backend="native_math")
        call.forget()
