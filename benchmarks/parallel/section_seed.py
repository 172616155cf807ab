"""Side by side in one run, gloo on a CPU: this ring, the templated ring of diffusers, and yunchang's where it is installed.

None of the others has a kernel that rings on a CPU: diffusers' own for it returns no log-sum-exp, yunchang's and
ring-flash-attention's are for GPUs. So all of them are given the same kernel, torch's flash attention for the CPU, and what is
compared is the rings. yunchang has no backward for kernels of torch, and ring-flash-attention can't be imported without
flash-attn.
"""

from __future__ import annotations

import importlib
import statistics
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from processes import on_ranks
from reporting import keep, table
from section_bytes import mesh_of, peak
from torch.profiler import ProfilerActivity, profile

from attn_core import attention, loading, registry
from attn_core.parallel import ContextParallel
from attn_core.testing import reference

FORWARD_ALONE = ("yunchang",)  # its backward raises with messages under way, which then reach others
PARTS = ("out", "dq", "dk", "dv")


def add_options(parser):
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of the whole sequence")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)


def run(options):
    given = {name: value for name, value in vars(options).items() if name not in ("json", "section")}
    by_rank = on_ranks(options.world, "section_seed:measured", given)
    results = by_rank[0]
    for dtype, found in results["times"].items():
        rows = []
        for name, one in found.items():
            times = {way: slowest(by_rank, dtype, name, way) for way in one["ms"]}
            beside = {way: taken / slowest(by_rank, dtype, "attn", way) for way, taken in times.items()}
            cells = [found.get(way, "") for way in ("forward", "both") for found in (times, beside)]
            cells += [one["peak"].get(way, "") for way in ("forward", "backward")]
            errors = one["errors"]
            rows.append([name, *cells, *(f"{errors[part]:.1e}" if part in errors else "" for part in PARTS)])
        table(
            f"{options.world} ranks, {options.tokens} positions, {options.heads} heads of {options.dim}, {dtype}, not causal; "
            "milliseconds of the slowest rank, MiB above the inputs, largest error against float64",
            ["", "forward", "x attn", "both", "x attn", "peak forward", "peak backward", *PARTS],
            rows,
        )
    table(
        "What else is asked",
        ["", "causal", "GQA", "causal and GQA"],
        [[name, *row] for name, row in results["asked"].items()],
    )
    keep(options.json, "seed", by_rank)


def slowest(by_rank, dtype, name, way):
    """The median over rounds of the slowest rank's time."""
    rounds = zip(*(rank["times"][dtype][name]["ms"][way] for rank in by_rank), strict=True)
    return statistics.median(map(max, rounds))


# --- on each rank -------------------------------------------------------------------------------------------------------


def measured(given):
    """Times, peaks, errors; and what each says to calls that the table has not."""
    options = SimpleNamespace(**given)
    cp = ContextParallel(mesh_of((options.world, 1)), order="contiguous")
    rings = {"attn": attn_ring(cp), "diffusers": seed_ring(options.world)}
    yunchang = yunchang_ring()
    if yunchang is not None:
        rings["yunchang"] = yunchang
    times = {dtype: side_by_side(options, cp, rings, getattr(torch, dtype)) for dtype in options.dtypes}
    asked = {
        name: [answer(options, cp, ring, *one) for one in ((True, 1), (False, 4), (True, 4))]
        for name, ring in rings.items()
    }
    return {"times": times, "asked": asked}


def attn_ring(cp):
    """That of this project."""
    return lambda q, k, v, causal=False, **_: attention(q, k, v, causal=causal, backend="native_flash", parallel=cp)


def seed_ring(world):
    """That of diffusers, with torch's kernel for the CPU as its operators want it."""
    from diffusers.models import attention_dispatch as seed
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ring_degree=world)
    config.setup(dist.get_rank(), world, torch.device("cpu"), mesh)
    parallel = ParallelConfig(context_parallel_config=config)
    kernel = loading.load(registry.find("native_flash").spec)

    def forward_op(
        ctx, query, key, value, mask, dropout_p, causal, scale, gqa, return_lse, *, _save_ctx, _parallel_config
    ):
        if _save_ctx:
            ctx.save_for_backward(query, key, value)
        out, lse = kernel.forward(query, key, value, scale=query.shape[-1] ** -0.5, return_lse=True)
        return out, lse.transpose(1, 2)

    def backward_op(ctx, grad_out, *, query, key, value, out, lse):
        lse = lse.transpose(1, 2).contiguous()
        return kernel.backward(grad_out, query, key, value, out, lse, scale=query.shape[-1] ** -0.5)

    def ring(q, k, v, causal=False, gqa=False):
        return seed._templated_context_parallel_attention(
            q, k, v, is_causal=causal, enable_gqa=gqa, forward_op=forward_op, backward_op=backward_op,
            _parallel_config=parallel,
        )  # fmt: skip

    return ring


