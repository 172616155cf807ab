"""A model on paper: from measured kernel times and link speeds, where a ring hides what it sends, and which way is the fastest.

Usage: python benchmarks/parallel model overlap.json

What is measured, by ``overlap`` on two GPUs: a ring's time when it sends nothing, by tokens of a rank; half of that is a step.
A link takes a latency and a time for each byte, fitted to what was measured; Ethernet's are given. Then, with s tokens a rank
at P = R x U ranks and chunks of C bytes (keys) or C and their gradients (backward),

    ring      R steps, and what a step's message takes longer than the step, R - 1 times
    ulysses   1/P of the whole, and the exchanges of heads, nothing of which is hidden
    hybrid    ulysses inside a node, the ring between nodes: a step is that of a ring with U times the tokens and 1/U of the heads

The ring hides its messages where a step takes as long as they do. In a step work grows with the square of s and bytes with s,
so that it does from some s on, whatever P: a sequence of S tokens may then be spread over S / s ranks.
"""

from __future__ import annotations

import importlib
import json
from bisect import bisect_left
from math import exp, isfinite, log, log2
from pathlib import Path
from typing import NamedTuple

from reporting import keep, table

WAYS = ("forward", "backward")
WORLDS = [2, 4, 8, 16, 32, 64]
TOTALS = [2**14, 2**16, 2**18, 2**20]


class Link(NamedTuple):
    """What a message takes: seconds, and bytes a second."""

    latency: float
    speed: float

    def seconds(self, size):
        """For a message of so many bytes."""
        return self.latency + size / self.speed if size else 0.0


class Steps(NamedTuple):
    """Seconds of one ring step by tokens of a rank, measured, for so many query and key heads."""

    points: tuple[tuple[int, float], ...]
    heads: int
    key_heads: int
    dim: int

    def work(self, tokens):
        """What grows with the square of the tokens, from the longest step measured."""
        most, seconds = self.points[-1]
        return seconds * (tokens / most) ** 2

    def seconds(self, tokens):
        """Between the points by a straight line in logarithms; beyond them the work; before them the shortest measured."""
        places = [place for place, _ in self.points]
        if tokens >= places[-1]:
            return self.work(tokens)
        if tokens <= places[0]:
            return self.points[0][1]  # what a launch takes
        after = bisect_left(places, tokens)
        (low, low_time), (high, high_time) = self.points[after - 1], self.points[after]
        share = log(tokens / low) / log(high / low)
        return exp((1 - share) * log(low_time) + share * log(high_time))


def add_options(parser):
    parser.add_argument("measured", help="what `overlap --json` has written")
    parser.add_argument("--backend", help="one of those measured; the first where not given")
    parser.add_argument(
        "--ethernet", type=float, nargs="+", default=[100, 400], help="gigabits a second, for a GPU each"
    )
    parser.add_argument("--ethernet-latency", type=float, default=20e-6, help="seconds")
    parser.add_argument("--node", type=int, default=8, help="GPUs that share the fast link")
    parser.add_argument("--plot", help="write a picture to this file; needs matplotlib")


def run(options):
    measured = json.loads(Path(options.measured).read_text())
    results = predicted(measured, options.backend, options.ethernet, options.ethernet_latency, options.node)
    name = measured["machine"].get("gpu", "a CPU")
    table(
        f"Tokens a rank from which a ring hides what it sends, {results['backend']} on {name}, {results['heads']} heads of "
        f"{results['dim']}, {results['key_heads']} key heads; and ranks that sequences may then be spread over",
        ["link", "GB/s", "", "", "tokens a rank", *(f"of {total:,}" for total in TOTALS)],
        [
            [row["link"], row["speed"], row["causal"], row["way"], row["tokens"], *row["ranks"]]
            for row in results["hides"]
        ],
    )
    table(
        f"Fastest way, causal, forward and backward, {options.node} GPUs a node: time over 1/P of the whole",
        ["tokens", "ranks", "link between nodes", "ring", "ulysses", "hybrid", "fastest"],
        [list(row.values()) for row in results["fastest"]],
    )
    keep(options.json, "model", results)
    if options.plot:
        plot(options.plot, results)


