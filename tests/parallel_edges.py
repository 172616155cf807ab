"""What the ranks of the pool do at the edges of what a call may be."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parallel_work import Case, context, expected, inputs
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from attn_core import CallRefused, KeyPadding, attention, explain, plan
from attn_core.parallel import ContextParallel, gathering, scope, use_parallel
from attn_core.parallel.layout import even
from attn_core.testing import reference


def parts_of(cp, case, names="qkv"):
    q, k, v, g, _ = inputs(case)
    parts = {name: cp.shard(x) for name, x in zip("qkv", (q, k, v), strict=True)}
    for name in names:
        parts[name].requires_grad_()
    return list(parts.values()), cp.shard(g)


def off(cp, found, wanted, dim=1):
    difference = found.detach().double() - cp.shard(wanted, dim).double()
    return difference.abs().max().item() if difference.numel() else 0.0


def some_gradients(case, names):
    """The largest difference where gradients are wanted of these alone; each rank may have names of its own."""
    cp = context(case.shape)
    names = names[cp.index % len(names)]
    parts, g = parts_of(cp, case, names)
    out = attention(*parts, backend=case.backend, parallel=cp, **dict(case.options))
    leaves = [part for part in parts if part.requires_grad]
    grads = torch.autograd.grad(out, leaves, g)
    wanted = expected(case)
    return max(off(cp, grad, wanted[f"d{name}"]) for name, grad in zip(names, grads, strict=True))


def recomputed(case):
    """The largest difference of the gradients where the call is recomputed in the backward."""
    cp = context(case.shape)
    parts, g = parts_of(cp, case)

    def call(*parts):
        return attention(*parts, backend=case.backend, parallel=cp, **dict(case.options))

    grads = torch.autograd.grad(checkpoint(call, *parts, use_reentrant=False), parts, g)
    wanted = expected(case)
    return max(off(cp, grad, wanted[f"d{name}"]) for name, grad in zip("qkv", grads, strict=True))


def summed(case):
    """The same for a gradient that is one number for all, as ``sum`` hands it down, twice."""
    cp = context(case.shape)
    parts, _ = parts_of(cp, case)
    out = attention(*parts, backend=case.backend, parallel=cp, **dict(case.options))
    first = torch.autograd.grad(out.sum(), parts, retain_graph=True)
    second = torch.autograd.grad(out.transpose(1, 2).contiguous().transpose(1, 2).sum(), parts)
    leaves = [x.double().requires_grad_() for x in inputs(case)[:3]]
    wanted = torch.autograd.grad(reference(*leaves, **dict(case.options))[0].sum(), leaves)
    return max(off(cp, grad, want) for grads in (first, second) for grad, want in zip(grads, wanted, strict=True))


def gradient_of_a_gradient(case):
    """What is raised where a gradient of the gradient is asked for."""
    cp = context(case.shape)
    parts, g = parts_of(cp, case)
    out = attention(*parts, backend=case.backend, parallel=cp)
    try:
        grads = torch.autograd.grad(out, parts, g, create_graph=True)
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), parts)
    except Exception as error:  # noqa: BLE001 - it is what the test asks for
        return type(error).__name__, str(error)
    return None, ""


def without_gradients(case, how):
    """The largest difference, and whether the result has a graph."""
    cp = context(case.shape)
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}[how]():
        parts, _ = parts_of(cp, case, "" if how == "inference" else "qkv")
        out, lse = attention(*parts, backend=case.backend, parallel=cp, return_lse=True, **dict(case.options))
    q, k, v, *_ = inputs(case)
    whole, whole_lse = reference(q, k, v, **dict(case.options))
    wanted = {"out": whole, "lse": whole_lse}
    return max(off(cp, out.clone(), wanted["out"]), off(cp, lse.clone(), wanted["lse"], 2)), out.requires_grad


def transformed(case):
    """What is raised under a transform of ``torch.func``, and in forward mode."""
    cp = context(case.shape)
    parts, _ = parts_of(cp, case, "")
    said = []
    for call in (
        lambda: torch.func.vmap(lambda q: attention(q, parts[1], parts[2], parallel=cp))(parts[0][None]),
        lambda: torch.func.jvp(lambda q: attention(q, parts[1], parts[2], parallel=cp), (parts[0],), (parts[0],)),
    ):
        try:
            call()
        except CallRefused as error:
            said.append(str(error))
        else:
            said.append("")
    return said


def layers(case, shapes):
    """The largest difference of a stack of calls of several kinds, on several meshes, and of its gradients."""
    contexts = [context(shape, order) for shape, order in shapes]
    wholes = [x.requires_grad_() for x in inputs(case)[:3]]
    sizes = [{"causal": True}, {"softcap": 2.0}, {"causal": True, "window_size": (5, 0)}, {}]

    def stack(attend):
        q, k, v = wholes
        for number, options in enumerate(sizes):
            q = q + attend(number, q, k, v, options)
        return q

    def over_ranks(number, q, k, v, options):
        cp = contexts[number % len(contexts)]
        parts = [cp.shard(x) for x in (q, k, v)]
        return cp.unshard(attention(*parts, backend="native_math", parallel=cp, **options), total=case.queries)

    alone = stack(lambda number, q, k, v, options: reference(q, k, v, **options)[0])
    wanted = torch.autograd.grad(alone.square().sum(), wholes)
    together = stack(over_ranks)
    found = torch.autograd.grad(together.square().sum(), wholes)
    difference = [(together - alone).abs().max().item()]
    if len({cp.name for cp in contexts}) == 1:  # of a whole, each rank has its part of the gradient
        cp = contexts[0]
        summed_up = [torch.stack(gathering.all_parts(cp, x, 0, [x.shape[0]] * cp.size)).sum(0) for x in found[1:]]
        difference += [(x - y).abs().max().item() for x, y in zip(summed_up, wanted[1:], strict=True)]
    return max(difference)


def scopes(shape):
    """What is in force in another thread, after scopes ended in another order, and what plan and explain say inside one."""
    cp, other = context(shape), context(shape, "contiguous")
    q, k, v, *_ = inputs(Case(shape=shape, queries=20))
    alone = reference(q, k, v)[0]
    found = []
    with use_parallel(cp):
        thread = threading.Thread(target=lambda: found.append((attention(q, k, v) - alone).abs().max().item()))
        thread.start()
        thread.join()
        with pytest.raises(CallRefused, match="a plan is of this rank alone"):
            plan(q, k, v)
        said = explain(*(cp.shard(x) for x in (q, k, v)), backend="native_math")
        assert said.chosen == "native_math"
        assert said.parallel.mode == cp.mode
    first, second = use_parallel(cp), use_parallel(other)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    mine = [other.shard(x) for x in (q, k, v)]
    found.append(off(other, attention(*mine, backend="native_math"), alone))
    second.__exit__(None, None, None)
    found.append((attention(q, k, v) - alone).abs().max().item())
    return found


def planned(shape, mask):
    """What is off in the results of a plan, compiled too, where no ranks are in force, and what is said where some are."""
    torch._dynamo.reset()
    cp = context(shape)
    q, k, v, *_ = inputs(Case(queries=20))
    option = {"attn_mask": KeyPadding(torch.ones(2, 20, dtype=torch.bool))} if mask else {}
    made = plan(q, k, v, backend="native_math", softcap=5.0, **option)
    alone = made(q, k, v)
    off_by, said = [], []
    follows = scope._guarded is not None  # which older torch does not, in compiled code and where it recomputes
    for call in (made, torch.compile(made, fullgraph=True, backend="aot_eager"))[: 1 + follows]:

        def same(call=call):
            off_by.append((call(q, k, v) - alone).abs().max().item())

        same()
        with use_parallel(cp):
            try:
                call(q, k, v)
            except Exception as error:  # noqa: BLE001 - compiled code wraps it
                said.append(str(error))
            thread = threading.Thread(target=same)
            thread.start()
            thread.join()
            with use_parallel(None):
                same()
        same()
    if follows:
        recomputed = checkpoint(made, q.requires_grad_(), k, v, use_reentrant=False)
        with use_parallel(cp):
            recomputed.sum().backward()
    return off_by, said


def explained_as_made(shape):
    """What ``attention`` and ``explain`` say of calls that are not all in order: (which, one, other), both of one text each."""
    cp = context(shape)
    whole = torch.randn(2, 18, 4, 8)
    part = cp.shard(whole)
    rows = torch.ones(2, 1, 18, 18, dtype=torch.bool)
    mine, all_whole = cp.shard(rows, dim=2), cp.given_whole("query").given_whole("key")
    calls = {
        "parts": (cp, part, part, None),
        "rows": (cp, part, part, mine),
        "a row": (cp, part, part, mine[:, :, :1]),
        "padding": (cp, part, part, KeyPadding(rows[:, 0, 0])),
        "wholes": (all_whole, whole, whole, rows),
        "a whole": (cp, whole, whole, None),
        "a whole key": (cp, part, whole, None),
        "rows of the whole": (cp, part, part, rows),
        "columns of a part": (cp, part, part, mine[..., : part.shape[1]]),
        "padding of a part": (cp, part, part, KeyPadding(rows[:, 0, 0, : part.shape[1]])),
        "no heads": (cp, part, part, mine[:, 0]),
    }
    found = []
    for name, (parallel, query, key, mask) in calls.items():
        options = {"attn_mask": mask, "parallel": parallel, "backend": "native_math"}
        try:
            attention(query, key, key, **options)
        except CallRefused as error:
            said = str(error)
        else:
            said = None
        found.append((name, said, explain(query, key, key, **options).refusal))
    return found


def both_whole(case):
    """The largest difference where queries and keys are whole on every rank, gradients summed up over them."""
    cp = context(case.shape)
    whole = cp.given_whole("query").given_whole("key")
    leaves = [x.requires_grad_() for x in inputs(case)[:3]]
    out, lse = attention(*leaves, backend=case.backend, parallel=whole, return_lse=True, **dict(case.options))
    grads = torch.autograd.grad(out, leaves, inputs(case)[3])
    wanted = expected(case)
    found = {"out": out.detach(), "lse": lse}
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        found[name] = torch.stack(gathering.all_parts(cp, grad, 0, [grad.shape[0]] * cp.size)).sum(0)
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted)


def named_alike():
    """A mesh of one dimension, and one of two of which the other has one place: both are themselves."""
    from torch.distributed.device_mesh import DeviceMesh

    ranks = torch.arange(2)
    meshes = [
        DeviceMesh("cpu", ranks, mesh_dim_names=("ulysses",)),
        DeviceMesh("cpu", ranks.view(1, 2), mesh_dim_names=("ring", "ulysses")),
        DeviceMesh("cpu", ranks, mesh_dim_names=("ring",)),
        DeviceMesh("cpu", ranks.view(2, 1), mesh_dim_names=("ring", "ulysses")),
    ]
    if dist.get_rank() not in (0, 1):
        with pytest.raises(CallRefused, match="a mesh without this rank"):
            ContextParallel(meshes[0])
        return [0.0], 4
    made = [ContextParallel(mesh) for mesh in meshes]
    q, k, v, *_ = (x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs(Case(queries=18)))
    alone = reference(q, k, v, causal=True)[0]
    found = []
    for cp in made * 2:
        out = attention(*(cp.shard(x) for x in (q, k, v)), causal=True, backend="native_math", parallel=cp)
        out.sum().backward()
        found.append(off(cp, out, alone.detach()))
    return found, len({cp.name for cp in made})


def in_a_larger_mesh(names, sizes):
    """The largest difference where each data place has a sequence of its own, and what the data places share is summed."""
    from torch.distributed.device_mesh import DeviceMesh

    ranks = torch.arange(4).view(sizes)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=names)
    if dist.get_rank() > 3:
        return None
    cp = ContextParallel(mesh)
    case = Case(queries=19, heads=(4, 2), seed=mesh.get_local_rank("data") if "data" in names else 0)
    parts, g = parts_of(cp, case)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    out = attention(*(part * weight for part in parts), causal=True, backend="native_math", parallel=cp)
    *grads, shared = torch.autograd.grad(out, [*parts, weight], g)
    for name in names:
        dist.all_reduce(shared, group=mesh.get_group(name))
    wanted = expected(Case(**{**case.__dict__, "options": (("causal", True),)}))
    found = max(off(cp, x, wanted[name]) for name, x in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))
    alone = sum(_shared(seed) for seed in (range(2) if "data" in names else range(1)))
    return max(found, (shared - alone).abs().item()), cp.mode, cp.grid


def forgetful(shape):
    """How many sequences are remembered after many were sharded, and what is off in one that was forgotten."""
    cp = context(shape, "contiguous")
    case = Case(shape=shape, order="contiguous", queries=25)
    parts, _ = parts_of(cp, case, "")
    for length in range(100, 300):
        cp.shard(torch.empty(1, length))
    asked = cp.shared.exchanges
    found = off_parts(cp, case, parts)
    asked = cp.shared.exchanges - asked
    cp.layout(case.queries)
    again = off_parts(cp, case, parts)
    return len(cp.shared.layouts), asked, max(found, again)


def off_parts(cp, case, parts):
    out = attention(*parts, backend="native_math", parallel=cp)
    wanted = gathering.taken(expected(case)["out"], 1, even(case.queries, *case.shape, case.order).segments(*cp.place))
    return (out - wanted).abs().max().item()


def _shared(seed):
    q, k, v, g, _ = inputs(Case(queries=19, heads=(4, 2), seed=seed))
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    out = reference(*(x * weight for x in (q, k, v)), causal=True)[0]
    return torch.autograd.grad(out, weight, g)[0]


def as_long_as_a_whole(shape):
    """What is raised where parts are as long as a whole that was sharded; and what is off once cp was told of them."""
    cp = context(shape, "contiguous")
    case = Case(shape=shape, order="contiguous", queries=2 * 311)
    cp.shard(torch.empty(1, 311))
    parts = [gathering.taken(x, 1, even(622, *shape, "contiguous").segments(*cp.place)) for x in inputs(case)[:3]]
    with pytest.raises(CallRefused) as refused:
        attention(*parts, backend="native_math", parallel=cp)
    cp.layout(lengths=[311, 311])
    return str(refused.value), off_parts(cp, case, parts)


def told_alone(shape):
    """What is raised where rank 0 alone was told of a layout."""
    cp = context(shape, "contiguous")
    parts, _ = parts_of(cp, Case(queries=3 * 317), "")
    cp.shared.layouts.clear()
    cp.shared.known.clear()
    cp.shared.latest = None
    if cp.index == 0:
        cp.layout(lengths=[317] * 3)
    try:
        attention(*parts, parallel=cp)
    except Exception as error:  # noqa: BLE001 - it is what the test asks for
        found = type(error).__name__, str(error)
    cp.layout(lengths=[317] * 3)
    return found


def distributed(shape):
    """What is raised of DTensors."""
    from torch.distributed.tensor import DTensor, Shard

    cp = context(shape)
    parts = [DTensor.from_local(x, cp.mesh, [Shard(1)], run_check=False) for x in parts_of(cp, Case(), "")[0]]
    try:
        attention(*parts, parallel=cp)
    except Exception as error:  # noqa: BLE001 - it is what the test asks for
        return type(error).__name__, str(error)
    return None, ""


def groups_used(mode):
    """The number of the group that a call of each of two went over, then of the first once the other's group was gone."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]  # made by every rank of the pool
    if dist.get_rank() > 1:
        return [0, 1, 0]
    cps = [ContextParallel(DeviceMesh.from_group(group, "cpu", mesh_dim_names=(mode,))) for group in groups]
    part = torch.randn(1, 8, 2, 8)
    used, post = [], dist.P2POp

    def noted(function, tensor, peer, group, tag):
        used.append(groups.index(group))
        return post(function, tensor, peer, group, tag)

    def over(cp):
        with mock.patch.object(dist, "P2POp", noted):
            attention(part, part, part, backend="native_math", parallel=cp)
        found, used[:] = set(used), []
        return found.pop() if len(found) == 1 else found

    found = [over(cp) for cp in cps]
    dist.barrier(groups[0])
    dist.destroy_process_group(groups[1])
    return [*found, over(cps[0])]
