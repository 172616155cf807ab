"""What the ranks of the pool do."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from attn_core import KeyPadding, Packed, attention
from attn_core.parallel import (
    ContextParallel,
    agreement,
    communication,
    gathering,
    heads,
    merge,
    part,
    ring,
    rows,
    sight,
    use_parallel,
)
from attn_core.testing import assert_close, reference

_meshes: dict[tuple[int, int], DeviceMesh] = {}


@dataclass(frozen=True)
class Case:
    """One call of the whole sequence, and how it is spread."""

    shape: tuple[int, int] = (2, 1)
    order: str = "zigzag"
    queries: int = 16
    keys: int | None = None
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 8)
    batch: int = 2
    dtype: str = "float64"
    mask: str = "none"
    options: tuple = ()
    backend: str = "native_math"
    lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    whole: str | None = None
    scope: bool = False
    strided: bool = False
    device: str = "cpu"
    seed: int = field(default=0)


def make_meshes(shapes):
    """On every rank of the pool: groups are made by all."""
    for shape in shapes:
        ranks = torch.arange(shape[0] * shape[1])
        if 1 in shape:
            name = "ring" if shape[1] == 1 else "ulysses"
            _meshes[shape] = DeviceMesh("cpu", ranks, mesh_dim_names=(name,))
        else:
            _meshes[shape] = DeviceMesh("cpu", ranks.view(shape), mesh_dim_names=("ring", "ulysses"))


def context(shape, order="zigzag"):
    return ContextParallel(_meshes[shape], order=order)


def packed_offsets(length, seed):
    """Documents of all sorts: empty ones, short ones, long ones across the borders."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, length + 1, (4,), generator=generator).sort().values.tolist()
    return torch.tensor([0, *ends, length], dtype=torch.int32)


def inputs(case):
    torch.manual_seed(case.seed)
    keys = case.queries if case.keys is None else case.keys
    dtype = getattr(torch, case.dtype)
    batch = 1 if case.mask == "packed" else case.batch
    q = torch.randn(batch, case.queries, case.heads[0], case.dims[0]).to(dtype)
    k = torch.randn(batch, keys, case.heads[1], case.dims[0]).to(dtype)
    v = torch.randn(batch, keys, case.heads[1], case.dims[1]).to(dtype)
    g = torch.randn(batch, case.queries, case.heads[0], case.dims[1]).to(dtype)
    mask = None
    if case.mask == "key_padding":
        keep = torch.rand(batch, keys) > 0.4
        keep[-1] = False
        mask = KeyPadding(keep)
    elif case.mask == "packed":
        mask = Packed(packed_offsets(case.queries, case.seed), packed_offsets(keys, case.seed + 1))
    elif case.mask != "none":
        mask = torch.rand(batch, case.heads[0], case.queries, keys) > 0.4
        if case.queries > 3:
            mask[:, :, 3] = False
        if case.mask == "float":
            mask = torch.where(mask, torch.randn(mask.shape, dtype=dtype), -torch.inf)
        if case.mask.startswith("far"):  # rows of a number that swallows every score
            mask[:, :, 5] = mask[..., :6] = False
            mask = torch.where(mask, torch.randn(mask.shape, dtype=dtype), -1e300 if dtype == torch.float64 else -1e30)
        if case.mask == "far_keys":
            mask = mask[:1, :1, -1:]
        if case.mask == "bool_rows":
            mask = mask[:, :1, :, :1]
        if case.mask == "bool_keys":
            mask = mask[:1, :1, :1]
    if case.device == "cpu":
        return q, k, v, g, mask
    if isinstance(mask, KeyPadding):
        mask = KeyPadding(mask.keep.to(case.device))
    elif isinstance(mask, Packed):
        mask = Packed(*(offsets.to(case.device) for offsets in mask.tensors))
    elif mask is not None:
        mask = mask.to(case.device)
    return *(tensor.to(case.device) for tensor in (q, k, v, g)), mask


