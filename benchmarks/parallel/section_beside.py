"""Side by side on real GPUs: this ring, those of ring-flash-attention, yunchang and torch; causal, in zigzag order.

Usage: torchrun --nproc-per-node 4 benchmarks/parallel beside

Each pair is on one kernel: flash-attn 2 where the other is welded to it, torch's own kernels beside torch's context parallel.
What is not installed has no row; what fails has one that says so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from reporting import keep, table
from section_overlap import drawn, error, named, started, synchronize, together
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_core import attention
from attn_core.parallel import ContextParallel
from attn_core.testing import reference

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = ("out", "dq", "dk", "dv")
TORCH = {"native_flash": SDPBackend.FLASH_ATTENTION, "native_cudnn": SDPBackend.CUDNN_ATTENTION}
CHECKED = 2048
"""Positions of the whole sequence on which errors are measured."""


def add_options(parser):
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536], help="of a rank")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=None)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--backends", nargs="+", default=["flash", "native_flash", "native_cudnn"])
    parser.add_argument("--rounds", type=int, default=5)


def run(options):
    device, ranks = started()
    ring = ContextParallel(DeviceMesh(device, ranks, mesh_dim_names=("ring",)))
    ulysses = ContextParallel(DeviceMesh(device, ranks, mesh_dim_names=("ulysses",)))
    found, columns = [], ["backend", "tokens a rank", "", "forward", "x attn", "both", "x attn", "MiB", *PARTS]
    for backend in options.backends:
        rows = []
        in_zigzag = {"attn, ring": Way(partial(ours, backend, ring)), **rings(backend, ring.mesh)}
        in_order = {"attn, ulysses": Way(partial(ours, backend, ulysses)), **ulysses_of_yunchang(backend)}
        ways = in_zigzag | in_order
        errors = {
            name: tried(partial(errors_of, options, ring if name in in_zigzag else ulysses, way, device))
            for name, way in ways.items()
        }
        works = {name: way for name, way in ways.items() if not isinstance(errors[name], str)}
        for tokens in options.tokens:
            taken = measured(options, (ring, ulysses), works, tokens, device) if works else {}
            for name in ways:
                row = {"backend": backend, "tokens": tokens, "way": name, "errors": errors[name], **taken.get(name, {})}
                found.append(row)
                rows.append(cells(row, taken.get("attn, ring")))
        if dist.get_rank() == 0:
            table(
                f"{len(ranks)} ranks, causal, {options.heads} heads of {options.dim}, bfloat16; milliseconds of the slowest "
                f"rank, MiB at most above the inputs with backward, largest error of {CHECKED} positions against float64",
                columns,
                rows,
            )
    if dist.get_rank() == 0:
        keep(options.json, "beside", {"options": vars(options), "world": len(ranks), "rows": found})
    dist.destroy_process_group()


def cells(row, beside):
    """The row of a table."""
    start = [row["backend"], row["tokens"], row["way"]]
    if isinstance(row["errors"], str):
        return [*start, row["errors"][:120], *[""] * 8]
    times = [cell for way in ("forward", "both") for cell in (row[way], row[way] / beside[way] if beside else "")]
    return [*start, *times, f"{row['peak']:.0f}", *(f"{row['errors'][part]:.1e}" for part in PARTS)]


# --- who is compared ----------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """One of those that are compared: a function of a rank's query, key and value, and what its calls are made within."""

    run: Callable[..., torch.Tensor]
    within: Callable[[], AbstractContextManager[object]] = nullcontext


def ours(backend, cp, q, k, v):
    """That of this project."""
    return attention(q, k, v, causal=True, backend=backend, parallel=cp)


