"""Merging partial results: the form of several passes, and the kernel of one, interpreted and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from merge_cases import largest_error, largest_error_of_sums

from attn_core.parallel import merge

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TOLERANCE = 2e-6  # float32, over a few operations


def test_several_passes_are_right():
    assert largest_error(merge.merge, "cpu") <= TOLERANCE
    assert largest_error_of_sums(merge.add, "cpu") <= TOLERANCE


def test_passes_what_is_not_finite_through():
    for other in (float("nan"), float("inf")):
        out, lse = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
        merge.merge([(out, lse), (torch.tensor([other, 1.0]).view(1, 1, 1, 2), torch.zeros(1, 1, 1))], out, lse)
        assert not out[..., 0].isfinite().item()
        assert out[..., 1].item() == 1.0


@pytest.mark.parametrize(
    ("one", "other", "lse", "part_lse", "expected"),
    [
        (torch.inf, 1.0, 0.0, -2.0, torch.inf), (torch.inf, 1.0, 0.0, 2.0, torch.inf),
        (1.0, torch.inf, 0.0, 2.0, torch.inf), (1.0, -torch.inf, 0.0, -2.0, -torch.inf),
        (torch.inf, 0.0, 0.0, -torch.inf, torch.inf), (0.0, torch.inf, -torch.inf, 0.0, torch.inf),
        (torch.inf, -torch.inf, 0.0, 0.0, torch.nan), (0.0, 0.0, -torch.inf, -torch.inf, 0.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_infinity_stays_infinity(one, other, lse, part_lse, expected, device):
    out, whole = torch.full((1, 1, 1, 9), one, device=device), torch.full((1, 1, 1), lse, device=device)
    merge.merge([(out, whole), (torch.full_like(out, other), torch.full_like(whole, part_lse))], out, whole)
    torch.testing.assert_close(out, torch.full_like(out, expected), equal_nan=True)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_is_right_interpreted():
    script = Path(__file__).parent / "merge_cases.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= TOLERANCE


@NEEDS_GPU
class TestOnAGPU:
    def test_is_right(self):
        assert largest_error(merge.merge, "cuda") <= TOLERANCE
        assert largest_error_of_sums(merge.add, "cuda") <= TOLERANCE

    def test_repeats_its_bits_over_many_programs(self):
        whole, part = torch.randn(2, 4096, 8, 128, device="cuda"), torch.randn(2, 4096, 8, 128, device="cuda")
        lse, part_lse = torch.randn(2, 8, 4096, device="cuda"), torch.randn(2, 8, 4096, device="cuda")
        found = []
        for _ in range(5):
            out, out_lse = whole.clone(), lse.clone()
            merge.merge([(out, out_lse), (part, part_lse)], out, out_lse)
            found.append((out, out_lse))
        assert all(torch.equal(out, found[0][0]) and torch.equal(other, found[0][1]) for out, other in found)

    def test_falls_back_to_several_passes_without_triton(self, monkeypatch):
        merge._fused.cache_clear()
        monkeypatch.setitem(sys.modules, "attn_core.parallel.fused", None)
        monkeypatch.delattr("attn_core.parallel.fused", raising=False)
        try:
            assert largest_error(merge.merge, "cuda") <= TOLERANCE
            assert merge._fused() is None
        finally:
            merge._fused.cache_clear()
