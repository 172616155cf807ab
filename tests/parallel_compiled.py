"""What the ranks of the pool do in compiled code."""

from __future__ import annotations

import os
from unittest import mock

import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from parallel_work import Case, context, errors, inputs
from torch._dynamo.backends.common import aot_autograd

from attn_core import attention
from attn_core.parallel import communication, scope, use_parallel
from attn_core.testing import reference


def reordered(graph, inputs):
    """On odd ranks, a graph with its nodes in another order that their dependences allow: what came last comes first."""
    if dist.get_rank() % 2 == 0:
        return make_boxed_func(graph.forward)
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    waiting = {node: set(node.all_input_nodes) for node in order if node.op != "output"}
    copies, new = {}, torch.fx.Graph()
    while waiting:
        ready = [node for node, needed in waiting.items() if needed <= set(copies)]
        inputs_first = [node for node in ready if node.op == "placeholder"][:1]
        node = inputs_first[0] if inputs_first else max(ready, key=order.__getitem__)
        copies[node] = new.node_copy(node, copies.__getitem__)
        del waiting[node]
    new.node_copy(list(order)[-1], copies.__getitem__)
    return make_boxed_func(torch.fx.GraphModule(graph, new).forward)


reordering = aot_autograd(fw_compiler=reordered, bw_compiler=reordered)


def compiled(cases, backend, dynamic, graphs):
    """The largest differences of compiled calls from the reference; the first so many of them may make a graph."""
    torch._dynamo.reset()
    backend = reordering if backend == "reordering" else backend
    attend = torch.compile(attention, fullgraph=True, backend=backend, dynamic=dynamic)
    found = []
    for number, case in enumerate(cases):
        with torch._dynamo.config.patch(error_on_recompile=number >= graphs):
            found.append(errors(case, attend))
            with torch._dynamo.config.patch(error_on_recompile=True):
                again = errors(case, attend)
        assert found[-1] == again
    return found


def followed(shape):
    """What one compiled function computes as scopes open and close around it: differences, one after another."""
    torch._dynamo.reset()
    q, k, v, *_ = inputs(Case(shape=shape, queries=20))
    calls = []

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, k, v):
        return attention(q, k, v, causal=True, backend="native_math")

    zigzag, contiguous = context(shape), context(shape, "contiguous")
    for _ in range(2):
        for cp in (None, zigzag, contiguous, None, zigzag):
            parts = [x if cp is None else cp.shard(x) for x in (q, k, v)]
            wanted = reference(q, k, v, causal=True)[0]
            with use_parallel(cp):
                found = attend(*parts)
            calls.append((found - (wanted if cp is None else cp.shard(wanted))).abs().max().item())
        with use_parallel(zigzag), use_parallel(None):
            calls.append((attend(q, k, v) - wanted).abs().max().item())
    return calls


def not_followed(shape):
    """A compiled call before, inside and after a scope, where torch has no guards that read it: what is off, what is said."""
    torch._dynamo.reset()
    q, k, v, *_ = inputs(Case(shape=shape, queries=20))
    wanted = reference(q, k, v, causal=True)[0]
    cp = context(shape)
    parts = [cp.shard(x) for x in (q, k, v)]
    guarded, scope._guarded = scope._guarded, None
    try:
        attend = torch.compile(attention, fullgraph=True, backend="aot_eager")
        before = attend(q, k, v, causal=True, backend="native_math")
        with use_parallel(cp):
            try:
                message = f"computes {attend(*parts, causal=True, backend='native_math')}"
            except Exception as error:  # noqa: BLE001 - it is what the test asks for
                message = str(error)
        after = attend(q, k, v, causal=True, backend="native_math")
    finally:
        scope._guarded = guarded
        torch._dynamo.reset()
    return (before - wanted).abs().max().item(), message, (after - wanted).abs().max().item()


def given(shape):
    """What one compiled function computes on the ranks that it is given: differences, one after another."""
    torch._dynamo.reset()
    q, k, v, *_ = inputs(Case(shape=shape, queries=20))
    wanted = reference(q, k, v, causal=True)[0]
    attend = torch.compile(attention, fullgraph=True, backend="aot_eager")
    zigzag, contiguous = context(shape), context(shape, "contiguous")
    calls = []
    for parallel in (zigzag, contiguous, zigzag.given_whole("key"), zigzag.given_whole("query"), None) * 2:
        cp = contiguous if parallel is contiguous else zigzag
        whole = {"query", "key"} if parallel is None else parallel.whole
        query = q if "query" in whole else cp.shard(q)
        key, value = (k, v) if "key" in whole else (cp.shard(k), cp.shard(v))
        found = attend(query, key, value, causal=True, backend="native_math", parallel=parallel)
        calls.append((found - (wanted if "query" in whole else cp.shard(wanted))).abs().max().item())
    return calls


