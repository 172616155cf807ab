"""What the ranks of the pool make of a backend that the kit has a word on, too."""

from __future__ import annotations

import sys

import torch
from parallel_work import Case, context, expected, inputs

from attn_core import AttnError, attention, registry
from attn_core.parallel import gathering
from attn_core.testing.checks.parallel import RANKS, SLACK
from attn_core.testing.tolerances import bounds


def install(*folders):
    """Put wheels on the path of this rank."""
    sys.path[:0] = folders
    registry.refresh()


def held(name, shape, dtype, causal, gradient):
    """How far a backend's results over ranks are off, in parts of what the kit allows; or why it refuses."""
    case = Case(shape=shape, queries=48, heads=(6, 3), dtype=dtype, backend=name, options=(("causal", causal),))
    cp = context(shape)
    q, k, v, g, _ = inputs(case)
    parts = [cp.shard(x).requires_grad_(gradient) for x in (q, k, v)]
    try:
        out, lse = attention(*parts, causal=causal, return_lse=True, backend=name, parallel=cp)
    except AttnError as error:
        return str(error)
    found = {"out": (out.detach(), 1)} | ({"lse": (lse, 2)} if shape[0] > 1 else {})
    if gradient:
        gradients = torch.autograd.grad(out, parts, cp.shard(g))
        found = {name: (grad, 1) for name, grad in zip(("dq", "dk", "dv"), gradients, strict=True)}
    whole = {name: gathering.gathered(cp, tensor, dim, cp.layout(48)) for name, (tensor, dim) in found.items()}
    allowed = bounds(q, k, v, grad_out=g, causal=causal)
    allowed = {"out": allowed.out, "lse": allowed.lse, "dq": allowed.query, "dk": allowed.key, "dv": allowed.value}
    wanted = expected(case)
    return max(((whole[n] - wanted[n]).abs() / (SLACK * RANKS * allowed[n])).max().item() for n in whole)
