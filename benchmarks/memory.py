"""Whether a call makes a dense (Sq, Skv) tensor where its kernel does not need one.

Usage: python benchmarks/memory.py
"""

from __future__ import annotations

import sys

import torch
from torch.profiler import ProfilerActivity, profile

from attn_core import AttnError, KeyPadding, attention

LENGTH, HEADS, HEAD_DIM = 2048, 4, 64


def largest_allocation(device: str, **options: object) -> int:
    """The largest single allocation of a call, in bytes."""
    q = torch.randn(1, LENGTH, HEADS, HEAD_DIM, device=device)
    attention(q, q, q, **options)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as recorded:
        attention(q, q, q, **options)
    return max((event.cpu_memory_usage for event in recorded.events()), default=0)


def main() -> None:
    device = "cpu"
    keep = torch.ones(1, LENGTH, dtype=torch.bool)
    keep[:, : LENGTH // 3] = False
    calls = {
        "no mask": {},
        "causal": {"causal": True},
        "window (256, 0)": {"causal": True, "window_size": (256, -1)},
        "key padding": {"attn_mask": KeyPadding(keep)},
    }
    dense = LENGTH * LENGTH
    result = LENGTH * HEADS * HEAD_DIM * 4
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {device}, float32")
    print(f"B 1, S {LENGTH}, H {HEADS}, D {HEAD_DIM}")
    print(f"one dense bool mask: {dense / 2**20:.1f} MiB; the result: {result / 2**20:.1f} MiB\n")
    for backend in ("native", "native_flash"):
        for name, options in calls.items():
            try:
                found = f"{largest_allocation(device, backend=backend, **options) / 2**20:8.1f} MiB"
            except AttnError as error:
                found = f"refused: {str(error).split('. ')[0]}"
            print(f"  {backend:<14}{name:<18}{found}")


if __name__ == "__main__":
    main()
