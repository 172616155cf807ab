"""Backends that compile at the first call of a kind: it is said before, refused in a CUDA graph, and made ahead by a plan."""

from __future__ import annotations

import logging

import fake_distributions
import pytest
import torch
from fake_distributions import declaring

from attn_core import CallRefused, attention, call, cli, plan, registry, warming

world = fake_distributions.world

KERNEL = """
import torch
CALLS = []
def forward(query, key, value, *, scale, causal=False, return_lse=False):
    CALLS.append("forward")
    return (query * 1.0, query.new_zeros(query.shape[:3]).transpose(1, 2)) if return_lse else query * 1.0
def backward(grad_out, query, key, value, out, lse, *, scale, causal=False):
    CALLS.append("backward")
    return grad_out, torch.zeros_like(key), torch.zeros_like(value)
"""
COMPILING = """'slow', forward='slow_kernel:forward', backward='slow_kernel:backward', autograd='core', first_call_compiles=True,
    constraints=Constraints(
        platforms={'cpu'}, dtypes={'float32'}, masks={'none'}, causal=True, lse=True, backward=True)"""
SAID = "slow compiles at the first call of a kind, which can take from seconds to minutes"
SAID_OF_BACKWARD = SAID.replace("first call", "first backward")


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
    assert said == [SAID] * 2


def test_it_is_refused_in_a_capture_until_it_is_warm(query, monkeypatch):
    capturing = [True]
    monkeypatch.setattr(warming, "capturing", lambda _: capturing[0])
    with pytest.raises(CallRefused, match=r"slow refused the call.*before the capture"):
        attention(query, query, query, backend="slow")
    capturing[0] = False
    attention(query, query, query, backend="slow")
    capturing[0] = True
    attention(query, query, query, backend="slow")
    with pytest.raises(CallRefused, match="one call of this kind"):
        attention(query, query, query, causal=True, backend="slow")


def calls():
    import slow_kernel

    return slow_kernel.CALLS


def test_a_backward_that_is_cold_is_said_and_refused_too(query, monkeypatch, caplog):
    capturing = [False]
    monkeypatch.setattr(warming, "capturing", lambda _: capturing[0])
    query.requires_grad_()
    out = attention(query, query, query, backend="slow")
    capturing[0] = True
    with pytest.raises(CallRefused, match=r"slow refused the backward.*Make one backward of this kind"):
        out.sum().backward()
    capturing[0] = False
    with caplog.at_level(logging.INFO, "attn_core"):
        for _ in range(2):
            attention(query, query, query, backend="slow").sum().backward()
    assert [record.message for record in caplog.records] == [SAID_OF_BACKWARD]
    capturing[0] = True
    attention(query, query, query, backend="slow").sum().backward()


@pytest.mark.parametrize("gradients", [False, True])
def test_a_plan_is_warm(query, gradients, monkeypatch, caplog):
    query.requires_grad_(gradients)
    with caplog.at_level(logging.INFO, "attn_core"):
        planned = plan(query, query, query, backend="slow")
    made = ["forward", "backward"] if gradients else ["forward"]
    assert calls() == made
    assert [record.message for record in caplog.records] == [SAID, SAID_OF_BACKWARD][: len(made)]
    assert query.grad is None
    caplog.clear()
    monkeypatch.setattr(warming, "capturing", lambda _: True)
    with caplog.at_level(logging.INFO, "attn_core"):
        for run in (
            planned,
            plan(query, query, query, backend="slow"),
            lambda *given: attention(*given, backend="slow"),
        ):
            out = run(query, query, query)
            if gradients:
                out.sum().backward()
    assert calls() == made * 4  # the second plan made none of its own
    assert not caplog.records


def test_a_plan_made_in_a_capture_is_refused_while_any_part_is_cold(query, monkeypatch):
    attention(query, query, query, backend="slow")
    query.requires_grad_()
    attention(query, query, query, backend="slow")
    monkeypatch.setattr(warming, "capturing", lambda _: True)
    with pytest.raises(CallRefused, match="slow refused the backward"):
        plan(query, query, query, backend="slow")
    assert calls() == ["forward"] * 2


def test_a_plan_draws_no_random_numbers(query):
    before = torch.get_rng_state()
    plan(query, query, query, backend="slow")
    assert torch.equal(torch.get_rng_state(), before)


def test_other_plans_compute_nothing(world):
    world.wheel("slow-attn", declaring(COMPILING.replace("first_call_compiles=True,", "")))
    (world.folders[0] / "slow_kernel.py").write_text(KERNEL)
    registry.refresh()
    plan(*[torch.zeros(1, 4, 2, 8)] * 3, backend="slow")
    assert calls() == []
    call.forget()


def test_probing_says_before_what_compiles(query, capsys):
    cli.main(["list-backends", "--probe"])
    assert f"{SAID}\n" in capsys.readouterr().err
    assert not logging.getLogger("attn_core").handlers
