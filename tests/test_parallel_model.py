"""The model on paper of the benchmarks, on made-up times and links whose answers can be computed by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

HEADS, DIM, RATE, SPEED, LATENCY = 16, 128, 4e-12, 100e9, 10e-6


@pytest.fixture
def section_model(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks" / "parallel")
    yield importlib.import_module("section_model")
    for name in ("section_model", "reporting"):
        sys.modules.pop(name)


def measured():
    """A step takes RATE s^2 seconds forward and twice as many backward; a link LATENCY and a second for SPEED bytes."""
    times = [
        {
            "backend": "made_up", "causal": causal, "tokens": tokens,
            "forward": {"still": 2 * RATE * tokens**2 * 1e3}, "both": {"still": 6 * RATE * tokens**2 * 1e3},
        }
        for causal in (True, False) for tokens in (1024, 4096, 16384)
    ]  # fmt: skip
    links = [
        {"bytes": size, "milliseconds": dict.fromkeys(("ring", "all to all"), (LATENCY + size / SPEED) * 1e3)}
        for size in (2**18, 2**24, 2**28)
    ]
    options = {"heads": HEADS, "key_heads": None, "dim": DIM}
    return {"machine": {}, "results": {"options": options, "world": 2, "times": times, "links": links}}


def test_a_ring_hides_its_messages_where_a_step_takes_as_long(section_model):
    found = section_model.predicted(measured(), None, [100], 0.0, 8)
    row = next(
        row for row in found["hides"] if (row["link"], row["way"], row["causal"]) == ("NVLink", "forward", "causal")
    )
    each = HEADS * 2 * DIM * 2 / SPEED  # seconds of a message for each token
    wanted = (each + (each**2 + 4 * RATE * LATENCY) ** 0.5) / (2 * RATE)
    assert row["tokens"] == pytest.approx(wanted, rel=0.02)
    assert row["ranks"][-1] == pytest.approx(2**20 / wanted, rel=0.03)


def test_backward_messages_are_three_times_those_of_the_forward(section_model):
    found = section_model.predicted(measured(), None, [100], 0.0, 8)
    forward, backward = (
        next(row["tokens"] for row in found["hides"] if row["way"] == way and row["link"].startswith("Ethernet"))
        for way in ("forward", "backward")
    )
    assert backward / forward == pytest.approx(3 / 2, rel=0.02)  # three times the bytes behind twice the work


def test_ways_are_compared_with_the_share_of_the_whole(section_model):
    found = section_model.predicted(measured(), None, [100], 0.0, 8)
    rows = {(row["tokens"], row["ranks"]): row for row in found["fastest"]}
    assert rows[2**20, 8]["ring"] == pytest.approx(1.0)
    assert rows[2**20, 8]["fastest"] == "ring"
    whole = 3 * RATE * (2**14) ** 2 / 8
    sent = 7 * (2**14 / 8) * (HEADS / 8 + HEADS / 8) * 2 * DIM * 2
    assert rows[2**14, 8]["ulysses"] == pytest.approx(1 + 2 * (LATENCY + sent / (SPEED / 2)) / whole, rel=0.05)
    assert rows[2**14, 32]["ulysses"] == "too few heads"
