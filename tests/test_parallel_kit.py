"""The kit's checks of context parallel, in one process, say what the ranks of a pool find."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from attn_core import registry
from attn_core.testing import check_backend
from attn_core.testing.kit import FAILED, PASSED

ZOO = Path(__file__).parent / "zoo"
MODES = {"ring-forward": (3, 1), "ring-backward": (3, 1), "ulysses": (1, 3)}
HYBRID = (2, 2)  # has no check of its own: what it is made of has
BACKENDS = ["native", "native_math", "native_flash", "chunked", pytest.param("flex", marks=pytest.mark.slow)]
LIARS = [
    "zoo:honest",
    "zoo:lse_of_base_two",
    "zoo:lse_transposed",
    "zoo:lse_without_the_scale",
    "zoo:lse_of_its_own_keys_backward",
    "zoo:lse_in_the_dtype_of_the_query",
]


@pytest.fixture(scope="module")
def zoo(ranks, tmp_path_factory):
    """The zoo of liars, installed here and on each rank."""
    info = tmp_path_factory.mktemp("zoo") / "zoo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attn.backends]\nzoo = zoo_declaration\n")
    folders = [str(info.parent), str(ZOO)]
    sys.path[:0] = folders
    registry.refresh()
    ranks.run("parallel_kit.install", *folders, on=4)
    yield
    for folder in folders:
        sys.path.remove(folder)
    registry.refresh()


def said_by_the_kit(name):
    """For each check of context parallel that there is for a backend, whether it passes."""
    outcomes = check_backend(name, only=MODES.__contains__)
    return {outcome.check: outcome.status for outcome in outcomes}


def found_by_ranks(ranks, name, shape, *, gradient):
    """Whether the results over ranks are within what the kit allows, or why they are refused."""
    found = [
        ranks.run("parallel_kit.held", name, shape, dtype, causal, gradient, on=shape[0] * shape[1])[0]
        for dtype in ("float32", "bfloat16")
        for causal in (False, True)
    ]
    refused = [one for one in found if isinstance(one, str)]
    return refused[0] if refused else max(found) <= 1


def agree(ranks, name):
    kit = said_by_the_kit(name)
    for check, shape in MODES.items():
        found = found_by_ranks(ranks, name, shape, gradient=check == "ring-backward")
        if isinstance(found, str):
            assert "not supported" in found
            assert kit.get(check) not in (PASSED, FAILED), check
        else:
            assert kit[check] == (PASSED if found else FAILED), check
    for gradient, parts in ((False, ["ring-forward", "ulysses"]), (True, ["ring-backward", "ulysses"])):
        found = found_by_ranks(ranks, name, HYBRID, gradient=gradient)
        sound = all(kit.get(check) == PASSED for check in parts)
        assert (found is True) == sound, (gradient, found)
    return kit


@pytest.mark.parametrize("name", BACKENDS)
def test_what_passes_the_kit_is_right_on_ranks(ranks, name):
    kit = agree(ranks, name)
    assert kit["ulysses"] == PASSED
    assert (kit.get("ring-forward") == PASSED) == (name != "flex")  # flex has no lse on a CPU


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("name", LIARS)
def test_what_fails_the_kit_is_wrong_on_ranks(ranks, name):
    kit = agree(ranks, name)
    assert (FAILED in kit.values()) == (name != "zoo:honest")
