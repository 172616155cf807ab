"""The kit catches lies: each backend of the zoo has one planted defect, and the check that is named finds it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from attn_core import registry
from attn_core.commands.check import exit_status
from attn_core.testing import check_backend
from attn_core.testing.kit import FAILED, NOT_CHECKED, PASSED
from attn_core.testing.surroundings import USUAL, unusual

ZOO = Path(__file__).parent / "zoo"
sys.path.insert(0, str(ZOO))

import zoo_corners  # noqa: E402, F401 (it adds to the lies)
import zoo_kernels  # noqa: E402 (it lies where wheels do)
import zoo_surroundings  # noqa: E402, F401 (it adds to the lies)

DECLARED = {
    "no_that_is_admitted": "refused[softcap]",
    "ability_that_a_rule_refuses": "softcap",
    "rule_that_never_fires": "rule[never holds]",
    "ability_for_nobody": "declared-values",
    "softcap_beside_causal_refused_when_run": "softcap",
}
"""Lies of the declaration alone."""
LIARS = {name: check for name, (check, _) in zoo_kernels.LIES.items() if check is not None} | DECLARED


@pytest.fixture(scope="module", autouse=True)
def zoo(tmp_path_factory):
    """The zoo, installed as a wheel is."""
    info = tmp_path_factory.mktemp("zoo") / "zoo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attn.backends]\nzoo = zoo_declaration\n")
    sys.path.insert(0, str(info.parent))
    registry.refresh()
    yield
    sys.path.remove(str(info.parent))
    sys.path.remove(str(ZOO))
    registry.refresh()


@pytest.fixture(autouse=True)
def _settings():
    """Some of the liars change those of the process when they are loaded."""
    with unusual(torch.device("cpu"), USUAL):
        yield


@pytest.mark.parametrize(("name", "check"), LIARS.items())
def test_a_lie_is_caught_by_the_check_that_is_for_it(name, check):
    (outcome,) = check_backend(f"zoo:{name}", only=check.__eq__)
    assert outcome.status == FAILED
    print(outcome.detail, outcome.snippet, sep="\n")


HONEST = [
    "honest", "honest_with_dropout", "honest_compiling", "honest_for_pairs", "honest_for_64_and_a_pair", "honest_by_rules",
    "honest_for_causal", "for_float8_too", "honest_for_eights", "honest_for_groups_of_8", "honest_for_one_key_head",
    "honest_for_windows", "honest_for_packed", "honest_in_blocks", "honest_decoding",
]  # fmt: skip


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HONEST)
def test_the_honest_one_passes(name, quick):
    """But for the declaration of the zoo, which imports its kernels to know their names."""
    wrong = [outcome for outcome in check_backend(f"zoo:{name}", quick=quick) if outcome.status == FAILED]
    assert [outcome.check for outcome in wrong] == ["declaration-imports"]


@pytest.mark.parametrize(
    ("name", "check"),
    [("honest_for_eights", "batch"), ("honest_for_groups_of_8", "accumulation"), ("honest_for_eights", "gqa"),
     ("honest_for_one_key_head", "ulysses"), ("honest_in_blocks", "neighbours"), ("honest_in_blocks", "compile-dynamic"),
     ("honest_in_blocks", "export"), ("honest_in_blocks", "same-tensor")],
)  # fmt: skip
def test_the_honest_one_that_serves_little_is_tried_in_full(name, check):
    (outcome,) = check_backend(f"zoo:{name}", only=check.__eq__)
    assert outcome.status == PASSED
    assert not outcome.detail.startswith("0 ")


def test_a_dtype_that_the_kit_does_not_draw_is_a_row_that_says_so():
    outcomes = {outcome.check: outcome for outcome in check_backend("zoo:for_float8_too", quick=True)}
    assert outcomes["combinations[bfloat16]"].status == PASSED
    left_out = outcomes["combinations[float8_e4m3fn]"]
    assert (left_out.status, "float8_e4m3fn" in left_out.detail) == (NOT_CHECKED, True)


def test_a_backend_of_no_other_dtype_is_not_checked_at_all():
    outcomes = list(check_backend("zoo:for_float8"))
    assert [(outcome.check, outcome.status) for outcome in outcomes] == [("", NOT_CHECKED)]
    assert exit_status(outcomes) == 3
