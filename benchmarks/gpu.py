"""On a GPU: the CPU cost of a tiny call of each named torch kernel, and kernel time at the shapes of real models.

Usage: python benchmarks/gpu.py
"""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager

import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_core import attention, plan, set_backend

KERNELS = {
    "native_flash": SDPBackend.FLASH_ATTENTION,
    "native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "native_cudnn": SDPBackend.CUDNN_ATTENTION,
}
SHAPES = {"FLUX": (1, 4608, 24, 128), "Wan": (1, 32760, 12, 128), "8 x 2048": (8, 2048, 16, 128)}


def sdpa(q, k, v):
    """SDPA on the same (B, S, H, D) tensors, transposes included."""
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def cpu_microseconds(functions, calls=200, rounds=30):
    """Smallest CPU time per call of each, the functions taking turns; the GPU is drained between rounds."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            best[name] = min(best[name], (time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return best


def gpu_milliseconds(functions, rounds=12):
    """Median kernel time of each from CUDA events, the functions taking turns, five calls a group."""
    times = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(5):
                function()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) / 5)
    return {name: statistics.median(found) for name, found in times.items()}


def tiny_calls():
    q, k, v = (torch.randn(1, 16, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    plans = {name: plan(q, k, v, backend=name) for name in KERNELS}
    functions = {"SDPA": lambda: sdpa(q, k, v)}
    for name in KERNELS:
        functions[name] = lambda name=name: attention(q, k, v, backend=name)
        functions[f"{name}, planned"] = lambda name=name: plans[name](q, k, v)
    set_backend("native")
    functions["native"] = lambda: attention(q, k, v)
    for name, kernel in KERNELS.items():

        def inside(kernel=kernel):
            with sdpa_kernel(kernel):
                return sdpa(q, k, v)

        functions[f"SDPA inside sdpa_kernel, {name.removeprefix('native_')}"] = inside
    with torch.no_grad():
        found = cpu_microseconds(functions)
    print("CPU cost of a tiny call, microseconds")
    for name, taken in found.items():
        print(f"  {name:<36}{taken:8.1f}   {taken / found['SDPA']:5.2f} x SDPA")
    print("\nThe same beside SDPA with all other kernels switched off in the process, so that it has this one")
    for name in KERNELS:
        with only(name), torch.no_grad():
            pair = cpu_microseconds({"SDPA": functions["SDPA"], name: functions[name]})
        print(f"  {name:<36}{pair[name]:8.1f} over {pair['SDPA']:6.1f}   {pair[name] / pair['SDPA']:5.2f} x SDPA")


@contextmanager
def only(name):
    """Have SDPA one kernel to choose from, by torch's switches; attn's named backends do not ask them."""
    switches = {
        "native_flash": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        "native_efficient": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        "native_cudnn": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        "math": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    }
    before = {other: enabled() for other, (enabled, _) in switches.items()}
    for other, (_, enable) in switches.items():
        enable(other == name)
    try:
        yield
    finally:
        for other, (_, enable) in switches.items():
            enable(before[other])


def model_shapes():
    print("\nKernel time, ms: attn, torch's kernel called directly, and their ratio")
    for shape_name, shape in SHAPES.items():
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for name, kernel in KERNELS.items():

            def direct(q=q, k=k, v=v, kernel=kernel):
                with sdpa_kernel(kernel):
                    return sdpa(q, k, v)

            with torch.no_grad():
                found = gpu_milliseconds(
                    {"attn": lambda q=q, k=k, v=v, name=name: attention(q, k, v, backend=name), "torch": direct}
                )
            ratio = found["attn"] / found["torch"]
            print(f"  {shape_name:<10}{name:<18}{found['attn']:9.3f}{found['torch']:9.3f}{ratio:8.3f}")


def main():
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, sm{properties.major}{properties.minor}, torch {torch.__version__}, bf16\n")
    tiny_calls()
    model_shapes()


if __name__ == "__main__":
    main()
