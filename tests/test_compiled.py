"""In compiled code the choice is right or loudly refused, never stale; and the same facts are compiled once."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from old_torch import FOLLOWS_SCOPES, TAKES_TANGENTS, follows_scopes, told
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from attn_core import AttnError, KeyPadding, Packed, attention, bind, loading, selection, set_backend, use_backend
from attn_core.running import with_backward

pytestmark = pytest.mark.usefixtures("stubs")

Q = torch.randn(1, 4, 2, 8)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def number_of(out):
    number = out.flatten()[0].item()
    return int(number) if bool((out == number).all()) else 0


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@follows_scopes
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_switch_is_followed_after_compilation(dynamic):
    call = compiled(lambda query: attention(query, query, query), dynamic=dynamic)
    assert number_of(call(Q)) == 0
    set_backend("alpha")
    assert number_of(call(Q)) == 1
    with use_backend("beta"):
        assert number_of(call(Q)) == 2
        with use_backend("gamma"):
            assert number_of(call(Q)) == 3
        assert number_of(call(Q)) == 2
    assert number_of(call(Q)) == 1
    set_backend(None)
    assert number_of(call(Q)) == 0


def test_the_environment_is_followed(monkeypatch):
    call = compiled(lambda query: attention(query, query, query))
    assert number_of(call(Q)) == 0
    monkeypatch.setenv("ATTN_BACKEND", "beta")
    assert number_of(call(Q)) == 2
    monkeypatch.delenv("ATTN_BACKEND")
    assert number_of(call(Q)) == 0


def test_the_name_of_the_call_is_followed():
    call = compiled(lambda query, name: attention(query, query, query, backend=name))
    assert [number_of(call(Q, name)) for name in ("alpha", "beta", ("gamma", "alpha"), "alpha")] == [1, 2, 3, 1]


@follows_scopes
def test_another_thread_does_not_get_this_threads_scope():
    call = compiled(lambda query: attention(query, query, query))
    seen = []
    with use_backend("alpha"):
        assert number_of(call(Q)) == 1
        thread = threading.Thread(target=lambda: seen.append(number_of(call(Q))))
        thread.start()
        thread.join()
    assert seen == [0]


def test_scopes_inside_compiled_code():
    def three(query):
        with use_backend("alpha"):
            first = attention(query, query, query)
            with use_backend("beta"):
                second = attention(query, query, query)
            third = attention(query, query, query)
        return first, second, third, attention(query, query, query)

    call = compiled(three)
    assert [number_of(out) for out in call(Q)] == [1, 2, 1, 0]
    if FOLLOWS_SCOPES:
        with use_backend("gamma"):
            assert [number_of(out) for out in call(Q)] == [1, 2, 1, 3]
    assert selection.traced_scopes == []


class Layer(torch.nn.Module):
    def forward(self, query):
        return attention(query, query, query)


def test_bindings_inside_and_around_compiled_code():
    model = torch.nn.ModuleList([Layer(), Layer()])
    bind(model[0], "alpha")
    call = compiled(lambda query: [layer(query) for layer in model])
    assert [number_of(out) for out in call(Q)] == [1, 0]
    bind(model[1], "beta")
    assert [number_of(out) for out in call(Q)] == [1, 2]
    binding = bind(model[0], "gamma")
    assert [number_of(out) for out in call(Q)] == [3, 2]
    binding.remove()
    assert [number_of(out) for out in call(Q)] == [0, 2]

    outer = torch.nn.Sequential(torch.compile(Layer(), fullgraph=True, backend="aot_eager"))
    assert number_of(outer(Q)) == 0
    if FOLLOWS_SCOPES:
        bind(outer, "beta")
        assert number_of(outer(Q)) == 2


def test_a_second_call_does_not_compile_again_nor_does_an_eager_one_between():
    counter = CompileCounter()
    call = torch.compile(lambda query: attention(query, query, query, causal=True), fullgraph=True, backend=counter)
    call(Q)
    call(Q)
    assert counter.frame_count == 1
    attention(Q, Q, Q, causal=True)
    attention(torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16), window_size=(1, 1))
    with use_backend("alpha"):
        attention(Q, Q, Q)
    call(Q)
    assert counter.frame_count == 1


def test_dynamic_lengths_are_compiled_once():
    counter = CompileCounter()
    call = torch.compile(lambda query: attention(query, query, query), fullgraph=True, backend=counter, dynamic=True)
    for length in (17, 19, 64, 33):
        call(torch.randn(2, length, 2, 8))
    assert counter.frame_count == 1
    for length in (
        2,
        7,
        15,
    ):  # torch's CPU kernel loses NaN below 16 keys, so native masks there, in a graph of its own
        call(torch.randn(2, length, 2, 8))
    assert counter.frame_count == 2


@pytest.mark.parametrize("once", [(2, 1), (1, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_dense_mask_of_any_lengths_is_compiled(dynamic, once):
    call = compiled(lambda query, key, mask: attention(query, key, key, attn_mask=mask), dynamic=dynamic)
    for queries, keys in ((20, 30), (40, 50)):
        query, key = torch.randn(2, queries, 3, 8), torch.randn(2, keys, 3, 8)
        shape = [1 if place in once else size for place, size in enumerate((2, 3, queries, keys))]
        for mask in (torch.rand(shape) < 0.7, torch.randn(shape)):
            torch.testing.assert_close(call(query, key, mask), attention(query, key, key, attn_mask=mask))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_refusals_are_loud_in_compiled_code(fullgraph):
    call = torch.compile(
        lambda query: attention(query, query, query, softcap=2.0, backend="gamma"),
        fullgraph=fullgraph,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match=told("softcap: not supported", fullgraph)) as caught:
        call(Q)
    assert fullgraph or isinstance(caught.value, AttnError)


STACK, TANGENT = torch.randn(3, *Q.shape), torch.randn(Q.shape)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", ["vmap", "grad", "jvp"])
def test_function_transforms_in_compiled_code_are_refused_unless_declared(name, fullgraph):
    run = {
        "vmap": lambda call: torch.vmap(call)(STACK),
        "grad": lambda call: torch.func.grad(lambda query: call(query).sum())(Q),
        "jvp": lambda call: torch.func.jvp(call, (Q,), (TANGENT,)),
    }[name]

    def of(backend):
        return lambda: run(lambda query: attention(query, query, query, backend=backend))

    for backend in ("gamma", "native"):
        with pytest.raises(
            Exception, match=told("vmap: found a transform of torch.func .*; not supported", fullgraph)
        ) as caught:
            torch.compile(of(backend), fullgraph=fullgraph, backend="aot_eager")()
        assert fullgraph or isinstance(caught.value, AttnError)
    if name != "jvp":  # torch can't compile a jvp of what it transposes, and says so
        found = torch.compile(of("native_math"), fullgraph=fullgraph, backend="aot_eager")()
        torch.testing.assert_close(found, of("native_math")())


@pytest.mark.parametrize("fullgraph", [True, False])
def test_forward_mode_around_compiled_code_is_refused_unless_declared(fullgraph):
    def call(query, backend):
        return attention(query, query, query, backend=backend)

    expected = torch.func.jvp(lambda query: call(query, "native_math"), (Q,), (TANGENT,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Q, TANGENT)
        run = torch.compile(call, fullgraph=fullgraph, backend="aot_eager")
        if fullgraph and not TAKES_TANGENTS:
            with pytest.raises(Exception, match="would silently drop the tangent"):
                run(dual, "native_math")
            return
        for backend in ("gamma", "native"):
            with pytest.raises(Exception, match=told("forward_mode: not supported", fullgraph)) as caught:
                run(dual, backend)
            assert fullgraph or isinstance(caught.value, AttnError)
        torch.testing.assert_close(forward_ad.unpack_dual(run(dual, "native_math")).tangent, expected)


def test_bad_input_is_refused_in_compiled_code():
    call = torch.compile(lambda query, key: attention(query, key, key), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=told("batch: found 1 and 2|batch: found 1, 2")):
        call(Q, torch.randn(2, 4, 2, 8))


@pytest.mark.parametrize("found", [{"softcap": -1.0}, {"softcap": -2}, {"dropout_p": 1.0}, {"dropout_p": -0.5}])
def test_numbers_that_vary_and_make_no_sense_are_refused_with_what_was_found(found):
    ((name, number),) = found.items()
    call = compiled(
        lambda query, option: attention(query, query, query, backend="alpha", **{name: option}), dynamic=True
    )
    with pytest.raises(Exception, match=told(f"{name}: found {float(number)}; accepted: ")):
        call(Q, number)


def test_options_masks_and_autocast_reach_the_adapter_in_compiled_code():
    keep = torch.ones(1, 4, dtype=torch.bool)
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
    described = KeyPadding(keep)

    outside = Packed(offsets)

    def three(query, keep, scale):
        inside = attention(query, query, query, attn_mask=KeyPadding(keep), scale=scale, backend="alpha")
        around = attention(query, query, query, attn_mask=described, window_size=(2, -1), causal=True, backend="beta")
        packed = attention(query, query, query, attn_mask=Packed(offsets), softcap=2, dropout_p=0.5, backend="alpha")
        return inside, around, packed, attention(query, query, query, attn_mask=outside, backend="alpha")

    call = compiled(three)
    assert [number_of(out) for out in call(Q, keep, 0.5)] == [1, 2, 1, 1]
    assert [number_of(out) for out in call(Q, keep, 0.7)] == [1, 2, 1, 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [out.dtype for out in call(Q, keep, 0.7)] == [torch.bfloat16] * 4


def sequences(*ends):
    return Packed(torch.tensor([0, *ends], dtype=torch.int32))


@pytest.mark.parametrize("dynamic", [None, True])
def test_offsets_made_outside_are_held_to_the_tensors_with_no_graph_for_each_length(dynamic):
    counter = CompileCounter()
    call = torch.compile(
        lambda query, packed: attention(query, query, query, attn_mask=packed, backend="native_math"),
        fullgraph=True, backend=counter, dynamic=dynamic,
    )  # fmt: skip
    for length in (24, 31, 40, 50, 57):
        query, packed = torch.randn(1, length, 2, 8), sequences(length // 3, length)
        expected = attention(query, query, query, attn_mask=packed, backend="native_math")
        torch.testing.assert_close(call(query, packed), expected)
    assert counter.frame_count <= 2
    for packed in (sequences(8, 23), sequences(8, 25)):
        with pytest.raises(Exception, match=told(r"cu_seqlens_q ends with \d+; accepted: the length of the tensor, ")):
            call(torch.randn(1, 24, 2, 8), packed)


def test_lse_is_detached_in_compiled_code():
    query = Q.clone().requires_grad_()
    out, lse = compiled(lambda query: attention(query, query, query, return_lse=True, backend="alpha"))(query)
    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    class Model(torch.nn.Module):
        def forward(self, query):
            return attention(query, query, query, causal=True)

    lengths = {1: torch.export.Dim("length", min=16 if strict else 2, max=64)}
    program = torch.export.export(Model(), (torch.randn(1, 24, 2, 8),), dynamic_shapes=(lengths,), strict=strict)
    other = torch.randn(1, 19, 2, 8)
    torch.testing.assert_close(program.module()(other), attention(other, other, other, causal=True))


FIRST_CALL = """
import torch, attn_core
q = torch.randn(1, 4, 2, 8)
call = torch.compile(lambda q: attn_core.attention(q, q, q, causal=True), fullgraph=True, backend="aot_eager")
found = call(q)
torch.testing.assert_close(found, attn_core.attention(q, q, q, causal=True))
if attn_core.selection.guarded_choice is not None:
    with attn_core.use_backend("native_math"):
        call(q)