def computed(case, attend=attention):
    """out, lse, dq, dk, dv of the whole, put together from the ranks'."""
    cp = context(case.shape, case.order)
    q, k, v, g, mask = inputs(case)
    rows = cp.layout(case.queries, case.lengths)
    columns = cp.layout(k.shape[1], case.key_lengths if case.keys is not None else case.lengths)
    mine, keys_here = rows.segments(*cp.place), columns.segments(*cp.place)

    def part_of(tensor, segments, whole):
        found = (tensor.clone() if whole else gathering.taken(tensor, 1, segments)).detach()
        if case.strided:
            found = torch.stack((found, found), -1)[..., 0]
        return found.requires_grad_()

    whole_query, whole_key = case.whole == "query", case.whole == "key"
    q, g = part_of(q, mine, whole_query), part_of(g, mine, whole_query).detach()
    k, v = part_of(k, keys_here, whole_key), part_of(v, keys_here, whole_key)
    if isinstance(mask, torch.Tensor) and mask.shape[2] > 1 and not whole_query:
        mask = gathering.taken(mask, 2, mine)
    before = [tensor.detach().clone() for tensor in (q, k, v)]
    parallel = cp.given_whole(case.whole) if case.whole else cp
    scope = use_parallel(parallel) if case.scope else nullcontext()
    with scope:
        out, lse = attend(
            q, k, v, attn_mask=mask, return_lse=True, backend=case.backend,
            parallel=None if case.scope else parallel, **dict(case.options),
        )  # fmt: skip
    assert not lse.requires_grad
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), g)
    for tensor, was in zip((q, k, v), before, strict=True):
        assert torch.equal(tensor, was), "an input was changed"
    found = {
        "out": (out.detach(), 1, rows, whole_query),
        "lse": (lse, 2, rows, whole_query),
        "dq": (dq, 1, rows, whole_query),
    }
    found |= {"dk": (dk, 1, columns, whole_key), "dv": (dv, 1, columns, whole_key)}
    put = {}
    for name, (tensor, dim, layout, whole) in found.items():
        if not whole:
            put[name] = gathering.gathered(cp, tensor, dim, layout)
        elif name in ("out", "lse"):
            put[name] = tensor
        else:
            parts = gathering.all_parts(cp, tensor.contiguous(), 0, [tensor.shape[0]] * cp.size)
            put[name] = torch.stack(parts).sum(0)
    return put


def expected(case):
    q, k, v, g, mask = inputs(case)
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    out, lse = reference(*leaves, attn_mask=mask, **dict(case.options))
    dq, dk, dv = torch.autograd.grad(out, leaves, g.double())
    return {"out": out.detach(), "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def errors(case, attend=attention):
    """The largest difference of each from the reference; on rank 0, None elsewhere."""
    found = computed(case, attend)
    if dist.get_rank() != 0:
        return None
    differences = {}
    for name, wanted in expected(case).items():
        got = found[name].double()
        finite = wanted.isfinite()
        same = got.shape == wanted.shape and torch.equal(got.isfinite(), finite)
        difference = (got - wanted)[finite].abs()
        differences[name] = (difference.max().item() if difference.numel() else 0.0) if same else float("inf")
    return differences


def agrees(case):
    """Whether the ranks together are as near to the reference as a kernel has to be; raises where they are not."""
    found, wanted = computed(case), expected(case)
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, getattr(torch, case.dtype), name)
    return True


def streams(case):
    """The result where the inputs are made, and the result is read, on a stream that is not the default one."""
    cp = context(case.shape, case.order)
    whole = inputs(case)[:4]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # whoever does not wait for this stream reads what is not there yet
        q, k, v, g = (cp.shard(tensor).clone() for tensor in whole)
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        out = attention(*leaves, backend=case.backend, parallel=cp, **dict(case.options))
        grads = torch.autograd.grad(out, leaves, g)
        kept = [tensor.clone() for tensor in (out, *grads)]
    stream.synchronize()
    layout = cp.layout(case.queries)
    wanted = expected(case)
    for name, tensor in zip(("out", "dq", "dk", "dv"), kept, strict=True):
        assert_close(gathering.gathered(cp, tensor.detach(), 1, layout), wanted[name], getattr(torch, case.dtype), name)
    return True


# --- defects ------------------------------------------------------------------------------------------------------------


def errors_with(defect, case):
    """``errors`` with a part made wrong."""
    patches = {
        "merge": (rows, "merge", _forgetful_merge),
        "zigzag": (sight, "_placed", _laid_backwards),
        "hop": (ring.Gradients, "pass_on", lambda self, step: None),
        "heads": (heads, "by_positions", _swapped(heads.by_positions)),
        "mask": (part, "cut", None),
        "diagonal": (sight, "_calls", _seeing_all(sight._calls)),
    }
    owner, name, wrong = patches[defect]
    cp = context(case.shape, case.order)
    right = getattr(owner, name)
    if defect == "mask":
        wrong = lambda segments, start, stop: right(segments, start, stop)[::-1]  # noqa: E731
    from attn_core.parallel import ulysses

    owner, name = (ulysses, "by_positions") if defect == "heads" else (owner, name)
    right = getattr(owner, name)
    cp.shared.kinds.clear()
    sight.course.cache_clear()
    setattr(owner, name, wrong)
    try:
        return errors(case)
    finally:
        setattr(owner, name, right)
        cp.shared.kinds.clear()
        sight.course.cache_clear()


