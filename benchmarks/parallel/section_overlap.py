"""On real GPUs, under torchrun: that the result is right, how fast it is, and how much of the sending is hidden.

Usage: torchrun --nproc-per-node 2 benchmarks/parallel overlap
"""

from __future__ import annotations

import os
import statistics
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from alone import Still
from reporting import keep, table
from torch.distributed.device_mesh import DeviceMesh

from attn_core import AttnError, attention
from attn_core.parallel import ContextParallel, gathering, ring
from attn_core.parallel.communication import Transfer
from attn_core.testing import reference

CASES = {
    "all": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (100, 0)},
    "window both": {"window_size": (70, 50)},
}
LENGTHS = [2048, 4096, 8192, 16384, 32768, 65536]
HEADS = {"equal": (8, 8), "gqa": (8, 2)}


def add_options(parser):
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="of a rank")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=None)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--backends", nargs="+", default=["native_cudnn", "native_flash"], help="that are timed")
    parser.add_argument(
        "--check", nargs="*", default=["native_flash", "native_cudnn", "native_efficient"], help="that are checked"
    )
    parser.add_argument("--rounds", type=int, default=7)


def run(options):
    device, ranks = started()
    contexts = {
        mode: ContextParallel(DeviceMesh(device, ranks, mesh_dim_names=(mode,))) for mode in ("ring", "ulysses")
    }
    contexts["contiguous ring"] = ContextParallel(contexts["ring"].mesh, order="contiguous")
    results = {"options": vars(options), "world": len(ranks), "backend": dist.get_backend()}
    results["checks"] = checks(options, contexts, device)
    results["links"] = links(contexts["ring"], device)
    results["transfer"] = transfer_cost(contexts["ring"], device)
    results["times"] = times(options, contexts, device)
    if dist.get_rank() == 0:
        keep(options.json, "overlap", results)
    dist.destroy_process_group()


def started():
    """Join the ranks that torchrun has started: the type of device, and the numbers of all."""
    local = int(os.environ["LOCAL_RANK"])
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpu else "gloo", **({"device_id": torch.device("cuda", local)} if gpu else {}))
    return "cuda" if gpu else "cpu", torch.arange(dist.get_world_size())


def said(*arguments):
    """Print on one rank."""
    if dist.get_rank() == 0:
        table(*arguments)


# --- is it right ------------------------------------------------------------------------------------------------------


def checks(options, contexts, device):
    """Errors against the float64 reference, beside those of the same kernel on one device."""
    found = []
    for backend in options.check:
        for case, heads_name, length in [(c, h, n) for c in CASES for h in HEADS for n in (512, 517)]:
            tensors = inputs(length, HEADS[heads_name], device)
            wanted = of_reference(tensors, CASES[case])
            alone = attempted(tensors, CASES[case], backend, None)
            for mode, cp in contexts.items():
                spread = attempted(tensors, CASES[case], backend, cp)
                row = {"backend": backend, "case": case, "heads": heads_name, "length": length, "mode": mode}
                if isinstance(spread, str):
                    row["refused"] = spread
                else:
                    row["errors"] = {name: error(spread[name], wanted[name]) for name in wanted}
                    if not isinstance(alone, str):
                        row["alone"] = {name: error(alone[name], wanted[name]) for name in wanted}
                found.append(row)
    said("Against float64: largest error over the largest error of the same kernel on one device", *summary(found))
    return found


def summary(found):
    """Columns and rows: the worst of each backend, mode and kind of sight."""
    rows, places = [], dict.fromkeys((row["backend"], row["mode"], row["case"]) for row in found)
    names = ["out", "lse", "dq", "dk", "dv"]
    for place in places:
        group = [row for row in found if (row["backend"], row["mode"], row["case"]) == place]
        done = [row for row in group if "errors" in row]
        if not done:
            rows.append([*place, f"refused: {group[0]['refused'][:90]}", "", "", "", ""])
            continue
        cells = []
        for name in names:
            worst = max(row["errors"][name] for row in done)
            beside = [row["alone"][name] for row in done if "alone" in row]
            cells.append(f"{worst:.1e}" + (f" ({worst / max(*beside, 1e-30):.2f} x)" if beside else ""))
        rows.append([*place, *cells])
    return ["backend", "mode", "sight", *names], rows


