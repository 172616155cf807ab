"""A wheel written against version 1 works as the core changes: tests/frozen holds it, and is never edited."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

import attn_core
from attn_core import CallRefused, KeyPadding, attention, call, declaration, loading, registry
from attn_core.declaration import Constraints, No
from attn_core.testing import check_backend, reference
from attn_core.testing.kit import FAILED

FROZEN = Path(__file__).parent / "frozen"
OPTIONS = {"scale", "attn_mask", "causal", "softcap", "deterministic", "return_lse"}
"""What the frozen forward takes by keyword."""


@pytest.fixture(autouse=True)
def frozen(monkeypatch):
    """The frozen wheel, where an installer would have put it."""
    monkeypatch.syspath_prepend(str(FROZEN))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    registry.refresh()
    yield
    monkeypatch.undo()
    registry.refresh()


def tensors(keys=7, dtype=torch.float32, *, grad=False):
    random = torch.Generator().manual_seed(0)
    sizes = ((2, 5, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8))
    return [torch.randn(size, generator=random, dtype=dtype).requires_grad_(grad) for size in sizes]


def mask():
    return torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.7


def test_it_is_listed_as_it_was():
    (row,) = [registry.probe(row) for row in attn_core.list_backends() if row.distribution == "attn-frozen-1"]
    assert (row.name, row.version, row.status, row.aliases) == ("frozen_1", "1.0", "works", ("frozen",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"attn_mask": mask()},
        {"attn_mask": KeyPadding(torch.arange(7).expand(2, 7) < 4)},
        {"deterministic": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_it_is_called_with_all_that_it_declares(options, dtype):
    given = tensors(dtype=dtype)
    out, lse = attention(*given, backend="frozen", return_lse=True, **options)
    meaning = {name: option for name, option in options.items() if name != "deterministic"}
    expected, expected_lse = reference(*given, **meaning)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_its_backward_is_called_by_the_core():
    given = tensors(grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found = torch.autograd.grad(attention(*given, causal=True, backend="frozen_1").square().sum(), given)
    expected = torch.autograd.grad(reference(*exact, causal=True)[0].square().sum(), exact)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window_size": (1, 1)}, "it has no window"),
        ({"dropout_p": 0.5}, "it has no dropout"),
        ({"attn_mask": torch.zeros(1, 1, 5, 7)}, "it has no additive masks"),
        ({"attn_mask": mask(), "causal": True}, "a mask beside causal is not implemented"),
    ],
)
def test_it_refuses_what_it_declares_as_no_in_its_own_words(options, reason):
    with pytest.raises(CallRefused, match=reason):
        attention(*tensors(), backend="frozen_1", **options)


def test_what_its_backward_lacks_is_refused_in_its_own_words():
    with pytest.raises(CallRefused, match="the slope of the softcap is not implemented"):
        attention(*tensors(grad=True), softcap=2.0, backend="frozen_1")


def test_it_passes_the_kit():
    outcomes = list(check_backend("frozen_1", quick=True))
    assert len(outcomes) > 30
    assert [(outcome.check, outcome.detail) for outcome in outcomes if outcome.status == FAILED] == []


# --- what the core learns later -----------------------------------------------------------------------------------------


def spied(monkeypatch):
    """What the frozen forward is called with, by keyword."""
    import attn_frozen_1_kernels as kernels

    seen, own = [], kernels.forward

    def forward(query, key, value, **options):
        seen.append(options)
        return own(query, key, value, **options)

    call.forget()
    spec = registry.find("frozen_1").spec
    monkeypatch.setitem(loading._loaded, id(spec), (spec, loading.Adapter(forward, loading.load(spec).backward)))
    return seen


def test_it_is_given_only_the_options_that_it_takes(monkeypatch):
    seen = spied(monkeypatch)
    for options in ({}, {"causal": True}, {"softcap": 2.0, "return_lse": True}, {"attn_mask": mask()}):
        attention(*tensors(), backend="frozen_1", **options)
        assert set(seen[-1]) == {"scale", *options}
    attention(*tensors(), backend="frozen_1", window_size=(-1, -1), dropout_p=0, causal=False, softcap=None)
    assert set(seen[-1]) == {"scale"}  # what it does not take is not given at its default either


def later_constraints():
    """The record as a later core may have it: with a further ability."""

    @dataclass(frozen=True, kw_only=True)
    class Later(Constraints):
        sinks: bool | No = declaration.NOT_DECLARED

    return Later


def test_an_option_that_the_core_learns_later_does_not_reach_it(monkeypatch):
    monkeypatch.setitem(loading._OPTIONS, "sinks", "sinks")
    monkeypatch.setitem(loading._DEFAULTS, "sinks", None)
    own = Constraints.__getattribute__
    learnt = No("not declared")
    monkeypatch.setattr(Constraints, "sinks", learnt, raising=False)  # what a field that was not given comes to
    registry.refresh()
    spec = registry.find("frozen_1").spec
    assert own(spec.alternatives[0], "sinks") is learnt
    assert loading.forward_options(spec) == OPTIONS
    seen = spied(monkeypatch)
    attention(*tensors(), backend="frozen_1", causal=True)
    assert set(seen[-1]) == {"scale", "causal"}


def test_a_field_that_the_record_learns_later_is_no_to_it_and_breaks_nothing(monkeypatch):
    import attn_core.plugin

    later = later_constraints()
    monkeypatch.setattr(attn_core.plugin, "Constraints", later)
    monkeypatch.delitem(sys.modules, "attn_frozen_1_declaration", raising=False)
    registry.refresh()
    row = registry.find("frozen_1")
    (constraints,) = row.spec.alternatives
    assert type(constraints) is later
    assert not constraints.sinks
    assert {item.name for item in fields(later)} - {item.name for item in fields(Constraints)} == {"sinks"}
    out = attention(*tensors(), causal=True, backend="frozen_1")
    torch.testing.assert_close(out.double(), reference(*tensors(), causal=True)[0], rtol=1e-5, atol=1e-5)
    monkeypatch.delitem(sys.modules, "attn_frozen_1_declaration", raising=False)


def test_a_kind_of_mask_that_the_core_learns_later_is_no_to_it():
    (constraints,) = registry.find("frozen_1").spec.alternatives
    assert not constraints.mask_abilities["packed"]  # which it does not name
