"""CPU time of a ring step on top of its kernel: all that Python does while the GPU computes; wanted: 60 microseconds.

A stub stands for the kernel and torch's fake process group for the other ranks. A step is a difference: a ring of many places
over one of two, divided by the steps that it has more.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from alone import place
from reporting import keep, table
from timing import cpu_microseconds

from attn_core import attention
from attn_core.parallel import rows as of_rank

FEW, MANY, LENGTH = 2, 10, 2


def add_options(parser):
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(options):
    results, rows = {}, []
    for causal in (False, True):
        for merging in (True, False):
            found = {places: measured(options, places, causal, merging) for places in (FEW, MANY)}
            step = {
                way: (found[MANY][way] - found[FEW][way]) / (MANY - FEW) - found[FEW][f"{way} kernel"]
                for way in ("forward", "backward")
            }
            name = f"{'causal' if causal else 'all'}, {'with' if merging else 'without'} the merge"
            results[name] = {"step": step, "calls": found}
            exchange = found[FEW]["exchange"]
            rows.append(
                [name, step["forward"], step["backward"], exchange, found[FEW]["forward"], found[FEW]["backward"]]
            )
    table(
        f"CPU microseconds of a ring step on top of its kernel, tiny tensors on {options.device}; wanted: 60",
        [
            "",
            "forward",
            "backward",
            "one `batch_isend_irecv`, waited for",
            f"whole call of {FEW} places, forward",
            "backward",
        ],
        rows,
    )
    keep(options.json, "step", results)


def measured(options, places, causal, merging):
    """Microseconds of a forward and of a backward, and of the kernels alone, which do nothing."""
    kept = of_rank.merge
    if not merging:
        of_rank.merge = lambda *_: None
    with place(0, places, device=options.device) as cp:
        cp.layout(places * LENGTH)
        tensor = torch.randn(1, LENGTH, 1, 8, device=options.device, dtype=torch.bfloat16)
        leaf = tensor.clone().requires_grad_()
        how = {"causal": causal, "backend": "native_math", "parallel": cp}
        for given in (tensor, leaf):
            attention(given, given, given, **how)
        adapters = [prepared.adapter for prepared in cp.shared.kinds.values()]
        real = [(adapter.forward, adapter.backward) for adapter in adapters]
        forward = stub_of(tensor)
        install(adapters, [(forward, backward)] * len(adapters))
        out = attention(leaf, leaf, leaf, **how)
        found = cpu_microseconds(
            {
                "forward": lambda: attention(tensor, tensor, tensor, **how),
                "backward": lambda: torch.autograd.grad(out, leaf, tensor, retain_graph=True),
                "exchange": lambda: exchange(cp, tensor),
                "forward kernel": lambda: forward(tensor, tensor, tensor, scale=1.0),
                "backward kernel": lambda: backward(tensor, tensor, tensor, tensor, tensor, tensor, scale=1.0),
            },
            options.rounds,
        )
        install(adapters, real)
    of_rank.merge = kept
    return found


def exchange(cp, tensor):
    """What torch.distributed takes for one message each way, as a step of a forward has; a backward has two in one exchange."""
    group = cp.group("ring")
    operations = [dist.P2POp(dist.isend, tensor, 1, group), dist.P2POp(dist.irecv, tensor, 1, group)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def stub_of(tensor):
    """A kernel that does nothing, and returns results of the right shape."""
    lse = torch.zeros(1, 1, LENGTH, device=tensor.device)
    whole, half = (tensor, lse), (tensor[:, : LENGTH // 2].contiguous(), lse[..., : LENGTH // 2].contiguous())

    def forward(query, key, value, **options):
        return whole if query.shape[1] == LENGTH else half

    return forward


def backward(grad_out, query, key, value, out, lse, **options):
    """The same of the gradients."""
    return query, key, value


def install(adapters, functions):
    """Have backends run other functions."""
    for adapter, (forward, back) in zip(adapters, functions, strict=True):
        object.__setattr__(adapter, "forward", forward)
        object.__setattr__(adapter, "backward", back)