def yunchang_ring():
    """That of yunchang for kernels of torch, given the one for the CPU; None where it is not installed."""
    try:
        module = importlib.import_module("yunchang.ring.ring_pytorch_attn")
    except ImportError:
        return None
    kernel = loading.load(registry.find("native_flash").spec)

    def forward(q, k, v, softmax_scale, causal):
        hidden = {"causal": True} if causal else {}
        return kernel.forward(q, k, v, scale=softmax_scale, return_lse=True, **hidden)

    module.pytorch_attn_forward = forward
    return lambda q, k, v, causal=False, **_: module.ring_pytorch_attn_func(
        q, k, v, causal=causal, group=dist.group.WORLD
    )


def side_by_side(options, cp, rings, dtype):
    """Milliseconds of each round, peaks and errors of each ring, taking turns on the same tensors."""
    whole, wanted = problem(options, dtype)
    q, k, v, g = (cp.shard(tensor).contiguous() for tensor in whole)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    found = {name: {"ms": {}, "peak": {}, "errors": {}} for name in rings}
    ways = {}
    for name, ring in rings.items():
        out = ring(q, k, v)
        found[name]["errors"]["out"] = error(cp, out, wanted["out"])
        ways[name] = {"forward": without_graph(ring, leaves)}
        found[name]["peak"] = peaks(ring, leaves, None if name in FORWARD_ALONE else g)
        if name in FORWARD_ALONE:
            continue
        grads = torch.autograd.grad(out, leaves, g)
        found[name]["errors"] |= {
            part: error(cp, one, wanted[part]) for part, one in zip(PARTS[1:], grads, strict=True)
        }
        ways[name]["both"] = lambda ring=ring: torch.autograd.grad(ring(q, k, v), leaves, g)
    for turn in range(options.rounds + 1):
        for name, way in ways.items():
            for direction, function in way.items():
                dist.barrier()
                start = time.perf_counter()
                function()
                if turn:
                    found[name]["ms"].setdefault(direction, []).append((time.perf_counter() - start) * 1e3)
    return found


def problem(options, dtype):
    """The whole of q, k, v and a gradient, and float64's answers."""
    torch.manual_seed(0)
    whole = [torch.randn(1, options.tokens, options.heads, options.dim).to(dtype) for _ in range(4)]
    leaves = [tensor.double().requires_grad_() for tensor in whole[:3]]
    out, _ = reference(*leaves)
    grads = torch.autograd.grad(out, leaves, whole[3].double())
    return whole, dict(zip(PARTS, (out.detach(), *grads), strict=True))


def without_graph(ring, leaves):
    """The forward alone."""

    def forward():
        with torch.no_grad():
            ring(*leaves)

    return forward


def peaks(ring, leaves, grad):
    """MiB above what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        out = ring(*leaves)
    if grad is None:
        return {"forward": peak(forward) / 2**20}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        torch.autograd.grad(out, leaves, grad)
    return {"forward": peak(forward) / 2**20, "backward": peak(backward) / 2**20}


def error(cp, part, wanted):
    """The largest difference of any rank."""
    largest = (part.detach().double() - cp.shard(wanted)).abs().max()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def answer(options, cp, ring, causal, group):
    """Whether such a call is computed right, or what it says."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 256, heads, options.dim) for heads in (8, 8 // group, 8 // group))
    try:
        out = ring(*(cp.shard(tensor).contiguous() for tensor in (q, k, v)), causal=causal, gqa=group > 1)
    except Exception as refusal:  # noqa: BLE001 - it is what the table shows
        return f"{type(refusal).__name__}: {refusal}"[:90]
    wanted, _ = reference(q, k, v, causal=causal)
    difference = error(cp, out, wanted)
    return f"right ({difference:.0e})" if difference < 1e-4 else f"wrong by {difference:.1g}"
