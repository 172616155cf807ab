"""Every kernel that runs here, side by side: its time, attn over the bare library, key padding, and memory.

Usage: python benchmarks/kernels.py [--backends a,b] [--sections cpu,padding,memory,time] [--out kernels.json]
       python benchmarks/kernels.py --table kernels.json          the tables of a file, as markdown
       python benchmarks/kernels.py --plot kernels.json out.png   its plot (needs matplotlib)

A further run into the same file is added to it, as for a library that can't be installed beside another. On a machine
without a GPU, ``--device cpu --shapes tiny`` runs the whole command on small tensors, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import clocks
import libraries
import tables
import torch
from torch.profiler import ProfilerActivity, profile

from attn_core import KeyPadding, attention, list_backends, plan

SHAPES = {
    # name: (B, Sq, Skv, H, D), causal, whether with the backward
    "32, 512, 16, 128": ((32, 512, 512, 16, 128), False, True),
    "8, 2048, 16, 128": ((8, 2048, 2048, 16, 128), False, True),
    "8, 2048, 16, 128 causal": ((8, 2048, 2048, 16, 128), True, True),
    "2, 8192, 16, 128": ((2, 8192, 8192, 16, 128), False, True),
    "1, 16384, 16, 128 causal": ((1, 16384, 16384, 16, 128), True, True),
    "4, 4096, 32, 64": ((4, 4096, 4096, 32, 64), False, True),
    "4, 4096, 8, 256": ((4, 4096, 4096, 8, 256), False, True),
    "FLUX 1, 4608, 24, 128": ((1, 4608, 4608, 24, 128), False, True),
    "Wan 1, 32760, 12, 128": ((1, 32760, 32760, 12, 128), False, False),
    "SDXL self 2, 4096, 10, 64": ((2, 4096, 4096, 10, 64), False, True),
    "SDXL cross 2, 4096 x 77, 10, 64": ((2, 4096, 77, 10, 64), False, True),
}
"""Those of the page on the libraries; bf16."""
TINY = {
    "2, 64, 2, 64": ((2, 64, 64, 2, 64), False, True),
    "2, 64, 2, 64 causal": ((2, 64, 64, 2, 64), True, True),
    "cross 2, 64 x 7, 2, 64": ((2, 64, 7, 2, 64), False, False),
}
PADDED = {"standard": (8, 2048, 16, 128), "tiny": (2, 64, 2, 64)}
MEMORY = {"standard": (1, 8192, 8, 64), "tiny": (1, 256, 2, 64)}
SMALL = (1, 16, 2, 64)
LEFT_OUT = {"flex", "native_math", "chunked"}
"""Only where they are named: one compiles for long, two are no fused kernels."""
BACKWARD_OVER_FORWARD = 3.5
FORWARD, TRAINED = "forward", "forward + backward"


class Results:
    """The file, written after each row group, so that a run that ends early leaves what it had."""

    def __init__(self, path, environment):
        self.path = path
        runs = json.loads(path.read_text()) if path is not None and path.exists() else []
        self.rows = []
        self.runs = [*runs, {"environment": environment, "rows": self.rows}]

    def add(self, section, **row):
        """Note one row, and say it."""
        self.rows.append({"section": section, **row})
        print("  " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps(self.runs, indent=1) + "\n")


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else value


def environment(device):
    """Where it was measured, with every version that may matter."""
    names = (
        "torch", "triton", "flash-attn", "flash-attn-4", "nvidia-cutlass-dsl", "xformers", "sageattention", "diffusers",
        "attn-core", "attn-native", "attn-flash", "attn-xformers", "attn-sage",
    )  # fmt: skip
    found = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "dtype": "bfloat16",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name} (sm{properties.major}{properties.minor})"
        found["cudnn"] = torch.backends.cudnn.version()
    else:
        found["device"] = f"{platform.machine()} CPU"
    return {**found, "versions": {name: item for name in names if (item := _version(name))}}


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def usable(names, results):
    """The backends to measure: those named, or all of this repository that answer a tiny call here."""
    chosen = []
    for row in list_backends(probe=names is None):
        if names is None and row.status == "works" and row.name not in LEFT_OUT:
            chosen.append(row.name)
        elif names is None and row.status not in {"missing", "unsupported"} and row.name not in LEFT_OUT:
            results.add("backends", backend=row.name, error=f"{row.status}: {row.reason}")
    return names or chosen


def drawn(shape, device):
    """Query, key and value, and a gradient of the result."""
    batch, queries, keys, heads, dim = shape
    lengths = (queries, keys, keys, queries)
    return [torch.randn(batch, length, heads, dim, device=device, dtype=torch.bfloat16) for length in lengths]


def training(function, tensors, grad_out):
    """One forward and its backward."""
    return torch.autograd.grad(function(*tensors), tensors, grad_out)


def tried(function, device):
    """None where a call works, else why it does not. What compiles at its first call does so here."""
    try:
        function()
        clocks.synchronize(device)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is what its row says
        if device.type == "cuda":
            torch.cuda.empty_cache()
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0].split('. Accepted here by')[0][:240]}"
    return None


def contestants(names, device, causal):
    """(backend, who) and the function of query, key and value: attn, the library by itself, the seed."""
    for name in names:
        yield (name, "attn"), partial(attention, backend=name, causal=causal)
        for who, find in (("library", lambda name: libraries.bare(name, device)), ("seed", libraries.seed)):
            try:
                call = find(name)
            except (ImportError, LookupError):
                continue
            yield (name, who), partial(call, causal=causal)


def kernel_times(results, names, options):
    """Section "time": kernel time at each shape, attn and the library taking turns."""
    for label, (shape, causal, differentiated) in options.shapes.items():
        for case in (FORWARD, TRAINED) if differentiated else (FORWARD,):
            if options.over():
                results.add("time", shape=label, case=case, error="not measured: the time was up")
                continue
            _one_shape(results, names, options, label, shape, causal=causal, case=case)


def _one_shape(results, names, options, label, shape, *, causal, case):
    *tensors, grad_out = drawn(shape, options.device)
    if case == TRAINED:
        tensors = [tensor.requires_grad_() for tensor in tensors]
    functions = {}
    with torch.set_grad_enabled(case == TRAINED):
        for key, call in contestants(names, options.device, causal):
            function = partial(training, call, tensors, grad_out) if case == TRAINED else partial(call, *tensors)
            reason = tried(function, options.device)
            if reason is None:
                functions[key] = function
            else:
                results.add("time", shape=label, case=case, backend=key[0], who=key[1], error=reason)
        times = clocks.kernel_milliseconds(functions, options.device, options.rounds)
    for (name, who), taken in times.items():
        found = clocks.median(taken)
        row = {"ms": found, "tflops": operations(shape, causal, case) / found / 1e9}
        if who != "attn" and (name, "attn") in times:
            row["attn_over_this"] = clocks.ratio(times[name, "attn"], taken)
        results.add("time", shape=label, case=case, backend=name, who=who, **row)


def operations(shape, causal, case):
    """4 B Sq Skv H D, half of it for causal, 3.5 times with the backward."""
    batch, queries, keys, heads, dim = shape
    whole = 4 * batch * queries * keys * heads * dim / (2 if causal else 1)
    return whole * (BACKWARD_OVER_FORWARD if case == TRAINED else 1)


def call_costs(results, names, options):
    """Section "cpu": CPU time of a tiny call of the library, of attn, of a plan and of the seed."""
    q, k, v = (torch.randn(SMALL, device=options.device, dtype=torch.bfloat16) for _ in range(3))
    for name in names:
        functions = {}
        with torch.no_grad():
            for (_, who), call in contestants([name], options.device, False):
                function = partial(call, q, k, v)
                reason = tried(function, options.device)
                if reason is None:
                    functions[who] = function
                else:
                    results.add("cpu", backend=name, who=who, error=reason)
            if "attn" not in functions:
                continue
            functions["plan"] = partial(plan(q, k, v, backend=name), q, k, v)
            found = clocks.call_microseconds(functions, options.device, rounds=options.rounds * 2)
        for who, taken in found.items():
            over = {} if "library" not in found else {"over_library": taken - found["library"]}
            results.add("cpu", backend=name, who=who, microseconds=taken, **over)


def padded_lengths(batch, length, even, device):
    """Half of all keys are padding, on the right: as much of each sequence, or from an eighth to seven eighths of it."""
    shares = torch.full((batch,), 0.5) if even else torch.linspace(0.125, 0.875, batch)
    kept = (shares * length).round()[:, None]
    return (torch.arange(length)[None] < kept).to(device)


def padded_calls(results, names, options):
    """Section "padding": key padding at 50 % through each backend, beside the best dense masked call of torch."""
    batch, length, heads, dim = PADDED[options.size]
    shape = (batch, length, length, heads, dim)
    for even in (False, True):
        label = f"{batch}, {length}, {heads}, {dim}, {'even' if even else 'uneven'} lengths"
        for case in (FORWARD, TRAINED):
            if options.over():
                results.add("padding", shape=label, case=case, error="not measured: the time was up")
                continue
            keep = padded_lengths(batch, length, even, options.device)
            _one_padding(results, names, options, label, shape, keep, case)


def _one_padding(results, names, options, label, shape, keep, case):
    *tensors, grad_out = drawn(shape, options.device)
    if case == TRAINED:
        tensors = [tensor.requires_grad_() for tensor in tensors]
    padding = KeyPadding(keep)
    natives = (
        ("native_efficient", "native_cudnn", "native_flash") if options.device.type == "cuda" else ("native_math",)
    )
    calls = {("dense", name): libraries.masked(name, keep) for name in natives}
    calls |= {("attn", name): partial(attention, attn_mask=padding, backend=name) for name in names}
    functions = {}
    with torch.set_grad_enabled(case == TRAINED):
        for key, call in calls.items():
            function = partial(training, call, tensors, grad_out) if case == TRAINED else partial(call, *tensors)
            reason = tried(function, options.device)
            if reason is None:
                functions[key] = function
            else:
                results.add("padding", shape=label, case=case, who=key[0], backend=key[1], error=reason)
        times = clocks.kernel_milliseconds(functions, options.device, options.rounds)
    dense = {key: clocks.median(taken) for key, taken in times.items() if key[0] == "dense"}
    best = min(dense, key=dense.get, default=None)
    for key, taken in times.items():
        faster = {} if best is None else {"dense_over_this": clocks.ratio(times[best], taken), "best_dense": best[1]}
        results.add("padding", shape=label, case=case, who=key[0], backend=key[1], ms=clocks.median(taken), **faster)


def memory(results, names, options):
    """Section "memory": the most memory that one call takes beside its inputs."""
    batch, length, heads, dim = MEMORY[options.size]
    keep = padded_lengths(batch, length, True, options.device)
    masks = {
        "none": {},
        "causal": {"causal": True},
        "window (256, 0)": {"window_size": (256, 0)},
        "key padding": {"attn_mask": KeyPadding(keep)},
        "float (1, 1, Sq, Skv)": {
            "attn_mask": torch.randn(length, length, device=options.device, dtype=torch.bfloat16)[None, None]
        },
        "float (1, 1, 1, Skv)": {
            "attn_mask": torch.randn(1, 1, 1, length, device=options.device, dtype=torch.bfloat16)
        },
    }
    shape = f"{batch}, {length}, {heads}, {dim}"
    for case in (FORWARD, TRAINED):
        *tensors, grad_out = drawn((batch, length, length, heads, dim), options.device)
        if case == TRAINED:
            tensors = [tensor.requires_grad_() for tensor in tensors]
        sizes = {"result_bytes": grad_out.numel() * 2, "dense_bool_bytes": length * length}
        for name in names:
            for mask, given in masks.items():
                call = partial(attention, backend=name, **given)
                run = partial(training, call, tensors, grad_out) if case == TRAINED else partial(call, *tensors)
                row = {"shape": shape, "case": case, "mask": mask, "backend": name}
                with torch.set_grad_enabled(case == TRAINED):
                    reason = tried(run, options.device)
                    found = {"error": reason} if reason else {"peak_bytes": peak(run, options.device), **sizes}
                results.add("memory", **row, **found)


def peak(call, device):
    """Bytes that a call takes at most, its result included: on a GPU in sum, else its largest allocation."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    return max((event.cpu_memory_usage for event in recorded.events()), default=0)


