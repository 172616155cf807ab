"""A binding belongs to its module, and goes where torch and Python take the module."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading

import pytest
import torch
from old_torch import follows_scopes

from attn_core import AttnError, attention, bind, set_backend, use_backend

pytestmark = pytest.mark.usefixtures("stubs")

Q = torch.randn(1, 4, 2, 8)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.factor = 1

    def forward(self, query, factor=None):
        return attention(query, query, query) * self.weight * (factor or self.factor)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Layer()

    def forward(self, query):
        return self.inner(query)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def number_of(out):
    number = out.flatten()[0].item()
    return int(number) if bool((out == number).all()) else 0


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "pickle, the oldest protocol": lambda module: pickle.loads(pickle.dumps(module, 0)),
    "replica": lambda module: module._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_runs_its_own_forward_and_is_bound(how):
    layer = Layer()
    bind(layer, "alpha")
    made = COPIES[how](layer)
    if how == "replica":  # torch hands it its parameters
        made.weight = layer.weight
    made.factor = 10
    assert number_of(made(Q)) == 10
    assert number_of(layer(Q)) == 1
    bind(made, "beta")
    assert number_of(made(Q)) == 20
    assert number_of(layer(Q)) == 1


@pytest.mark.parametrize("how", COPIES)
def test_taking_a_binding_back_leaves_the_copies_bound(how):
    layer = Layer()
    binding = bind(layer, "alpha")
    made = COPIES[how](layer)
    made.weight = layer.weight
    binding.remove()
    assert type(layer) is Layer
    with use_backend("beta"):
        assert number_of(layer(Q)) == 2
        assert number_of(made(Q)) == 1


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_model_has_the_bindings_of_its_parts(how):
    model = Model()
    bind(model.inner, "alpha")
    made = COPIES[how](model)
    assert number_of(made(Q)) == 1


def test_a_forward_of_the_instance_is_run_and_comes_back():
    layer = Layer()
    layer.forward = lambda query: attention(query, query, query) * 5
    before = layer.forward
    binding = bind(layer, "alpha")
    assert number_of(layer(Q)) == 5
    bind(layer, "beta")
    assert number_of(layer(Q)) == 10
    assert number_of(copy.copy(layer)(Q)) == 10
    binding.remove()  # replaced: does nothing
    assert number_of(layer(Q)) == 10
    bind(layer, "beta").remove()
    assert layer.__dict__["forward"] is before
    assert type(layer) is Layer


def test_a_wrapper_put_around_a_bound_forward_runs_inside_the_binding():
    layer = Layer()
    bind(layer, "alpha")
    inside = layer.forward
    layer.forward = lambda query: inside(query) * 3
    assert number_of(layer(Q)) == 3


WRAPPERS = {
    "a function": lambda forward: lambda query: forward(query) * 1,
    "partial": lambda forward: functools.update_wrapper(
        functools.partial(lambda inner, query: inner(query), forward), forward
    ),
    "torch.compile": lambda forward: torch.compile(forward, backend="eager"),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "how", [pytest.param(name, marks=follows_scopes) if name == "torch.compile" else name for name in WRAPPERS]
)
def test_a_binding_comes_and_goes_beneath_a_wrapper_of_forward(how, own):
    layer = Layer()
    if own:
        layer.forward = lambda query: attention(query, query, query)
    binding = bind(layer, "alpha")
    before = layer.forward
    layer.forward = WRAPPERS[how](before)
    assert number_of(layer(Q)) == 1
    second = bind(layer, "beta")
    assert number_of(layer(Q)) == 2
    binding.remove()
    assert number_of(layer(Q)) == 2
    second.remove()
    assert type(layer) is Layer
    with use_backend("gamma"):
        assert number_of(layer(Q)) == 3
    third = bind(layer, "alpha")
    layer.forward = WRAPPERS[how](layer.forward)
    assert number_of(layer(Q)) == 1
    assert number_of(copy.deepcopy(layer)(Q)) == 1
    layer.forward = before
    third.remove()
    with use_backend("gamma"):
        assert number_of(layer(Q)) == 3
    bind(layer, "beta")
    assert number_of(layer(Q)) == 2


def test_a_forward_put_in_place_of_a_bound_one_is_bound_when_it_is_bound_again():
    layer = Layer()
    bind(layer, "alpha")
    layer.forward = lambda query: attention(query, query, query) * 5
    bind(layer, "beta")
    assert number_of(layer(Q)) == 10


def test_a_bound_module_looks_as_it_did():
    layer = Layer()
    before = (inspect.signature(layer.forward), repr(layer), list(layer.state_dict()), type(layer).__name__)
    bind(layer, "alpha")
    assert (inspect.signature(layer.forward), repr(layer), list(layer.state_dict()), type(layer).__name__) == before
    assert isinstance(layer, Layer)
    fresh = Layer()
    fresh.load_state_dict(layer.state_dict())
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_two_modules_of_a_class_are_bound_each_for_itself():
    first, second, third = Layer(), Layer(), Layer()
    bind(first, "alpha")
    bind(second, "beta")
    assert [number_of(layer(Q)) for layer in (first, second, third)] == [1, 2, 0]
    assert type(first) is type(second)


def test_replicas_in_threads_are_each_their_own():
    layer = Layer()
    bind(layer, "alpha")
    replicas, found = [], {}
    for index in range(4):
        replica = layer._replicate_for_data_parallel()
        replica.weight, replica.factor = layer.weight, index + 1
        replicas.append(replica)
    threads = [
        threading.Thread(target=lambda index=index: found.update({index: number_of(replicas[index](Q))}))
        for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 1, 1: 2, 2: 3, 3: 4}


def test_a_module_that_changed_its_class_since_is_unbound_all_the_same():
    layer = Layer()
    binding = bind(layer, "alpha")
    later = type("Later", (type(layer),), {})
    layer.__class__ = later
    assert number_of(layer(Q)) == 1
    binding.remove()
    assert type(layer) is later
    with use_backend("beta"):
        assert number_of(layer(Q)) == 2
    bind(layer, "alpha")
    assert number_of(layer(Q)) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_modules_that_can_hold_no_binding_are_refused():
    lazy = torch.nn.LazyLinear(2)
    with pytest.raises(AttnError, match="changes its class at its first call; accepted: a torch.nn.Module"):
        bind(lazy, "alpha")
    with pytest.raises(AttnError, match="bind: found a .*ScriptModule, .*accepted"):
        bind(torch.jit.script(torch.nn.Linear(2, 2)), "alpha")
    lazy(torch.ones(1, 3))
    bind(lazy, "alpha").remove()


# --- compiled -----------------------------------------------------------------------------------------------------------


def compiled(module):
    return torch.compile(module, fullgraph=True, backend="aot_eager")


@follows_scopes
def test_a_module_is_bound_before_it_is_compiled_after_and_around():
    layer = Layer()
    call = compiled(layer)
    with torch.no_grad():
        assert number_of(call(Q)) == 0
        binding = bind(layer, "alpha")
        assert number_of(call(Q)) == 1
        bind(call, "beta")  # around the compiled module: the inner one wins
        assert number_of(call(Q)) == 1
        binding.remove()
        assert number_of(call(Q)) == 2
        made = copy.copy(call)
        assert number_of(made(Q)) == 2
        set_backend("alpha")
        assert number_of(copy.deepcopy(layer)(Q)) == 1


def test_a_module_compiled_in_place_is_bound():
    layer = Layer()
    layer.compile(fullgraph=True, backend="aot_eager")
    bind(layer, "alpha")
    assert number_of(layer(Q)) == 1
    bind(layer, "beta")
    assert number_of(layer(Q)) == 2


def test_a_copy_of_a_bound_module_is_compiled_as_itself():
    layer = Layer()
    bind(layer, "alpha")
    made = copy.copy(layer)
    made.factor = 10
    assert [number_of(compiled(module)(Q)) for module in (layer, made)] == [1, 10]


def test_a_bound_module_is_exported():
    model = Model()
    bind(model.inner, "alpha")
    program = torch.export.export(model, (Q,))
    assert number_of(program.module()(Q)) == 1


@pytest.mark.parametrize("kind", [torch.nn.ModuleList, torch.nn.ModuleDict])
def test_a_container_that_is_never_called_is_refused(kind):
    with pytest.raises(AttnError, match=f"found a {kind.__name__}, which is never called itself"):
        bind(kind(), "native_math")
