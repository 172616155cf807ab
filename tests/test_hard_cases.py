"""Cases that broke an earlier form of the core, each found by trying to."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import contextmanager

import pytest
import torch
from old_torch import follows_scopes
from torch.utils.checkpoint import checkpoint

from attn_core import (
    AttnError,
    BackendNotUsable,
    CallRefused,
    KeyPadding,
    attention,
    bind,
    explain,
    registry,
    selection,
    use_backend,
)
from attn_core.integrations.transformers import attention_forward
from attn_core.plugin import BackendSpec, CapabilityRange, Constraints, DeclarationError, Facts, Rule
from attn_core.running import with_backward
from attn_core.testing.reference import reference

pytestmark = pytest.mark.usefixtures("stubs")

Q = torch.randn(1, 8, 2, 16)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    selection.traced_scopes.clear()


def number_of(out):
    number = out.flatten()[0].item()
    return int(number) if bool((out == number).all()) else 0


def compiled(function, **options):
    return torch.compile(function, backend="eager", **options)


def steps(query):
    with use_backend("alpha"):
        yield attention(query, query, query)
        yield attention(query, query, query) * 5


def first_of(made):
    for found in made:
        return found
    return None


def test_a_generator_that_compiled_code_breaks_off_leaves_no_scope_behind():
    call = compiled(lambda query: first_of(steps(query)), fullgraph=True)
    for _ in range(3):
        try:
            assert number_of(call(Q)) == 1
        except (torch._dynamo.exc.Unsupported, BackendNotUsable):  # torch 2.14, and 2.6
            pytest.skip("this torch compiles no function that leaves a generator suspended")
        finally:
            assert not selection.traced_scopes
        assert number_of(attention(Q, Q, Q)) == 0
        assert number_of(compiled(lambda query: attention(query, query, query), fullgraph=True)(Q)) == 0


@pytest.mark.parametrize("broken_off", [True, False])
def test_a_call_beside_a_suspended_generator_in_compiled_code_is_refused_or_right(broken_off):
    def beside(query):
        found = []
        for step in steps(query):
            found.append(step)
            if broken_off:
                break
            found.append(attention(query, query, query))
        return attention(query, query, query) if broken_off else found[-1]

    try:
        assert number_of(compiled(beside)(Q)) == (0 if broken_off else 1)
    except AttnError as error:
        assert "a suspended generator" in str(error) or torch.__version__ < (2, 7)  # noqa: PT017
    assert not selection.traced_scopes
    if torch.__version__ < (2, 7):
        return
    assert number_of(compiled(lambda query: sum(steps(query)), fullgraph=True)(Q)) == 6


def test_a_scope_of_contextmanager_is_followed_in_compiled_code():
    @contextmanager
    def chosen():
        with use_backend("alpha"):
            yield

    def scoped(query):
        with chosen():
            inside = attention(query, query, query)
        return inside, attention(query, query, query, backend="beta")

    try:
        assert [number_of(out) for out in compiled(scoped)(Q)] == [1, 2]
    except BackendNotUsable:  # torch 2.6 leaves compiled code for it
        assert torch.__version__ < (2, 7)
    assert not selection.traced_scopes


def test_scopes_and_bindings_inside_the_bodies_of_operators_are_compiled():
    class Layer(torch.nn.Module):
        def forward(self, query):
            return attention(query, query, query).contiguous()

    def scoped(query):
        with use_backend("beta"):
            return attention(query, query, query).contiguous()

    layer = Layer()
    bind(layer, "alpha")

    def three(query):
        with use_backend("gamma"):
            first = checkpoint(layer, query, use_reentrant=False)
            second = checkpoint(scoped, query, use_reentrant=False)
            return first, second, torch.cond(query.sum() > 1e6, scoped, layer, (query,)), attention(query, query, query)

    query = Q.clone().requires_grad_()
    with torch.no_grad():
        assert [number_of(out) for out in compiled(three, fullgraph=True)(Q)] == [1, 2, 1, 3]
    call = torch.compile(
        lambda query: checkpoint(layer, query, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    call(query).sum().backward()
    assert query.grad is not None
    assert not selection.traced_scopes


def test_what_is_raised_inside_a_scope_of_compiled_code_is_named_among_the_reasons_why_it_is_open():
    def scoped(query):
        with use_backend("gamma"):
            return attention(query, query, query, softcap=2.0)

    with pytest.raises(
        AttnError, match=r"softcap|refused or raised while it was traced \(run it without torch\.compile"
    ):
        compiled(scoped)(Q)
    assert not selection.traced_scopes


def test_a_call_that_is_not_compiled_inside_a_scope_of_compiled_code_is_refused_or_right():
    inside = torch.compiler.disable(lambda query: attention(query, query, query))

    def scoped(query):
        with use_backend("alpha"):
            return inside(query)

    try:
        assert number_of(compiled(scoped)(Q)) == 1
    except AttnError as error:
        assert "still open outside that code" in str(error)  # noqa: PT017


@follows_scopes
def test_recomputation_of_a_compiled_function_uses_the_scope_of_the_forward():
    seen = []

    def spying(graph, _):
        seen.append(str(graph.code))
        return graph.forward

    function = torch.compile(lambda query: attention(query, query, query), backend=spying, fullgraph=True)
    query = Q.clone().requires_grad_()
    with use_backend("native_math"):
        out = checkpoint(function, query, use_reentrant=False)
    out.sum().backward()
    assert not any("scaled_dot_product_attention" in graph for graph in seen)
    expected = torch.autograd.grad(reference(query, query, query)[0].sum(), query)[0]
    torch.testing.assert_close(query.grad, expected.to(query.dtype), atol=1e-5, rtol=1e-5)


def test_one_scope_object_shared_by_tasks_belongs_to_each():
    scope, seen = use_backend("alpha"), {}

    async def task(delay):
        with scope:
            await asyncio.sleep(delay)
            inside = selection.in_force()
        seen[delay] = (inside, selection.in_force())

    async def main():
        await asyncio.gather(task(0.01), task(0.02))

    asyncio.run(main())
    assert seen == {0.01: ("alpha", None), 0.02: ("alpha", None)}


class Core:
    """A backend whose graph the core makes from its backward."""

    from attn_native.math import backward, forward

    forward, backward = staticmethod(forward), staticmethod(backward)


@pytest.mark.parametrize("described", [False, True])
def test_a_mask_changed_before_the_backward_is_found(described):
    query = Q.clone().requires_grad_()
    tensor = torch.ones(1, 8, dtype=torch.bool) if described else torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask = KeyPadding(tensor) if described else tensor
    out = with_backward(Core, query, query, query, scale=0.25, attn_mask=mask)
    tensor[..., :3] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_gradient_of_the_cores_gradient_is_refused():
    query = Q.clone().requires_grad_()
    out = with_backward(Core, query, query, query, scale=0.25)
    with pytest.raises(CallRefused, match="create_graph"):
        torch.autograd.grad(out.sum(), query, create_graph=True)
    torch.autograd.grad(out.sum(), query)


def test_nested_and_sparse_tensors_are_refused_whatever_was_remembered():
    dense = torch.randn(2, 8, 4, 16)
    attention(dense, dense, dense)
    pieces = [torch.randn(3, 4, 16), torch.randn(5, 4, 16)]
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor(pieces, layout=layout)
        with pytest.raises(CallRefused, match="nested"):
            attention(nested, nested, nested)
    mask = torch.ones(1, 2, 8, 8)
    attention(Q, Q, Q, attn_mask=mask)
    with pytest.raises(CallRefused, match="sparse"):
        attention(Q, Q, Q, attn_mask=mask.to_sparse())


def test_a_rule_that_raises_is_that_backends_own_refusal():
    rule = Rule("never", lambda facts: facts.heads / 0)
    constraints = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, rules=[rule])
    assert "ZeroDivisionError" in constraints.reasons(Facts())[0]


@pytest.mark.parametrize("options", [{"scale": 10**400}, {"softcap": 10**400}, {"dropout_p": 10**400}])
def test_numbers_of_hundreds_of_digits_are_refused(options):
    with pytest.raises(CallRefused, match="accepted"):
        attention(Q, Q, Q, **options)
    assert explain(Q, Q, Q, **options).refusal


def test_a_window_beyond_every_key_limits_nothing():
    expected = attention(Q, Q, Q, window_size=(-1, 0), backend="native_math")
    for side in (10**30, 10**400):
        found = attention(Q, Q, Q, window_size=(side, 0), backend="native_math")
        torch.testing.assert_close(found, expected)


def test_a_window_that_varies_is_compiled():
    call = compiled(lambda query, left: attention(query, query, query, window_size=(left, 0)), fullgraph=True)
    for left in (1, 2, 3):
        torch.testing.assert_close(call(Q, left), attention(Q, Q, Q, window_size=(left, 0)))


def test_sequences_beside_a_mask_are_not_dropped_by_the_transformers_integration():
    query = torch.randn(1, 2, 8, 16)
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    found, _ = attention_forward(
        torch.nn.Module(), query, query, query, mask, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets
    )
    alone, _ = attention_forward(
        torch.nn.Module(), query[:, :, 3:], query[:, :, 3:], query[:, :, 3:], mask[:, :, 3:, 3:]
    )
    torch.testing.assert_close(found[:, 3:], alone)


def test_explain_raises_nothing_for_what_is_no_name():
    for backend in (123, "", []):
        assert "backend" in explain(Q, Q, Q, backend=backend).error


def test_looking_again_forgets_what_was_admitted(monkeypatch):
    attention(Q, Q, Q, backend="alpha")
    monkeypatch.setenv("ATTN_DISABLE", "alpha")
    registry.refresh()
    with pytest.raises(AttnError, match="disabled"):
        attention(Q, Q, Q, backend="alpha")
    monkeypatch.delenv("ATTN_DISABLE")
    registry.refresh()


def test_hooks_with_empty_cells_are_no_checkpoint():
    def hooked():
        def pack(tensor):
            return tensor if tensor is not None else later

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), use_backend("alpha"):
            assert number_of(attention(Q, Q, Q)) == 1
        later = 1

    hooked()


def test_a_bound_forward_keeps_its_signature():
    class Layer(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return input_ids, attention_mask

    layer = Layer()
    before = inspect.signature(layer.forward)
    bind(layer, "alpha")
    assert inspect.signature(layer.forward) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: CapabilityRange(9),
        lambda: CapabilityRange((8,), (9, 0)),
        lambda: CapabilityRange((8, 0), "9"),
        lambda: Constraints(platforms={"cpu"}, dtypes={"float32": False}, masks={"none"}),
        lambda: Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, rules=None),
        lambda: spec(aliases=5),
        lambda: spec(backward="acme:backward", vmap=True),
    ],
)
def test_declarations_that_make_no_sense_are_refused_when_made(make):
    with pytest.raises(DeclarationError):
        make()


def spec(aliases=(), backward=None, **abilities):
    constraints = Constraints(
        platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, lse=True, backward=True, **abilities
    )
    return BackendSpec(
        api=1,
        name="acme",
        summary="Acme",
        forward="acme:forward",
        backward=backward,
        aliases=aliases,
        constraints=constraints,
    )


@pytest.mark.parametrize("name", ["native", "native_flash", "native_math", "chunked"])
@pytest.mark.parametrize("where", ["query", "key", "value", "float", "bool", "key_padding"])
def test_tensors_of_inference_mode_are_right_or_refused_where_a_backward_keeps_them(name, where):
    with torch.inference_mode():
        tensors = {one: torch.randn(2, 40, 2, 16) for one in ("query", "key", "value")}
        keep = torch.rand(2, 1, 40, 40) > 0.3
        masks = {"float": torch.randn(2, 1, 40, 40), "bool": keep, "key_padding": KeyPadding(keep[:, 0, 0])}
    mask = masks.get(where)
    given = {one: tensor if one == where else tensor.clone().requires_grad_() for one, tensor in tensors.items()}
    for _ in range(2):  # the second is of a kind that is remembered
        try:
            out = attention(*given.values(), attn_mask=mask, backend=name)
        except CallRefused as refused:
            told = str(refused)
            assert "inference_mode" in told or "attn_mask" in told or "mask" in told, told
            continue
        expected, _ = reference(*given.values(), attn_mask=mask)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
        out.sum().backward()
