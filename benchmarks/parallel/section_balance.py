"""The busiest rank's GPU time, merges included, over 1/P of the whole; causal, rank by rank on one GPU, no communication.

Wanted: 1.12 forward, 1.08 forward and backward, in zigzag order.
"""

from __future__ import annotations

import torch
from alone import place
from reporting import keep, table
from timing import milliseconds

from attn_core import AttnError, attention

WANTED = {"forward": 1.12, "both": 1.08}


def add_options(parser):
    parser.add_argument("--tokens", type=int, default=8192, help="of a rank")
    parser.add_argument("--places", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=None)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--backends", nargs="+", default=["native_flash", "native_cudnn", "native_efficient"])
    parser.add_argument("--orders", nargs="+", default=["zigzag", "contiguous"])
    parser.add_argument("--rounds", type=int, default=7)


def run(options):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results, rows = [], []
    for backend in options.backends:
        for places in options.places:
            try:
                whole = times_of_whole(options, backend, places, device)
                for order in options.orders:
                    ranks = [times_of_rank(options, backend, places, order, rank, device) for rank in range(places)]
                    results.append(
                        {"backend": backend, "places": places, "order": order, "whole": whole, "ranks": ranks}
                    )
                    rows.append([backend, places, order, *figures(whole, ranks, places)])
            except AttnError as error:
                print(f"{backend}: {str(error).splitlines()[0]}")
                break
    table(
        f"Busiest rank over 1/P of the whole: causal, {options.tokens} tokens a rank, {options.heads} heads of "
        f"{options.dim}, bfloat16 on {device}; milliseconds",
        ["backend", "P", "order", "whole / P", "busiest", "forward x", "whole / P, both", "busiest, both", "both x"],
        rows,
    )
    print(f"\nWanted in zigzag order: {WANTED['forward']} forward, {WANTED['both']} forward and backward")
    keep(options.json, "balance", {"options": vars(options), "rows": results})


def figures(whole, ranks, places):
    """The cells of a row."""
    found = []
    for way in ("forward", "both"):
        share, busiest = whole[way] / places, max(rank[way] for rank in ranks)
        found += [share, busiest, busiest / share]
    return found


def times_of_whole(options, backend, places, device):
    """Milliseconds of the call on one device."""
    return timed(options, drawn(options, places * options.tokens, device), {"backend": backend}, device)


def times_of_rank(options, backend, places, order, rank, device):
    """Milliseconds of what one rank computes."""
    with place(rank, places, order, device, still=True) as cp:
        cp.layout(places * options.tokens)
        return timed(options, drawn(options, options.tokens, device), {"backend": backend, "parallel": cp}, device)


def timed(options, tensors, how, device):
    """Milliseconds forward, and forward and backward."""
    *leaves, grad = tensors

    def forward():
        with torch.no_grad():
            attention(*leaves, causal=True, **how)

    def both():
        torch.autograd.grad(attention(*leaves, causal=True, **how), leaves, grad)

    return milliseconds(
        {"forward": forward, "both": both}, rounds=options.rounds, calls=3 if device == "cuda" else 1, queued=True
    )


def drawn(options, length, device):
    """Query, key, value that require gradients, and a gradient of the result."""
    heads = [options.heads, options.key_heads or options.heads, options.key_heads or options.heads, options.heads]
    q, k, v, g = (torch.randn(1, length, count, options.dim, device=device, dtype=torch.bfloat16) for count in heads)
    return *(tensor.requires_grad_() for tensor in (q, k, v)), g