SECTIONS = {"time": kernel_times, "cpu": call_costs, "padding": padded_calls, "memory": memory}


class Options:
    """What the command line says, for the sections."""

    def __init__(self, given):
        self.device = torch.device(given.device)
        self.size = given.shapes
        self.shapes = TINY if given.shapes == "tiny" else SHAPES
        self.rounds = given.rounds
        self._end = time.monotonic() + given.limit

    def over(self):
        """Whether the time is up."""
        return time.monotonic() > self._end


def parsed(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backends", help="names, separated by commas; else all that work here but " + ", ".join(LEFT_OUT)
    )
    parser.add_argument("--sections", default="cpu,padding,memory,time")
    parser.add_argument("--out", type=Path, help="a JSON file; a run is added to those that it has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=("standard", "tiny"), default="standard")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which no further shape is begun")
    parser.add_argument("--table", type=Path, metavar="JSON", help="measure nothing, print this file's tables")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "PNG"), help="measure nothing, draw this file")
    return parser.parse_args(arguments)


def main(arguments=None):
    given = parsed(arguments)
    if given.table or given.plot:
        if given.table:
            print(tables.markdown(json.loads(given.table.read_text())))
        if given.plot:
            tables.draw(json.loads(given.plot[0].read_text()), given.plot[1])
        return
    options = Options(given)
    results = Results(given.out, environment(options.device))
    names = usable(given.backends.split(",") if given.backends else None, results)
    for section in given.sections.split(","):
        print(f"{section}: {', '.join(names)}", flush=True)
        SECTIONS[section](results, names, options)
    print("\n" + tables.markdown(results.runs))


if __name__ == "__main__":
    sys.exit(main())
