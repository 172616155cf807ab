"""Backends that compile at the first call of a kind: it is said before, and refused while a CUDA graph is captured."""

from __future__ import annotations

import logging

import fake_distributions
import pytest
import torch
from fake_distributions import declaring

from attn_core import CallRefused, attention, call, registry

world = fake_distributions.world

KERNEL = "import torch\ndef forward(query, key, value, *, scale, causal=False):\n    return torch.zeros_like(query)\n"
COMPILING = """'slow', forward='slow_kernel:forward', first_call_compiles=True, constraints=Constraints(
    platforms={'cpu'}, dtypes={'float32'}, masks={'none'}, causal=True)"""


@pytest.fixture
def query(world):
    world.wheel("slow-attn", declaring(COMPILING))
    (world.folders[0] / "slow_kernel.py").write_text(KERNEL)
    registry.refresh()
    yield torch.zeros(1, 4, 2, 8)
    call.forget()


def test_each_kind_says_so_once_before_it_runs(query, caplog):
    with caplog.at_level(logging.INFO, "attn_core"):
        for causal in (False, False, True, True):
            attention(query, query, query, causal=causal, backend="slow")
    said = [record.message for record in caplog.records if "compiles" in record.message]
    assert said == ["slow compiles at the first call of a kind, which can take from seconds to minutes"] * 2


def test_it_is_refused_in_a_capture_until_it_is_warm(query, monkeypatch):
    capturing = [True]
    monkeypatch.setattr(call, "capturing", lambda _: capturing[0])
    with pytest.raises(CallRefused, match=r"slow refused the call.*before the capture"):
        attention(query, query, query, backend="slow")
    capturing[0] = False
    attention(query, query, query, backend="slow")
    capturing[0] = True
    attention(query, query, query, backend="slow")
    with pytest.raises(CallRefused, match="one call of this kind"):
        attention(query, query, query, causal=True, backend="slow")
