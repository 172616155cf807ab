"""Merging partial results over the time to move their bytes; wanted: 1.25 x."""

from __future__ import annotations

import time

import torch
from reporting import keep, table
from timing import milliseconds

from attn_core.parallel import merge


def add_options(parser):
    parser.add_argument("--shape", type=int, nargs=4, default=[1, 8192, 16, 128], metavar=("B", "S", "H", "D"))
    parser.add_argument("--tune", action="store_true", help="try several sizes of a program's block")


def run(options):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, length, heads, dim = options.shape
    out = torch.randn(batch, length, heads, dim, device=device)
    lse, part_lse = (torch.randn(batch, heads, length, device=device) for _ in range(2))
    part = torch.randn(batch, length, heads, dim, device=device, dtype=torch.bfloat16)
    half = slice(length // 2, length)
    start = time.perf_counter()
    merge.merge_(out, lse, part, part_lse)
    if device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    rows = {
        "all rows": (out, lse, part, part_lse),
        "the second half": (
            out[:, half],
            lse[:, :, half],
            part[:, half].contiguous(),
            part_lse[..., half].contiguous(),
        ),
    }
    results = {"device": device, "first_call_seconds": first, "rows": {}}
    for name, tensors in rows.items():
        results["rows"][name] = measured(tensors, options.tune and device == "cuda")
    table(
        f"Merging bfloat16 into float32, {tuple(options.shape)} on {device}; the first call took {first:.2f} s",
        ["rows", "MB moved", "copying as many, ms", "`merge_`, ms", "x", "in several passes, ms", "x", "wanted"],
        [
            [
                name,
                found["bytes"] / 1e6,
                found["copy"],
                found["merge_"],
                found["merge_"] / found["copy"],
                found["several passes"],
                found["several passes"] / found["copy"],
                1.25,
            ]
            for name, found in results["rows"].items()
        ],
    )
    for name, found in results["rows"].items():
        tried = {key: value / found["copy"] for key, value in found.items() if key.startswith("rows=")}
        if tried:
            print(f"\n{name}: " + ", ".join(f"{key}: {value:.3f} x" for key, value in tried.items()))
    keep(options.json, "merge", results)


def measured(tensors, tune):
    """Milliseconds by form, and of a copy that moves as many bytes, half of them read and half written."""
    out, lse, part, part_lse = tensors
    moved = 2 * size(out) + 2 * size(lse) + size(part) + size(part_lse)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=out.device).random_()
    target = torch.empty_like(source)
    functions = {
        "copy": lambda: target.copy_(source),
        "merge_": lambda: merge.merge_(*tensors),
        "several passes": lambda: merge._eager(*tensors),
    }
    if tune:
        functions |= {f"rows={count}": _with_rows(tensors, count) for count in (2, 4, 8, 16, 32)}
    found = milliseconds(functions, rounds=25, calls=10 if out.is_cuda else 1)
    return {"bytes": moved, **found}


def size(tensor):
    return tensor.numel() * tensor.element_size()


def _with_rows(tensors, count):
    from attn_core.parallel import fused

    def merged():
        kept, fused.ROWS = fused.ROWS, count
        fused.merge_(*tensors)
        fused.ROWS = kept

    return merged
