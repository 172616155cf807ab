"""Who wins, and that a choice stays where it was made."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from old_torch import knows_hooks
from torch.utils.checkpoint import checkpoint

from attn_core import AttnError, BackendNotUsable, attention, bind, plan, selection, set_backend, use_backend

pytestmark = pytest.mark.usefixtures("stubs")

Q = torch.randn(1, 4, 2, 8)


def chosen(**options):
    """The number that the backend in force fills in; 0 stands for the default, native."""
    out = attention(Q, Q, Q, **options)
    number = out.flatten()[0].item()
    return int(number) if bool((out == number).all()) else 0


def test_call_beats_scope_beats_process_beats_environment_beats_native(monkeypatch):
    assert chosen() == 0
    monkeypatch.setenv("ATTN_BACKEND", "alpha")
    assert chosen() == 1
    set_backend("beta")
    assert chosen() == 2
    with use_backend("gamma"):
        assert chosen() == 3
        assert chosen(backend="spy") == 4
    assert chosen() == 2
    set_backend(None)
    assert chosen() == 1


def test_environment_is_noticed_when_it_changes_and_takes_a_list(monkeypatch):
    monkeypatch.setenv("ATTN_BACKEND", "gamma,beta")
    assert chosen() == 3
    assert chosen(causal=True) == 2
    monkeypatch.setenv("ATTN_BACKEND", "")
    assert chosen() == 0


def test_wrong_environment_is_an_error_at_the_first_call_that_names_the_variable():
    code = (
        "import torch, attn_core; from attn_core import attention; print('imported'); q = torch.ones(1, 2, 1, 4)\n"
        "try: attention(q, q, q)\nexcept attn_core.BackendNotUsable as e: print(e)"
    )
    environment = {**os.environ, "ATTN_BACKEND": "nativ"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    first, _, rest = run.stdout.partition("\n")
    assert first == "imported"
    assert "ATTN_BACKEND" in rest
    assert "did you mean" in rest.lower()


def test_a_wrong_name_in_a_list_of_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("ATTN_BACKEND", "nativ,beta")
    with pytest.raises(BackendNotUsable, match=r"^the environment variable ATTN_BACKEND: backend 'nativ' is not known"):
        chosen()


def test_single_name_is_strict_and_a_list_is_an_order():
    with pytest.raises(AttnError, match="gamma.*causal"):
        chosen(causal=True, backend="gamma")
    assert chosen(causal=True, backend=("gamma", "alpha")) == 1
    assert chosen(backend=["gamma", "alpha"]) == 3
    with pytest.raises(AttnError, match="gamma"):
        chosen(causal=True, backend=["gamma"])


def test_alias_and_qualified_name_reach_the_backend():
    assert chosen(backend="first") == 1
    assert chosen(backend="attn-stub:alpha") == 1


def test_unknown_name_is_refused_where_it_is_chosen():
    for choose in (
        set_backend,
        lambda name: use_backend(name).__enter__(),
        lambda name: bind(torch.nn.Identity(), name),
    ):
        with pytest.raises(BackendNotUsable, match="alpha"):
            choose("alpah")
    with pytest.raises(BackendNotUsable, match="alpha"):
        chosen(backend="alpah")
    with pytest.raises(BackendNotUsable, match="alpha"):
        chosen(backend=("alpah", "native"))


@pytest.mark.parametrize("bad", [(), "", 3, [None], ("alpha", "")])
def test_what_is_no_name_is_refused(bad):
    with pytest.raises(AttnError, match="backend"):
        chosen(backend=bad)


def test_scopes_nest_and_end_in_any_order():
    outer, inner = use_backend("alpha"), use_backend("beta")
    outer.__enter__()
    inner.__enter__()
    assert chosen() == 2
    outer.__exit__(None, None, None)
    assert chosen() == 2
    inner.__exit__(None, None, None)
    assert chosen() == 0


def test_one_scope_object_entered_twice_nests():
    scope = use_backend("alpha")
    with scope, use_backend("beta"):
        with scope:
            assert chosen() == 1
        assert chosen() == 2
    assert chosen() == 0


def test_scope_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("alpha"):
        raise KeyError
    assert chosen() == 0


def test_other_threads_and_pool_threads_never_see_a_scope():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with use_backend("alpha"):
            assert pool.submit(chosen).result() == 0
            seen = []
            thread = threading.Thread(target=lambda: seen.append(chosen()))
            thread.start()
            thread.join()
            assert seen == [0]
            assert chosen() == 1


def test_many_threads_each_keep_their_own():
    start = threading.Barrier(4)

    def work(name, number):
        start.wait()
        for _ in range(200):
            with use_backend(name):
                assert chosen() == number
            assert chosen() == 0
        return True

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(work, *pair) for pair in (("alpha", 1), ("beta", 2), ("gamma", 3), ("spy", 4))]
        assert all(job.result() for job in jobs)


def test_the_process_default_reaches_every_thread():
    set_backend("beta")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(chosen).result() == 2


def test_tasks_keep_their_own_and_to_thread_inherits():
    async def task(name, number):
        with use_backend(name):
            await asyncio.sleep(0.01)
            assert chosen() == number
            assert await asyncio.to_thread(chosen) == number
            await asyncio.sleep(0.01)
            assert chosen() == number
        assert chosen() == 0

    async def main():
        await asyncio.gather(task("alpha", 1), task("beta", 2), task("gamma", 3))
        assert chosen() == 0

    asyncio.run(main())


def test_a_task_keeps_the_choice_it_was_made_with():
    async def late():
        await asyncio.sleep(0.01)
        return chosen()

    async def main():
        with use_backend("alpha"):
            task = asyncio.create_task(late())
        assert chosen() == 0
        assert await task == 1

    asyncio.run(main())


def test_a_generator_shares_its_scope_with_its_consumer_until_it_ends():
    def steps():
        with use_backend("alpha"):
            yield chosen()
            yield chosen()

    generator = steps()
    assert next(generator) == 1
    assert chosen() == 1
    with use_backend("beta"):
        assert next(generator) == 2
    generator.close()
    assert chosen() == 0


def test_a_generator_that_ends_in_another_thread_leaves_nothing():
    def steps():
        with use_backend("alpha"):
            yield

    generator = steps()
    next(generator)
    assert chosen() == 1
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert chosen() == 0


def test_a_forgotten_generator_leaves_nothing():
    def steps():
        with use_backend("alpha"):
            yield

    generator = steps()
    next(generator)
    del generator
    gc.collect()
    assert chosen() == 0


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, query=Q):
        return attention(query * self.weight, query, query)


def number_of(out):
    return int(out.flatten()[0].item())


def test_a_binding_holds_inside_its_module_and_the_innermost_wins():
    inner, outer = Layer(), torch.nn.Sequential()
    outer.append(inner)
    bind(outer, "alpha")
    assert number_of(outer(Q)) == 1
    with use_backend("beta"):
        assert number_of(outer(Q)) == 1
    binding = bind(inner, "beta")
    assert number_of(outer(Q)) == 2
    binding.remove()
    assert number_of(outer(Q)) == 1
    assert chosen() == 0


def test_a_scope_inside_a_bound_module_wins():
    class Scoped(torch.nn.Module):
        def forward(self):
            with use_backend("beta"):
                return chosen(), chosen(backend="gamma")

    module = Scoped()
    bind(module, "alpha")
    assert module() == (2, 3)


def test_a_binding_ends_with_an_exception_and_is_replaced_by_the_next():
    class Raises(torch.nn.Module):
        def forward(self):
            raise KeyboardInterrupt

    module = Raises()
    first = bind(module, "alpha")
    with pytest.raises(KeyboardInterrupt):
        module()
    assert chosen() == 0
    second = bind(module, "beta")
    first.remove()
    assert type(module) is not Raises
    second.remove()
    assert type(module) is Raises
    assert "_attn_bound" not in module.__dict__


def test_a_binding_is_copied_and_saved_with_its_module_and_leaves_the_state_dict(tmp_path):
    import copy
    import pickle

    layer = Layer()
    bind(layer, "alpha")
    assert list(layer.state_dict()) == ["weight"]
    clone = copy.deepcopy(layer)
    assert number_of(clone()) == 1
    clone.weight.data.zero_()
    assert number_of(pickle.loads(pickle.dumps(layer))()) == 1


def test_a_plan_keeps_its_choice():
    with use_backend("alpha"):
        planned = plan(Q, Q, Q)
    assert planned.backend == "alpha"
    assert number_of(planned(Q, Q, Q)) == 1


# --- checkpoint: recomputation uses the forward's choice, or is refused ---------------------------------------------


def recorded(seen, query):
    out = attention(query, query, query)
    seen.append(number_of(out))
    return out.sin()


@knows_hooks
def test_recomputation_uses_the_scope_of_the_forward():
    seen, query = [], Q.clone().requires_grad_()
    with use_backend("alpha"):
        out = checkpoint(recorded, seen, query, use_reentrant=False)
    with use_backend("beta"):
        out.sum().backward()
    assert seen == [1, 1]
    assert chosen() == 0


@knows_hooks
def test_recomputation_uses_the_process_default_of_the_forward():
    seen, query = [], Q.clone().requires_grad_()
    set_backend("alpha")
    out = checkpoint(recorded, seen, query, use_reentrant=False)
    set_backend("beta")
    out.sum().backward()
    assert seen == [1, 1]
    assert chosen() == 2


@knows_hooks
def test_recomputation_of_scopes_opened_inside_and_of_nested_checkpoints():
    seen, query = [], Q.clone().requires_grad_()

    def inner(query):
        recorded(seen, query)
        with use_backend("spy"):
            return recorded(seen, query)

    def outer(query):
        return checkpoint(inner, recorded(seen, query), use_reentrant=False) * 2

    with use_backend("alpha"):
        out = checkpoint(outer, query, use_reentrant=False)
    forward = list(seen)
    seen.clear()
    with use_backend("beta"):
        out.sum().backward()
    assert forward == [1, 1, 4]
    assert set(seen) <= {1, 4}
    assert 2 not in seen
    assert seen


def test_recomputation_in_the_reentrant_form_is_refused_once_the_choice_could_have_changed():
    seen, query = [], Q.clone().requires_grad_()
    with use_backend("alpha"):
        out = checkpoint(recorded, seen, query, use_reentrant=True)
    chosen()
    advice = "use_reentrant=False" if selection._hooks_known else "torch 2.8 or later"
    with pytest.raises(BackendNotUsable, match=advice):
        out.sum().backward()


def test_recomputation_where_torch_tells_no_hooks_is_right_or_refused(monkeypatch):
    """What torch before 2.8 gets."""
    monkeypatch.setattr(selection, "_hooks_known", False)
    monkeypatch.setattr(selection, "top_hooks", lambda _: None)
    seen, query = [], Q.clone().requires_grad_()
    set_backend("alpha")
    checkpoint(recorded, seen, query, use_reentrant=False).sum().backward()
    with use_backend("beta"):
        out = checkpoint(recorded, seen, query, use_reentrant=False)
    with pytest.raises(BackendNotUsable, match=r"alpha, beta\. Use torch 2\.8 or later, bind"):
        out.sum().backward()
    assert seen == [1, 1, 2]


def test_recomputation_in_the_reentrant_form_runs_with_one_choice_only():
    seen, query = [], Q.clone().requires_grad_()
    set_backend("alpha")
    checkpoint(recorded, seen, query, use_reentrant=True).sum().backward()
    assert seen == [1, 1]


def test_recomputation_in_the_reentrant_form_runs_inside_a_bound_module():
    query, layer = Q.clone().requires_grad_(), Layer()
    bind(layer, "alpha")
    chosen()
    out = checkpoint(layer, query, use_reentrant=True)
    out.sum().backward()
    assert number_of(out) == 1


@knows_hooks
@pytest.mark.parametrize("again", [False, True])
def test_a_checkpoint_does_not_recompute_on_what_a_module_inside_was_bound_to_later(again):
    query, layer = Q.clone().requires_grad_(), Layer()
    bind(layer, "alpha")
    # its product with the weight is saved after the call, so that recomputing does not stop before it
    out = checkpoint(lambda query: layer(query) * layer.weight, query, use_reentrant=False)
    bind(layer, "beta")
    if again:
        bind(layer, "alpha")
        out.sum().backward()
        return
    with pytest.raises(BackendNotUsable, match=r"recomputes on beta what its forward ran on alpha"):
        out.sum().backward()


def test_a_scope_that_was_not_entered_says_so_where_it_is_left():
    with pytest.raises(AttnError, match="without having been entered"):
        use_backend("alpha").__exit__(None, None, None)


BYTES = """
import torch, attn_core
q = torch.randn(1, 4, 2, 8)
for _ in range(2):
    attn_core.attention(q, q, q)
    attn_core.attention(q, q, q, backend="native")
print("right")
"""


def test_a_name_in_the_environment_and_in_the_call_are_no_matter_under_bb():
    run = subprocess.run(
        [sys.executable, "-bb", "-c", BYTES],
        capture_output=True, text=True, check=False, env={**os.environ, "ATTN_BACKEND": "native"},
    )  # fmt: skip
    assert run.stdout.strip() == "right", run.stderr
