"""Times of functions that take turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time

import torch

GROUP_MS, MOST_CALLS = 4.0, 20
"""How long one group of calls is to take, and how many calls it has at most."""
CYCLES_PER_MS = 2e6


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Events:
    """Kernel time of a group: the GPU is kept busy until all of it is queued, so that launching costs nothing."""

    def __init__(self, function, device):
        self.function, self.device = function, device
        synchronize(device)
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin = time.perf_counter()
        started.record()
        function()
        ended.record()
        queueing = (time.perf_counter() - begin) * 1e3
        torch.cuda.synchronize(device)
        self.calls = int(min(max(GROUP_MS / max(started.elapsed_time(ended), 1e-3), 1), MOST_CALLS))
        self.wait = int(min(queueing * self.calls * 2, 50.0) * CYCLES_PER_MS)

    def once(self):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.wait)
        started.record()
        for _ in range(self.calls):
            self.function()
        ended.record()
        torch.cuda.synchronize(self.device)
        return started.elapsed_time(ended) / self.calls


class _Wall:
    """The same on a machine without events."""

    def __init__(self, function, _):
        self.function = function

    def once(self):
        begin = time.perf_counter()
        self.function()
        return (time.perf_counter() - begin) * 1e3


def kernel_milliseconds(functions, device, rounds):
    """Per function the time of each round, a first round left out; the functions take turns."""
    kind = _Events if device.type == "cuda" else _Wall
    groups = {name: kind(function, device) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, group in groups.items():
            taken = group.once()
            if turn:
                times[name].append(taken)
    return times


def median(times):
    return statistics.median(times)


def ratio(times, others):
    """Median of the ratios within each round, which drifts of the clock do not touch."""
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def call_microseconds(functions, device, calls=200, rounds=30):
    """Smallest CPU time of a call of each, the functions taking turns; the GPU is drained between them."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            best[name] = min(best[name], (time.perf_counter() - begin) / calls * 1e6)
    synchronize(device)
    return best