def rings(backend, mesh):
    """Rings of others that have this kernel, of what is installed."""
    if backend in TORCH:
        return {
            f"torch, {rotate}": Way(sdpa, partial(torch_ring, TORCH[backend], rotate, mesh))
            for rotate in ("allgather", "alltoall")
        }
    modules = (
        {"ring-flash-attention": "ring_flash_attn", "yunchang, ring": "yunchang.ring"} if backend == "flash" else {}
    )
    with suppress(
        ImportError
    ):  # the adapter of ring-flash-attention 0.1.8 imports a name that transformers 5 has no more
        flash = import_module("transformers.modeling_flash_attention_utils")
        flash.is_flash_attn_greater_or_equal_2_10 = getattr(flash, "is_flash_attn_greater_or_equal_2_10", lambda: True)
    found = {}
    for name, module in modules.items():
        try:
            function = import_module(module).zigzag_ring_flash_attn_func
        except ImportError as error:
            said(f"{name}: {error}")
        else:
            found[name] = Way(partial(function, causal=True, group=dist.group.WORLD))
    return found


def ulysses_of_yunchang(backend):
    """That of yunchang, for flash-attn 2."""
    if backend != "flash":
        return {}
    try:
        layer = import_module("yunchang").UlyssesAttention(dist.group.WORLD)
    except ImportError as error:
        said(f"yunchang, ulysses: {error}")
        return {}
    return {"yunchang, ulysses": Way(partial(layer, causal=True))}


@contextmanager
def torch_ring(kernel, rotate, mesh):
    """``torch.distributed.tensor.experimental.context_parallel``; its order is ours, and parts are given to it as they are."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotate)
    order = torch.empty(2 * mesh.size(), device=mesh.device_type)
    with context_parallel(mesh, buffers=[order], buffer_seq_dims=[0]), sdpa_kernel(kernel):
        yield


def sdpa(q, k, v):
    """SDPA, of whatever is in force."""
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def said(text):
    """Print on one rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def tried(function):
    """What it returns, or what it says where any rank fails."""
    try:
        found = function()
    except Exception as error:  # noqa: BLE001 - it is what the table shows
        found = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, found)
    return next((one for one in told if isinstance(one, str)), found)


# --- what is measured ---------------------------------------------------------------------------------------------------


def errors_of(options, cp, way, device):
    """The largest error of result and gradients."""
    random = torch.Generator().manual_seed(0)
    heads = options.heads, options.key_heads or options.heads
    counts = (heads[0], heads[1], heads[1], heads[0])
    whole = [torch.randn(1, CHECKED, count, options.dim, generator=random).to(device).bfloat16() for count in counts]
    leaves = [tensor.double().requires_grad_() for tensor in whole[:3]]
    right, _ = reference(*leaves, causal=True)
    wanted = named(right.detach(), None, torch.autograd.grad(right, leaves, whole[3].double()))
    *inputs, grad = (cp.shard(tensor).contiguous() for tensor in whole)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    with way.within():
        out = way.run(*inputs)
        found = named(out.detach(), None, torch.autograd.grad(out, inputs, grad))
    errors = {}
    for part in PARTS:
        largest = torch.tensor(error(found[part].double(), cp.shard(wanted[part])), device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        errors[part] = largest.item()
    return errors


def measured(options, contexts, ways, tokens, device):
    """Milliseconds forward and with backward of each, taking turns, and MiB."""
    *leaves, grad = drawn(options, tokens, device)
    for cp in contexts:  # or its ranks would ask one another at each call
        cp.layout(dist.get_world_size() * tokens)
    calls = 3 if tokens <= 8192 else 1
    found = {name: {} for name in ways}
    for direction in ("forward", "both"):
        functions = {
            name: partial(once, way, leaves, grad if direction == "both" else None) for name, way in ways.items()
        }
        for name, taken in together(functions, options.rounds, calls, warm=2).items():
            found[name][direction] = taken
        if direction == "both":
            for name, function in functions.items():
                found[name]["peak"] = peak(function, device)
    return found


def once(way, leaves, grad):
    """Forward without a graph, or forward and backward where there is a gradient."""
    with way.within():
        if grad is None:
            with torch.no_grad():
                way.run(*leaves)
        else:
            torch.autograd.grad(way.run(*leaves), leaves, grad)


def peak(function, device):
    """The most MiB of any rank above what there was before."""
    if device != "cuda":
        return 0.0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    synchronize()
    most = torch.tensor((torch.cuda.max_memory_allocated() - before) / 2**20, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()
