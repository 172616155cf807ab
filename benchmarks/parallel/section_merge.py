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
    result, *others = (drawn(options.shape, torch.bfloat16, device) for _ in range(merge.AT_ONCE + 1))
    whole = drawn(options.shape, torch.float32, device)
    start = time.perf_counter()
    merge.merge([whole, others[0]], *whole)
    if device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    half = batch, length // 2, heads, dim
    rows = {
        "one into a float32 sum": ([whole, others[0]], whole),
        "three into a float32 sum": ([whole, *others[:3]], whole),
        "three into the second half": (
            [second_half(whole), *(drawn(half, torch.bfloat16, device) for _ in range(3))],
            second_half(whole),
        ),
        "four, to bfloat16": (others[:4], result),
    }
    results = {"device": device, "first_call_seconds": first, "rows": {}}
    for name, tensors in rows.items():
        results["rows"][name] = measured(tensors, options.tune and device == "cuda")
    table(
        f"Merging bfloat16 results, {tuple(options.shape)} on {device}; the first call took {first:.2f} s",
        ["parts", "MB moved", "copying as many, ms", "`merge`, ms", "x", "in several passes, ms", "x", "wanted"],
        [
            [
                name,
                found["bytes"] / 1e6,
                found["copy"],
                found["merge"],
                found["merge"] / found["copy"],
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


def drawn(shape, dtype, device):
    """A result and its lse."""
    batch, length, heads, _ = shape
    return torch.randn(shape, device=device, dtype=dtype), torch.randn(batch, heads, length, device=device)


def second_half(part):
    """The later rows of a result and its lse."""
    out, lse = part
    return out[:, out.shape[1] // 2 :], lse[:, :, out.shape[1] // 2 :]


def measured(tensors, tune):
    """Milliseconds by form, and of a copy that moves as many bytes, half of them read and half written."""
    parts, (out, lse) = tensors
    moved = sum(tensor.numel() * tensor.element_size() for part in (*parts, (out, lse)) for tensor in part)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=out.device).random_()
    target = torch.empty_like(source)
    functions = {
        "copy": lambda: target.copy_(source),
        "merge": lambda: merge.merge(parts, out, lse),
        "several passes": lambda: in_several_passes(parts, out, lse),
    }
    if tune:
        functions |= {f"rows={count}": _with_rows(parts, out, lse, count) for count in (2, 4, 8, 16, 32)}
    found = milliseconds(functions, rounds=25, calls=10 if out.is_cuda else 1, queued=True)
    return {"bytes": moved, **found}


def in_several_passes(parts, out, lse):
    """The form without the kernel."""
    kept, merge._fused_for = merge._fused_for, lambda _: None
    merge.merge(parts, out, lse)
    merge._fused_for = kept


def _with_rows(parts, out, lse, count):
    from attn_core.parallel import fused

    def merged():
        kept, fused.ROWS = fused.ROWS, count
        fused.merge(parts, out, lse)
        fused.ROWS = kept

    return merged
