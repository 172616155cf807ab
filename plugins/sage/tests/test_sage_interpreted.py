"""The Triton kernels of sageattention 1 themselves, interpreted on the CPU, where both are installed.

``sageattn`` insists on a GPU, so its two halves are called: what quantises, and what attends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest

SCRIPT = """
import sys, types
import torch
from sageattention import core

def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True):
    assert tensor_layout == "NHD" and not smooth_k
    small = q.shape[-1] == 96
    quantise = core.per_block_int8_hd96 if small else core.per_block_int8
    attend = ((core.attn_false, core.attn_true), (core.attn_h96_false, core.attn_h96_true))[small][is_causal]
    rounded_q, q_scale, rounded_k, k_scale = quantise(q, k, sm_scale=sm_scale, tensor_layout=tensor_layout)
    return attend(rounded_q, rounded_k, v.half(), q_scale, k_scale, tensor_layout=tensor_layout, output_dtype=q.dtype)

library = types.ModuleType("sageattention")
library.sageattn = sageattn
sys.modules["sageattention"] = library
from attn_core import KeyPadding
from attn_core.testing import reference
from attn_sage import first

random = torch.Generator().manual_seed(0)
keep = torch.rand(2, 77, generator=random) < 0.5
keep[0] = False
for dim, queries, keys, causal, padding in (
    (64, 70, 77, False, None), (64, 64, 64, False, None), (96, 70, 70, True, None), (96, 5, 1, False, None),
    (64, 33, 77, False, KeyPadding(keep)),
):
    q, k, v = (torch.randn(2, length, heads, dim, generator=random) for length, heads in ((queries, 2), (keys, 1), (keys, 1)))
    out = first.forward(q, k + 1, v, scale=0.125, causal=causal, attn_mask=padding)
    expected, _ = reference(q, k + 1, v, scale=0.125, causal=causal, attn_mask=padding)
    error = float((out - expected).norm() / expected.norm())
    assert error < 0.02, (dim, queries, keys, causal, error)
for bad in ("q", "k"):
    given = {"q": torch.randn(2, 70, 2, 64, generator=random), "k": torch.randn(2, 70, 2, 64, generator=random)}
    given[bad][1, 11, 0, 3] = float("nan")
    out = first.forward(given["q"], given["k"], given["k"].nan_to_num(), scale=0.125)
    assert not out[1, :, 0].isfinite().any() and out[0].isfinite().all()
alone = torch.full((1, 1, 1, 64), float("nan"))
assert not first.forward(torch.randn(1, 5, 1, 64, generator=random), alone, torch.ones_like(alone), scale=0.125).isfinite().any()
if "library" in sys.argv:  # what the adapter mends
    q = torch.randn(1, 70, 1, 64, generator=random)
    k = torch.randn(1, 77, 1, 64, generator=random)
    expected, _ = reference(q, k, k)
    assert float((sageattn(q, k - k.mean(1, keepdim=True), k, "NHD", smooth_k=False) - expected).norm() / expected.norm()) > 0.2
"""


def installed():
    try:
        return find_spec("triton") is not None and version("sageattention").startswith("1.")
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed(), reason="needs sageattention 1 and triton: pip install sageattention==1.0.6 triton")
def test_the_kernels_of_sageattention_1_are_right_through_the_adapter_and_wrong_without_it():
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", SCRIPT, "library"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


PREPARED = """
import torch
from attn_sage import fused, inputs

random = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for batch, queries, keys, heads, groups, dim, missing in (
        (2, 70, 77, 2, 2, 64, 51), (1, 5, 1, 1, 1, 96, 0), (1, 300, 4500, 1, 2, 128, 0), (3, 1, 130, 3, 1, 64, 62),
        (2, 1500, 7, 1, 1, 40, 57),
    ):
        for padding in (False, True):
            query = torch.randn(batch, queries, heads * groups, dim, generator=random).to(dtype)
            key, value = ((torch.randn(batch, heads, keys, dim, generator=random) + 1).to(dtype).transpose(1, 2) for _ in "kv")
            value[:, :, 0] *= 1e-3
            keep = None
            if padding:
                keep = torch.rand(batch, keys, generator=random) < 0.5
                keep[0] = False
                key, value = (tensor.masked_fill(~keep[:, :, None, None], float("nan")) for tensor in (key, value))
            if batch > 1:
                query[1, 0, 0, 3] = float("nan")
                key[-1, -1, 0, 5] = float("inf")
                value[-1, -1, 0, 5] = float("inf")
            expected = inputs.prepared(query, key, value, keep, missing, wanted=True)[1:]
            found = fused.prepared(query, key, value, keep, missing, scanned=True, wanted=True)
            again = fused.prepared(query, key, value, keep, missing, scanned=True, wanted=True)
            for one, other, repeated in zip(found, expected, again):
                if one is None:
                    assert other is None and repeated is None
                    continue
                torch.testing.assert_close(
                    one, other, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps, equal_nan=True
                )
                assert torch.equal(one.nan_to_num(), repeated.nan_to_num())
            assert torch.equal(found[0].isinf(), expected[0].isinf())
            finite = query.nan_to_num()
            expected, *_ = fused.prepared(finite, key, value, keep, missing, scanned=True, wanted=False)
            unseen, _, _, mean, nothing = fused.prepared(query, key, value, keep, missing, scanned=False, wanted=False)
            assert mean is None and nothing is None and torch.equal(unseen.nan_to_num(), expected.nan_to_num())
"""

REAL_KEYS = """
import torch
from attn_sage import fused, inputs

random = torch.Generator().manual_seed(0)

def weighed(query, key, value, scale):
    groups = query.shape[2] // key.shape[2]
    key, value = (tensor.float().repeat_interleave(groups, 2).transpose(1, 2) for tensor in (key, value))
    scores = query.float().transpose(1, 2) @ key.mT * scale
    out = (scores.softmax(-1) @ value).transpose(1, 2).contiguous()
    return out.to(query.dtype), scores.logsumexp(-1)

for dtype in (torch.float32, torch.float16):  # the interpreter multiplies the bits of bfloat16
    for batch, queries, keys, heads, groups, dim, missing, scale in (
        (2, 70, 77, 2, 2, 64, 51, 0.1), (1, 5, 1, 1, 1, 96, 63, -0.3), (2, 1, 1500, 1, 2, 128, 36, 1.0),
        (3, 130, 16, 1, 1, 8, 48, 0.35),
    ):
        for marks in (None, "holes", "first", "last", "none"):
            query = torch.randn(batch, heads * groups, queries, dim, generator=random).to(dtype).transpose(1, 2)
            key, value = (torch.randn(batch, keys, heads, dim, generator=random).to(dtype) for _ in "kv")
            value += 1
            keep = None
            if marks:
                keep = torch.zeros(batch, keys, dtype=torch.bool)
                keep[:, {"first": slice(1), "last": slice(keys - 1, keys)}.get(marks, slice(0))] = True
                if marks == "holes":
                    keep = torch.rand(batch, keys, generator=random) < 0.5
                    keep[0] = False
            given = inputs.prepared(query, key, value, keep, missing)
            out, lse = weighed(given.query, given.key, given.value, scale)
            run = lambda ones: weighed(given.query, given.key, ones, scale)[0].float()
            expected, expected_lse = inputs.of_real_keys(out.float(), lse, given, keep, keys, scale, run)
            others = given.query, given.key, given.power, keep, keys, scale
            fused.of_real_keys(out, lse, *others)
            torch.testing.assert_close(out.float(), expected, rtol=3 * torch.finfo(dtype).eps, atol=1e-4)
            torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-2 if dtype is torch.float16 else 1e-4)
            if keep is not None:
                nobody = ~keep.any(1)
                assert not out[nobody].any() and bool((lse[nobody] == -torch.inf).all())
            for bad in (float("nan"), float("inf")):
                out, lse = weighed(given.query, given.key, given.value, scale)
                query = given.query.clone()
                query[0, 0, 0, 3] = bad
                fused.of_real_keys(out, lse, query, *others[1:])
                seen = keep is None or bool(keep[0].any())
                assert out[0, 0, 0].isnan().all() == lse[0, 0, 0].isnan() == seen
                out[0, 0, 0] = 0
                assert out.isfinite().all()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("script", [PREPARED, REAL_KEYS], ids=["prepared", "of real keys"])
def test_what_is_done_around_a_kernel_is_the_same_in_triton(script):
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
