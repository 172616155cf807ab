"""Every adapter of this wheel, held to its declaration by the conformance kit: on a GPU as it is, on the CPU over a stand-in."""

from __future__ import annotations

import pytest

from attn_core import list_backends
from attn_core.testing import parametrize_with_checks

STANDINS = [row.name for row in list_backends() if row.distribution == "attn-xformers-standins"]


@parametrize_with_checks("xformers", "xformers_cutlass", "xformers_flash", "xformers_splitk")
def test_a_library(check):
    check()


@parametrize_with_checks(*STANDINS, quick=True)
def test_on_a_standin(check):
    check()


@pytest.mark.slow
@parametrize_with_checks(*STANDINS)
def test_on_a_standin_in_full(check):
    check()