def _laid_backwards(segments):
    return [(sum(other.length for other in segments[nth + 1 :]), segment) for nth, segment in enumerate(segments)]


def _seeing_all(right):
    return lambda rectangle, seen: right(rectangle, replace(seen, causal=False))


def _forgetful_merge(parts, out, lse):
    outs, lses = zip(*parts, strict=True)
    out.copy_(sum(outs) / len(outs))
    lse.copy_(torch.stack([level.to(lse.dtype) for level in lses]).logsumexp(0))


def _swapped(right):
    def wrong(cp, tensors, spread):
        return right(cp, [tensor.flip(2) if tensor.shape[2] > 1 else tensor * 2 for tensor in tensors], spread)

    return wrong


# --- others -------------------------------------------------------------------------------------------------------------


def traffic(case):
    """Bytes that this rank sends in the forward, and in forward and backward together, by purpose."""
    cp = context(case.shape, case.order)
    q, k, v, g, _ = (cp.shard(x) if isinstance(x, torch.Tensor) else x for x in inputs(case))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    communication.sent.clear()
    out = attention(q, k, v, backend=case.backend, parallel=cp, **dict(case.options))
    forward = dict(communication.sent)
    out.backward(g)
    return _sent(forward), _sent(communication.sent)


def traffic_and_formula(case):
    """What ``traffic`` counts of a case with its mask, and what the formula says of it."""
    from attn_core import explain
    from attn_core.parallel.explaining import kind_of_parts
    from attn_core.parallel.traffic import bytes_sent

    cp = context(case.shape, case.order)
    q, k, v, g, mask = inputs(case)
    g = cp.shard(g)
    q, k, v = (cp.shard(x).requires_grad_() for x in (q, k, v))
    columns = cp.layout(case.queries if case.keys is None else case.keys)
    rows = cp.layout(case.queries)  # the latest, which is what a rank takes its queries for
    if isinstance(mask, torch.Tensor) and mask.shape[2] > 1:
        mask = gathering.taken(mask, 2, rows.segments(*cp.place))
    options = {"attn_mask": mask, **dict(case.options)}
    communication.sent.clear()
    out = attention(q, k, v, backend=case.backend, parallel=cp, **options)
    forward = _sent(communication.sent)
    out.backward(g)
    both = _sent(communication.sent)
    explained = explain(q, k, v, backend=case.backend, parallel=cp, **options)
    assert explained.chosen == case.backend, explained
    defaults = {"causal": False, "scale": None, "window_size": None, "softcap": None, "dropout_p": 0.0}
    switches = {"deterministic": False, "return_lse": False}
    kind = kind_of_parts(cp, q, k, v, {**defaults, **switches, **options})[1]
    # without a word of the others, a rank can't tell two sequences that have a part as long as this
    kind = replace(kind, query=rows.flat, key=columns.flat, keys=columns.total)
    said = bytes_sent(kind, *cp.place)
    return (forward, both), (_sent(said), _sent(said + bytes_sent(kind, *cp.place, backward=True)))


def _sent(said):
    return {purpose: count for purpose, count in said.items() if count}