def refused(case, mask=None):
    """What compiled code raises on this rank, and how many bytes it has sent before; twice."""
    torch._dynamo.reset()
    cp = context(case.shape, case.order)
    q, k, v, *_ = inputs(case)
    q, k, v = (cp.shard(x).requires_grad_() for x in (q, k, v))
    cp.shared.kinds.clear()
    communication.sent.clear()
    attend = torch.compile(attention, fullgraph=True, backend="aot_eager")
    found = []
    for _ in range(2):
        try:
            attend(q, k, v, parallel=cp, attn_mask=mask, **{"backend": case.backend, **dict(case.options)})
        except Exception as error:  # noqa: BLE001 - it is what the test asks for
            found.append((type(error).__name__, str(error), sum(communication.sent.values())))
        else:
            found.append((None, "", sum(communication.sent.values())))
    return found


def mixed(case):
    """The largest differences where one rank runs compiled code and the others do not, and then another."""
    torch._dynamo.reset()
    attend = torch.compile(attention, fullgraph=True, backend="aot_eager")
    return [errors(case, attend if dist.get_rank() == rank else attention) for rank in (1, 0, 1)]


def checked(case):
    """``torch.library.opcheck`` of each operator, as a call of this kind makes it."""
    cp = context(case.shape, case.order)
    q, k, v, g, _ = (cp.shard(x) if isinstance(x, torch.Tensor) else x for x in inputs(case))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    made = []

    class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "attn_core":
                made.append((operator, args))
            return operator(*args, **(kwargs or {}))

    with Recorded():
        attention(q, k, v, backend=case.backend, parallel=cp, **dict(case.options)).backward(g)
    for operator, args in made:
        arguments = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.detach().clone().requires_grad_(tensor.is_floating_point()), args
        )
        tests: tuple[str, ...] = ("test_schema", "test_faketensor")
        if operator is not torch.ops.attn_core.ring_backward.default:
            tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, arguments, test_utils=tests)
    return sorted({operator.name() for operator, _ in made})


def launched(case, folder):
    """The largest differences of a compiled call in two launches that share what torch keeps on disk; what it found there."""
    cp = context(case.shape, case.order)
    wholes = inputs(case)[:3]
    g = torch.ones_like(wholes[0]).cumsum(1)
    alone = [x.clone().requires_grad_() for x in wholes]
    wanted = reference(*alone, causal=True)[0]
    gradients = torch.autograd.grad(wanted, alone, g)

    def whole(q, k, v):
        out = attention(q, k, v, causal=True, backend=case.backend, parallel=cp)
        return cp.unshard(out, total=case.queries)

    counters, differences = torch._dynamo.utils.counters, []
    with mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}):
        for _ in range(2):
            dist.barrier(cp.mesh.get_group())
            torch._dynamo.reset()
            counters.clear()
            parts = [cp.shard(x).requires_grad_() for x in wholes]
            out = torch.compile(whole, fullgraph=True)(*parts)
            found = torch.autograd.grad(out, parts, g)
            differences.append((out - wanted).abs().max().item())
            differences += [(x - cp.shard(y)).abs().max().item() for x, y in zip(found, gradients, strict=True)]
    torch._dynamo.reset()
    return differences, counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def none_on_one_rank(shape):
    """What compiled code raises where the batch of rank 1 is none."""
    torch._dynamo.reset()
    cp = context(shape)
    part = torch.randn(2, 5, 4, 8)
    cp.layout(lengths=[5] * cp.size)
    attend = torch.compile(attention, fullgraph=True, backend="aot_eager")
    part = part[:0] if dist.get_rank() == 1 else part
    try:
        attend(part, part, part, softcap=7.0, backend="native_math", parallel=cp)
    except Exception as error:  # noqa: BLE001 - it is what the test asks for
        return type(error).__name__, str(error)
    return None, ""