def inputs(length, heads, device):
    """The whole of q, k, v and of a gradient, alike on every rank."""
    random = torch.Generator().manual_seed(length)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    counts = [heads[0], heads[1], heads[1], heads[0]]
    return [torch.randn(2, length, count, 64, generator=random).to(device, dtype) for count in counts]


def of_reference(tensors, how):
    """Out, lse and gradients in float64."""
    *leaves, grad = (tensor.double() for tensor in tensors)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out, lse = reference(*leaves, **how)
    return named(out.detach(), lse, torch.autograd.grad(out, leaves, grad))


def attempted(tensors, how, backend, cp):
    """The same by a backend, spread where there is a ``cp``; or why it is refused."""
    total = tensors[0].shape[1]
    *leaves, grad = tensors if cp is None else [cp.shard(tensor) for tensor in tensors]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    try:
        out, lse = attention(*leaves, return_lse=True, backend=backend, parallel=cp, **how)
        found = named(out.detach(), lse, torch.autograd.grad(out, leaves, grad))
    except AttnError as refusal:
        return str(refusal).splitlines()[0]
    if cp is None:
        return found
    layout = cp.layout(total)
    return {name: gathering.gathered(cp, one, 2 if name == "lse" else 1, layout) for name, one in found.items()}


def named(out, lse, grads):
    """By their names."""
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def error(found, wanted):
    """The largest difference; inf where one is finite and the other is not."""
    finite = wanted.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    return (found - wanted)[finite].abs().max().item()


# --- how fast -----------------------------------------------------------------------------------------------------------


def exchange(cp, sending, receiving):
    """One message each way, under way."""
    transfer = Transfer(cp, tag=1)
    transfer.send(*sending, "links")
    transfer.receive(*receiving)
    transfer.start()
    return transfer