print("right")
"""


@pytest.mark.parametrize("order", ["import torch, attn_core", "import attn_core, torch"])
def test_the_very_first_call_of_a_process_may_be_compiled(order):
    code = FIRST_CALL.replace("import torch, attn_core", order)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "right", run.stderr


def test_without_guarded_objects_the_default_is_followed_and_an_open_scope_refused(monkeypatch):
    """What an older torch gets: two guarded globals, and a refusal in the second case."""
    monkeypatch.setattr(selection, "guarded_choice", None)
    call = compiled(lambda query: attention(query, query, query))
    assert number_of(call(Q)) == 0
    set_backend("alpha")
    assert number_of(call(Q)) == 1
    with use_backend("beta"), pytest.raises(Exception, match=told("scope of use_backend or bind is open")):
        call(Q)
    torch._dynamo.reset()
    with use_backend("beta"):  # where the graph may break, the call may be made outside of it
        try:
            assert number_of(torch.compile(lambda query: attention(query, query, query), backend="eager")(Q)) == 2
        except AttnError as error:
            assert "scope of use_backend or bind is open" in str(error)  # noqa: PT017
    set_backend(None)
    call = compiled(lambda query: attention(query, query, query))
    assert number_of(call(Q)) == 0
    monkeypatch.setenv("ATTN_BACKEND", "beta")
    assert number_of(call(Q)) == 2
    monkeypatch.setenv("ATTN_BACKEND", "alpha")
    assert number_of(call(Q)) == 1
    inside = compiled(scoped)
    assert number_of(inside(Q)) == 2
    with use_backend("beta"):
        assert number_of(compiled(lambda query: attention(query, query, query, backend="gamma"))(Q)) == 3


def scoped(query):
    with use_backend("beta"):
        return attention(query, query, query)


def test_a_result_that_ends_in_a_conversion_to_its_own_dtype_keeps_its_gradient():
    """torch 2.11 gave zeros, in silence."""

    def forward(query, key, value, *, scale, return_lse=False):
        scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value).to(query.dtype)
        return (out, scores.logsumexp(-1)) if return_lse else out

    def backward(grad_out, query, key, value, out, lse, *, scale):
        return grad_out * 2, torch.zeros_like(key), torch.zeros_like(value)

    torch._dynamo.reset()
    adapter = loading.Adapter(forward, backward, "acme")
    call = torch.compile(
        lambda *tensors: with_backward(adapter, *tensors, scale=1.0), backend="aot_eager", fullgraph=True
    )
    tensors = [torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3)]
    weights = torch.randn(1, 4, 2, 8)
    found = torch.autograd.grad((call(*tensors) * weights).sum(), tensors)
    torch.testing.assert_close(found[0], 2 * weights)


@pytest.mark.parametrize("lengths", [(20, 33), (3, 20), (20, 20)])
@pytest.mark.parametrize("backend", ["native_flash", "native", "native_math"])
def test_compiled_gradients_are_right_where_causal_lengths_differ(backend, lengths):
    torch._dynamo.reset()
    tensors = [torch.randn(1, length, 2, 8, requires_grad=True) for length in (lengths[0], lengths[1], lengths[1])]
    call = torch.compile(
        lambda *tensors: attention(*tensors, causal=True, backend=backend), backend="aot_eager", fullgraph=True
    )
    weights = torch.randn(1, lengths[0], 2, 8)
    found = torch.autograd.grad((call(*tensors) * weights).sum(), tensors)
    expected = torch.autograd.grad((attention(*tensors, causal=True, backend="native_math") * weights).sum(), tensors)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