def predicted(measured, backend, ethernet, ethernet_latency, node):
    """All that the tables and the picture show."""
    found = measured["results"]
    backend = backend or found["times"][0]["backend"]
    fast = fitted([(row["bytes"], row["milliseconds"]["ring"] / 1e3) for row in found["links"]])
    exchange = fitted([(row["bytes"] // 2, row["milliseconds"]["all to all"] / 1e3) for row in found["links"]])
    slow = {f"Ethernet, {gigabits:g} Gb/s": Link(ethernet_latency, gigabits / 8 * 1e9) for gigabits in ethernet}
    links = {"NVLink": fast, **slow}
    steps = {(causal, way): steps_of(measured, backend, causal, way) for causal in (True, False) for way in WAYS}
    some = steps[True, "forward"]
    hides = [
        {
            "link": name,
            "speed": link.speed / 1e9,
            "causal": "causal" if causal else "all",
            "way": way,
            "tokens": round(tokens) if isfinite(tokens) else "never",
            "ranks": [int(total // tokens) for total in TOTALS],
        }
        for name, link in links.items()
        for (causal, way), step in steps.items()
        for tokens in [hidden_from(step, link, way)]
    ]
    curves = {
        f"{name}, {way}": [
            (tokens, message(some, link, tokens, way) / steps[True, way].seconds(tokens)) for tokens in grid(some, 8)
        ]
        for name, link in links.items()
        for way in WAYS
    }
    fastest = [
        compared([steps[True, way] for way in WAYS], (fast, exchange, link), total, world, node, name)
        for name, link in slow.items()
        for total in TOTALS
        for world in WORLDS
    ]
    shape = {"heads": some.heads, "key_heads": some.key_heads, "dim": some.dim}
    return {"backend": backend, **shape, "links": links, "hides": hides, "curves": curves, "fastest": fastest}


def fitted(points):
    """The latency and the speed that the smallest and the largest message tell."""
    (small, quick), (large, long) = min(points), max(points)
    if long <= quick:
        msg = (
            f"links: {large} bytes took {long} s and {small} took {quick}: measure on a machine that does nothing else"
        )
        raise SystemExit(msg)
    speed = (large - small) / (long - quick)
    return Link(max(quick - small / speed, 0.0), speed)


def steps_of(measured, backend, causal, way):
    """A ring of ``world`` places that sends nothing takes as many steps."""
    found, given = measured["results"], measured["results"]["options"]
    rows = [row for row in found["times"] if row["backend"] == backend and row["causal"] == causal and "both" in row]
    forward = {row["tokens"]: row["forward"]["still"] / 1e3 for row in rows}
    both = {row["tokens"]: row["both"]["still"] / 1e3 for row in rows}
    taken = forward if way == "forward" else {tokens: both[tokens] - forward[tokens] for tokens in both}
    points = sorted((tokens, seconds / found["world"]) for tokens, seconds in taken.items())
    return Steps(tuple(points), given["heads"], given["key_heads"] or given["heads"], given["dim"])


def message(steps, link, tokens, way, ulysses=1):
    """Seconds that the messages of a step take: keys, and in the backward keys and float32 gradients."""
    elements = tokens * max(steps.key_heads / ulysses, 1) * 2 * steps.dim
    return link.seconds(elements * 2) + (link.seconds(elements * 4) if way == "backward" else 0.0)


def hidden_from(steps, link, way):
    """The tokens a rank from which on a step takes as long as its messages; the fewest measured where it always does."""
    hidden = float("inf")
    for tokens in reversed(grid(steps, 64)):
        if message(steps, link, tokens, way) > steps.seconds(tokens):
            break
        hidden = tokens
    return hidden


def compared(steps, links, total, world, node, name):
    """Times over 1/P of the whole, of each way; 1 is ideal."""
    fast, exchange, slow = links
    share = world * sum(step.work(total / world) for step in steps)
    inside = min(world, node)
    outside = world // inside
    found = {
        "ring": ring_time(steps, slow if world > node else fast, total, world, 1) / share,
        "ulysses": 1.0 + exchange_time(steps[0], exchange if world <= node else slow, total / world, world) / share,
        "hybrid": "",
    }
    if outside > 1:
        exchanged = exchange_time(steps[0], exchange, total / world, inside)
        found["hybrid"] = (exchanged + ring_time(steps, slow, total, outside, inside)) / share
    possible = {way: time for way, time in found.items() if time != ""}
    if steps[0].heads % world:
        found["ulysses"] = "too few heads"
        possible.pop("ulysses")
    return {
        "tokens": total, "ranks": world, "link": name if world > node else "", **found,
        "fastest": min(possible, key=possible.get),
    }  # fmt: skip


def ring_time(steps, link, total, places, ulysses):
    """Seconds of a ring, forward and backward: a step of a place with U ranks has its tokens, and 1/U of the heads."""
    tokens, found = total / places, 0.0
    for way, step in zip(WAYS, steps, strict=True):
        taken = max(step.seconds(tokens) / ulysses, step.points[0][1])
        found += places * taken + (places - 1) * max(0.0, message(step, link, tokens, way, ulysses) - taken)
    return found


def exchange_time(steps, link, tokens, places):
    """Seconds of the exchanges of heads: there and back, in the forward and in the backward."""
    elements = (places - 1) * tokens * (steps.heads / places + max(steps.key_heads / places, 1)) * 2 * steps.dim
    return 2 * link.seconds(elements * 2)


def grid(steps, octave):
    """Tokens a rank, from the fewest that were measured to 1,048,576, so many to an octave."""
    lowest = log2(steps.points[0][0])
    return [2 ** (lowest + nth / octave) for nth in range(int((20 - lowest) * octave) + 1)]


def plot(path, results):
    """How long messages take over the step that hides them."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, curve in results["curves"].items():
        axes.loglog(*zip(*curve, strict=True), label=name, base=10)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("tokens a rank")
    axes.set_ylabel("messages over the step that hides them")
    axes.set_title(f"{results['backend']}, causal, forward and backward, {results['heads']} heads of {results['dim']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