def sharding(shape, order, total, lengths=None):
    """That shard, positions and unshard belong together, and their gradients."""
    cp = context(shape, order)
    whole = torch.arange(2 * total, dtype=torch.float64).view(2, total).requires_grad_()
    mine = cp.shard(whole, lengths=lengths)
    positions = cp.positions()
    assert torch.equal(mine, whole[:, positions])
    back = cp.unshard(mine, total=total)
    assert torch.equal(back, whole)
    weights = torch.randn(2, total, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(back, whole, weights)
    assert torch.equal(grad[:, positions], weights[:, positions])
    assert grad.count_nonzero() == weights[:, positions].count_nonzero()
    return positions.tolist()


def unsharded(shape, dtypes):
    """Which of the dtypes come back from ``unshard`` as they were sharded, along either dimension."""
    cp = context(shape)
    back = []
    for name in dtypes:
        whole = torch.arange(2 * 19).view(2, 19).to(getattr(torch, name))
        same = [torch.equal(cp.unshard(cp.shard(x, dim), dim, total=19), x) for x, dim in ((whole, 1), (whole.T, 0))]
        back += [name] if all(same) else []
    return back


def refused(case, changes=None, **wrong):
    """What ``attention`` raises on this rank; ``changes`` are of some ranks alone."""
    cp = context(case.shape, case.order)
    q, k, v, *_ = inputs(case)
    q, k, v = (cp.shard(x).requires_grad_() for x in (q, k, v))
    options = {"backend": case.backend, **dict(case.options), **wrong, **(changes or {}).get(dist.get_rank(), {})}
    cp.shared.kinds.clear()  # what a test before this one has made all agree on
    communication.sent.clear()
    if options.pop("no_gradient", False):
        q, k, v = (x.detach() for x in (q, k, v))
    if case.whole:
        k, v = (x.requires_grad_() for x in inputs(case)[1:3])
        cp = cp.given_whole(case.whole)
    if options.pop("no_query_gradient", False):
        q = q.detach()
    if options.pop("no_batch", False):
        q, k, v = (x[:0] for x in (q, k, v))
    if options.pop("float32", False):
        q, k, v = (x.float() for x in (q, k, v))
    if options.pop("unsharded", False):
        q, k, v, _, _ = inputs(case)
    try:
        attention(q, k, v, parallel=cp, **options)
    except Exception as error:  # noqa: BLE001 - it is what the test asks for
        return type(error).__name__, str(error), sum(communication.sent.values())
    return None, "", sum(communication.sent.values())


def not_finite(case):
    """Whether infinity and NaN among the values reach those who see them, and leave the rest of a result as it is."""
    cp = context(case.shape, case.order)
    q, k, v, _, _ = inputs(case)
    places = torch.zeros_like(v)
    places[:, 2, :, 0] = places[:, 5, :, 1] = places[:, -3, :, 2] = 1.0
    seen = cp.shard(reference(q, k, places, **dict(case.options))[0] > 0)
    v[:, 2, :, 0], v[:, 5, :, 1], v[:, -3, :, 2] = torch.inf, -torch.inf, torch.nan
    expected = cp.shard(reference(q, k, v, **dict(case.options))[0])
    q, k, v = (cp.shard(x) for x in (q, k, v))
    found = attention(q, k, v, backend=case.backend, parallel=cp, **dict(case.options))
    finite = torch.allclose(found[..., 3:], expected[..., 3:], rtol=0, atol=1e-10)
    return finite and torch.allclose(found[seen], expected[seen], equal_nan=True)


def mixed_up(case):
    """What a rank gets that makes one of two calls on which all have agreed, while the others make the other."""
    cp = context(case.shape, case.order)
    q, k, v, *_ = inputs(case)
    q, k, v = (cp.shard(x) for x in (q, k, v))
    for causal in (False, True):
        attention(q, k, v, causal=causal, backend=case.backend, parallel=cp)
    try:
        attention(q, k, v, causal=dist.get_rank() == 1, backend=case.backend, parallel=cp)
    except Exception as error:  # noqa: BLE001 - it is what the test asks for
        return type(error).__name__, str(error)
    return None, ""


def steady(case):
    """How often the ranks speak to each other in five calls of a kind."""
    cp = context(case.shape, case.order)
    q, k, v, _, _ = inputs(case)
    q, k, v = (cp.shard(x) for x in (q, k, v))
    before = cp.shared.exchanges
    for _ in range(5):
        attention(q, k, v, backend=case.backend, parallel=cp)
    return cp.shared.exchanges - before


def unannounced(shape, lengths):
    """Parts that cp was told nothing of."""
    cp = context(shape)
    torch.manual_seed(0)
    total = sum(lengths)
    q = torch.randn(1, total, 4, 8, dtype=torch.float64)
    from attn_core.parallel.layout import Layout

    layout = Layout(tuple((n,) for n in lengths), "zigzag")
    mine = gathering.taken(q, 1, layout.segments(*cp.place))
    out = attention(mine, mine, mine, causal=True, backend="native_math", parallel=cp)
    wanted = gathering.taken(reference(q, q, q, causal=True)[0], 1, layout.segments(*cp.place))
    return (out - wanted).abs().max().item()


def checkpointed(case, reentrant):
    """The largest difference of the gradients of a recomputed call."""
    from torch.utils.checkpoint import checkpoint

    cp = context(case.shape, case.order)
    q, k, v, g, _ = (cp.shard(x) if isinstance(x, torch.Tensor) else x for x in inputs(case))
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def call(q, k, v):
        return attention(q, k, v, backend=case.backend, parallel=cp, **dict(case.options))

    wanted = torch.autograd.grad(call(q, k, v), (q, k, v), g)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    checkpoint(call, *leaves, use_reentrant=reentrant).backward(g)
    return max((a.grad - b).abs().max().item() for a, b in zip(leaves, wanted, strict=True))


def checkpointed_in_a_scope(case, reentrant, forward, backward):
    """What the gradients of a recomputed call differ from, or what is raised; the scope is open around parts of it."""
    from torch.utils.checkpoint import checkpoint

    from attn_core.parallel import scope

    cp = context(case.shape, case.order)
    scope._seen.clear()
    q, k, v, g, _ = (cp.shard(x) if isinstance(x, torch.Tensor) else x for x in inputs(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call(q, k, v):
        return attention(q, k, v, backend=case.backend, **dict(case.options))

    def inside(open_here):
        return use_parallel(cp) if open_here else nullcontext()

    with inside(forward):
        wanted = torch.autograd.grad(call(*leaves), leaves, g)
    with inside(not forward):
        call(*leaves)  # a call of the other sort
    with inside(forward):
        out = checkpoint(call, *leaves, use_reentrant=reentrant)
    with inside(backward):
        try:
            out.backward(g)
        except Exception as error:  # noqa: BLE001 - it is what the test asks for
            return str(error)
    return max((leaf.grad - want).abs().max().item() for leaf, want in zip(leaves, wanted, strict=True))


def autocast(case):
    """The dtype of the result and of what was sent, under autocast to bfloat16."""
    cp = context(case.shape, case.order)
    q, k, v, _, _ = inputs(case)
    q, k, v = (cp.shard(x) for x in (q, k, v))
    communication.sent.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, backend=case.backend, parallel=cp)
    return str(out.dtype), communication.sent["keys"], 2 * (k.numel() + v.numel())


def backward_in_autocast(case, compiler):
    """The largest differences of gradients where autocast to bfloat16 is open around the forward, the backward, or both.

    Compared are those of a call without it of the same tensors, or of tensors that were cast before.
    """
    cp = context(case.shape, case.order)
    q, k, v, g, _ = (cp.shard(x) if isinstance(x, torch.Tensor) else x for x in inputs(case))

    def call(*parts):
        return attention(*parts, backend=case.backend, parallel=cp, **dict(case.options))

    torch._dynamo.reset()
    attend = call if compiler is None else torch.compile(call, fullgraph=True, backend=compiler)

    def gradients(run, forward, backward, dtype=torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward):
            out = run(*leaves)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward):
            return torch.autograd.grad(out, leaves, g.to(out.dtype))

    found = []
    for forward in (False, True):
        wanted = gradients(call, False, False, torch.bfloat16 if forward else torch.float32)
        for backward in (False, True):
            pairs = zip(gradients(attend, forward, backward), wanted, strict=True)
            found.append(max((one.float() - other.float()).abs().max().item() for one, other in pairs))
    return found


def repeated(case):
    """Whether two calls give the same bits, and whether the second changes what the first returned."""
    first = computed(case)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    second = computed(case)
    return all(torch.equal(kept[name], second[name]) and torch.equal(kept[name], first[name]) for name in kept)


def failing(case, rank, how):
    """One rank raises in its kernel, or dies, while the others compute."""
    from attn_core.parallel.preparation import Prepared  # noqa: F401 - loaded before it is patched

    cp = context(case.shape, case.order)
    q, k, v, _, _ = (cp.shard(x) if isinstance(x, torch.Tensor) else x for x in inputs(case))
    attention(q, k, v, backend=case.backend, parallel=cp)
    if dist.get_rank() == rank:
        if how == "dies":
            os._exit(3)

        def broken(*_, **__):
            raise ValueError("the kernel of this rank broke")

        from attn_core import call

        call.attention = broken  # what ulysses calls
        for prepared in cp.shared.kinds.values():
            object.__setattr__(prepared.adapter, "forward", broken)
    attention(q, k, v, backend=case.backend, parallel=cp)


def rounding(case):
    """The errors of results and gradients over ranks, as (root mean square, largest), and those of the kernel on one."""
    found = computed(case)
    if dist.get_rank() != 0:
        return None
    wanted = expected(case)
    q, k, v, g, _ = inputs(case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    alone = attention(*leaves, backend=case.backend, **dict(case.options))
    one = {"out": alone.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(alone, leaves, g), strict=True))}

    def size(error):
        return error.square().mean().sqrt().item(), error.abs().max().item()

    return {name: (size(found[name].double() - wanted[name]), size(one[name].double() - wanted[name])) for name in one}


__all__ = ["agreement", "merge"]
