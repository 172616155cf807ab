"""How long things take, those that are compared taking turns."""

from __future__ import annotations

import statistics
import time

import torch

QUEUED_MS, CYCLES_PER_MS = 20.0, 2e6


def milliseconds(functions, rounds=7, calls=1, warm=2, *, queued=False):
    """The median GPU time of a call of each; wall time on a CPU.

    With ``queued`` the GPU is kept busy until all is queued: kernels alone count, and no wait for the CPU between them.
    """
    times = {name: [] for name in functions}
    for turn in range(warm + rounds):
        for name, function in functions.items():
            taken = _events(function, calls, queued) if torch.cuda.is_available() else _clock(function, calls)
            if turn >= warm:
                times[name].append(taken)
    return {name: statistics.median(found) for name, found in times.items()}


def cpu_microseconds(functions, rounds=200, calls=5):
    """The smallest time of this process on the CPU for a call of each; a GPU is drained between rounds."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.process_time()
            for _ in range(calls):
                function()
            best[name] = min(best[name], (time.process_time() - start) / calls * 1e6)
    return best


def _events(function, calls, queued):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if queued:
        torch.cuda._sleep(int(QUEUED_MS * calls * CYCLES_PER_MS))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def _clock(function, calls):
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls * 1e3