def links(cp, device):
    """Gigabytes a second that a rank sends while it receives as many: round the ring, and all to all."""
    found, rows = [], []
    for size in (2**18, 2**20, 2**22, 2**24, 2**26, 2**28) if device == "cuda" else (2**16, 2**20):
        source, target = (torch.randn(size // 2, device=device).bfloat16() for _ in range(2))
        place, places = cp.place[0], cp.ring
        share = size // 2 // places

        def sends(source=source, target=target, place=place, places=places):
            exchange(cp, (source, (place + 1) % places), (target, (place - 1) % places)).wait()

        def exchanges(source=source, target=target, share=share, places=places):
            dist.all_to_all_single(target[: share * places], source[: share * places], group=cp.group("ring"))

        taken = together({"ring": sends, "all to all": exchanges}, rounds=9, calls=5)
        speed = {"ring": size / taken["ring"] / 1e6, "all to all": share * 2 * (places - 1) / taken["all to all"] / 1e6}
        found.append({"bytes": size, "milliseconds": taken, "gigabytes_per_second": speed})
        rows.append([size / 1e6, taken["ring"], speed["ring"], taken["all to all"], speed["all to all"]])
    said("Links", ["MB", "to the next, ms", "GB/s sent", "all to all, ms", "GB/s sent"], rows)
    return found


def transfer_cost(cp, device):
    """Microseconds on the CPU to post an exchange round the ring, and to wait for it: small, so that nothing else counts."""
    source, target = (torch.randn(16, device=device) for _ in range(2))
    best = {"post": float("inf"), "wait": float("inf")}
    for _ in range(300):
        start = time.perf_counter()
        transfer = exchange(cp, (source, (cp.place[0] + 1) % cp.ring), (target, cp.place[0] - 1))
        posted = time.perf_counter()
        transfer.wait()
        best["post"] = min(best["post"], (posted - start) * 1e6)
        best["wait"] = min(best["wait"], (time.perf_counter() - posted) * 1e6)
        synchronize()
    said("CPU microseconds of a tiny exchange", list(best), [list(best.values())])
    return best


def times(options, contexts, device):
    """Milliseconds of ring and ulysses, of the ring without its sending, and of the whole on one GPU over their number."""
    found = []
    for backend in options.backends:
        for causal in (True, False):
            rows = []
            for tokens in options.tokens:
                try:
                    taken = at_length(options, contexts, backend, causal, tokens, device)
                except (AttnError, torch.OutOfMemoryError) as failure:
                    found.append({"backend": backend, "causal": causal, "tokens": tokens, "failed": str(failure)[:200]})
                    break
                found.append({"backend": backend, "causal": causal, "tokens": tokens, **taken})
                rows += [row_of(tokens, way, taken[way]) for way in ("forward", "both")]
            said(
                f"{backend}, {'causal' if causal else 'all'}, {options.heads} heads of {options.dim}, "
                f"{options.key_heads or options.heads} key heads; milliseconds, x the share of the whole on one GPU",
                [
                    "tokens a rank",
                    "",
                    "share of the whole",
                    "ring",
                    "x",
                    "ring that sends nothing",
                    "x",
                    "ulysses",
                    "x",
                ],
                rows,
            )
    return found


def row_of(tokens, way, taken):
    """The cells of one length and direction."""
    share = taken["share"]
    cells = [cell for name in ("ring", "still", "ulysses") for cell in (taken[name], taken[name] / share)]
    return [tokens, way, share, *cells]


def at_length(options, contexts, backend, causal, tokens, device):
    """Milliseconds by direction and way."""
    world = dist.get_world_size()
    how = {"causal": causal, "backend": backend}
    whole = drawn(options, world * tokens, device)
    parts = drawn(options, tokens, device)
    for cp in contexts.values():
        cp.layout(world * tokens)
    ways = {"share": ways_of(whole, how)}
    ways |= {mode: ways_of(parts, {**how, "parallel": contexts[mode]}) for mode in ("ring", "ulysses")}
    found = {}
    for nth, direction in enumerate(("forward", "both")):
        functions = {name: way[nth] for name, way in ways.items()}
        functions["still"] = without_sending(functions["ring"])
        calls, rounds = (3, options.rounds) if tokens <= 8192 else (1, min(options.rounds, 5))
        found[direction] = together(functions, rounds, calls, warm=1)
        found[direction]["share"] /= world
    return found


def ways_of(tensors, how):
    """Forward without a graph, and forward and backward."""
    *leaves, grad = tensors

    def forward():
        with torch.no_grad():
            attention(*leaves, **how)

    def both():
        torch.autograd.grad(attention(*leaves, **how), leaves, grad)

    return forward, both


def without_sending(function):
    """The same where nothing is sent; what is computed is wrong, and takes as long."""

    def still():
        with sending_nothing():
            function()

    return still


@contextmanager
def sending_nothing():
    """Inside, the ring sends nothing."""
    kept, ring.Transfer = ring.Transfer, Still
    try:
        yield
    finally:
        ring.Transfer = kept


def drawn(options, length, device):
    """Query, key, value that require gradients, and a gradient of the result."""
    heads = [options.heads, options.key_heads or options.heads, options.key_heads or options.heads, options.heads]
    q, k, v, g = (torch.randn(1, length, count, options.dim, device=device, dtype=torch.bfloat16) for count in heads)
    return *(tensor.requires_grad_() for tensor in (q, k, v)), g


def together(functions, rounds, calls, warm=2):
    """The median over rounds of what the slowest rank takes for a call of each, in milliseconds."""
    taken = {name: [] for name in functions}
    for turn in range(warm + rounds):
        for name, function in functions.items():
            dist.barrier()
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize()
            if turn >= warm:
                taken[name].append((time.perf_counter() - start) / calls * 1e3)
    found = {}
    for name, rows in taken.items():
        slowest = torch.tensor(rows, device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found[name] = statistics.median(slowest.tolist())
    return found


def synchronize():
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
