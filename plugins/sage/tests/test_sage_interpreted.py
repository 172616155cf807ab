"""Triton kernels interpreted on the CPU: those of sageattention 1, where it is installed, and those of this wheel.

``sageattn`` insists on a GPU, so its two halves are called: what quantises, and what attends.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import types
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from attn_core import CallRefused

STAND_INS = Path(__file__).parent / "stand_ins"
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
from attn_sage import first, inputs

if "fused" in sys.argv:
    inputs._on_gpu = lambda tensor: inputs._fused()
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
    seen = 11 if bad == "q" else slice(70)  # other queries may be NaN too, or not
    assert not out[1, seen, 0].isfinite().any() and out[0].isfinite().all()
alone = torch.full((1, 1, 1, 64), float("nan"))
assert not first.forward(torch.randn(1, 5, 1, 64, generator=random), alone, torch.ones_like(alone), scale=0.125).isfinite().any()
alone = torch.ones(1, 1, 1, 64)
alone[..., 5] = float("nan")
for sign in (1, -1):
    assert not first.forward(sign * torch.ones(1, 5, 1, 64), alone, torch.ones_like(alone), scale=0.125).isfinite().any(), sign
if "library" in sys.argv:  # what the adapter mends
    q = torch.randn(1, 70, 1, 64, generator=random)
    k = torch.randn(1, 77, 1, 64, generator=random)
    expected, _ = reference(q, k, k)
    assert float((sageattn(q, k - k.mean(1, keepdim=True), k, "NHD", smooth_k=False) - expected).norm() / expected.norm()) > 0.2
"""


DIRECT = """
import itertools
from importlib import import_module
import torch
from sageattention import core
from attn_sage import first_kernels

def sageattn(q, k, v, scale, causal):
    small = q.shape[-1] == 96
    quantise = core.per_block_int8_hd96 if small else core.per_block_int8
    attend = ((core.attn_false, core.attn_true), (core.attn_h96_false, core.attn_h96_true))[small][causal]
    rounded_q, q_scale, rounded_k, k_scale = quantise(q, k, sm_scale=scale, tensor_layout="NHD")
    return attend(rounded_q, rounded_k, v.half(), q_scale, k_scale, tensor_layout="NHD", output_dtype=q.dtype)

assert first_kernels.kernels(core.sageattn) is None  # which are interpreted
found = first_kernels.of_modules([import_module("sageattention." + name) for name in first_kernels.MODULES[1:]])
random = torch.Generator().manual_seed(0)
for dim, causal, (queries, keys), dtype in itertools.product(
    (64, 96, 128), (False, True), ((1, 16), (130, 77)), (torch.float16, torch.float32)
):
    queries = keys if causal else queries
    query = torch.randn(2, queries, 3, 4, dim, generator=random).to(dtype)[:, :, 1]
    key = torch.randn(2, keys, 2, dim, generator=random).to(dtype)
    value = torch.randn(2, 2, keys + 1, dim, generator=random).to(dtype)[:, :, 1:].transpose(1, 2)
    if 0 < keys % 128 <= 64 and causal:
        continue  # it reads what is not there
    expected = sageattn(query, key, value, 0.11, causal)
    out = first_kernels.attend(found[dim, causal], query, key, value, 0.11)
    assert torch.equal(out, expected) and out.stride() == expected.stride(), (dim, causal, queries, keys, dtype)
"""


def installed():
    try:
        return find_spec("triton") is not None and version("sageattention").startswith("1.")
    except PackageNotFoundError:
        return False


def interpret(script, *arguments):
    path = os.pathsep.join([str(STAND_INS), *filter(None, sys.path)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not installed(), reason="needs sageattention 1 and triton: pip install sageattention==1.0.6 triton")
@pytest.mark.parametrize("what", ["library", "fused"])
def test_the_kernels_of_sageattention_1_are_right_through_the_adapter_and_wrong_without_it(what):
    interpret(SCRIPT, what)


@pytest.mark.skipif(not installed(), reason="needs sageattention 1 and triton: pip install sageattention==1.0.6 triton")
def test_its_kernels_launched_directly_give_what_its_functions_give_to_the_bit():
    interpret(DIRECT)


@pytest.mark.skipif(not installed(), reason="needs sageattention 1 and triton: pip install sageattention==1.0.6 triton")
def test_its_kernels_are_launched_directly_only_where_all_is_as_it_is_known(monkeypatch):
    from attn_sage import first, first_kernels

    if not first_kernels.launching.KNOWN:
        pytest.skip("another Triton")
    assert first_kernels.kernels(first.sageattn) is not None
    assert first_kernels.kernels(lambda *tensors: None) is None
    with monkeypatch.context() as changed:
        changed.setattr(first_kernels.launching, "KNOWN", False)
        assert first_kernels.kernels(first.sageattn) is None
    with monkeypatch.context() as changed:
        changed.setattr(sys.modules["sageattention.quant_per_block"], "__file__", __file__)
        assert first_kernels.kernels(first.sageattn) is None
    monkeypatch.setattr(first_kernels, "JITFunction", type(None))
    assert first_kernels.kernels(first.sageattn) is None


PREPARED = """
import torch
from attn_sage import fused, inputs

random = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for batch, queries, keys, heads, groups, dim, missing in (
        (2, 70, 77, 2, 2, 64, 51), (1, 5, 1, 1, 1, 96, 0), (1, 300, 1100, 1, 2, 128, 0), (3, 1, 130, 3, 1, 64, 62),
        (2, 1100, 7, 1, 1, 40, 57),
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
            found = fused.prepared(query, key, value, keep, missing, scanned=True, wanted=True, half=False)
            again = fused.prepared(query, key, value, keep, missing, scanned=True, wanted=True, half=False)
            for one, other, repeated in zip(found, expected, again):
                if one is None:
                    assert other is None and repeated is None
                    continue
                torch.testing.assert_close(
                    one, other, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps, equal_nan=True
                )
                assert torch.equal(one.nan_to_num(), repeated.nan_to_num())
            assert torch.equal(found[0].isinf(), expected[0].isinf())
            halved = fused.prepared(query, key, value, keep, missing, scanned=True, wanted=True, half=True)
            assert torch.equal(halved[1].nan_to_num(), found[1].half().nan_to_num()) and halved[1].dtype == torch.float16
            for one, other in zip((halved[0], *halved[2:]), (found[0], *found[2:])):
                assert one is other is None or torch.equal(one.nan_to_num(), other.nan_to_num())
            finite = query.nan_to_num()
            options = {"wanted": False, "half": False}
            expected, *_ = fused.prepared(finite, key, value, keep, missing, scanned=True, **options)
            unseen, _, _, mean, nothing = fused.prepared(query, key, value, keep, missing, scanned=False, **options)
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


ADAPTERS = """
import sys
import torch
import sageattention_first
import sageattention_second
from attn_core import KeyPadding
from attn_core.testing import reference

sys.modules["sageattention"] = sageattention_first
from attn_sage import first
sys.modules["sageattention"] = sageattention_second
from attn_sage import inputs, second

runs = []
fused = inputs._fused()
inputs._on_gpu = lambda tensor: runs.append(tensor) or fused
random = torch.Generator().manual_seed(0)
holes = torch.rand(2, 128, generator=random) < 0.5
one = torch.arange(128)[None] == torch.tensor([[3], [128]])  # the second sequence has none
for forward, error, with_lse in (
    (first.forward, 0.02, False), (second.fp16_triton, 0.02, True), (second.fp8_cuda, 0.06, True), (second.automatic, 0.06, True),
):
    for keys, scale, keep in ((77, 0.1, None), (128, 0.1, None), (128, -0.1, holes), (128, 0.1, one)):
        q, k, v = (
            torch.randn(2, length, heads, 64, generator=random).half() for length, heads in ((70, 4), (keys, 2), (keys, 2))
        )
        k += 1
        padding = None if keep is None else KeyPadding(keep)
        options = {"return_lse": True} if with_lse else {}
        runs.clear()
        found = forward(q, k, v, scale=scale, attn_mask=padding, **options)
        assert len(runs) == 1 + (keep is not None or keys == 77 and forward is not second.fp16_triton)
        out, lse = found if with_lse else (found, None)
        expected, expected_lse = reference(q, k, v, scale=scale, attn_mask=padding)
        assert float((out.double() - expected).norm() / expected.norm()) < error, (forward, keys, scale)
        if with_lse:
            torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=0.05)
        for bad in (q, k):
            kept = bad[0, 3, 0, 0].clone()
            bad[0, 3, 0, 0] = float("nan")
            out = forward(q, k, v, scale=scale, attn_mask=padding)
            rows = slice(None) if bad is k else 3
            if bad is q or keep is None or keep[0, 3]:
                assert not out[0, rows, 0].isfinite().any(), (forward, keys)
            bad[0, 3, 0, 0] = kept
    alone = torch.ones(1, 1, 1, 64).half()
    alone[..., 5] = float("nan")
    for sign in (1, -1):  # of what stands for it in the score
        out = forward(sign * torch.ones(1, 5, 1, 64).half(), alone, torch.ones_like(alone), scale=0.1)
        assert not out.isfinite().any(), (forward, sign)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("script", [PREPARED, REAL_KEYS, ADAPTERS], ids=["prepared", "of real keys", "adapters"])
def test_what_is_done_around_a_kernel_is_the_same_in_triton(script):
    interpret(script)


# --- launches without Triton's search --------------------------------------------------------------------------------------


@pytest.fixture
def launching(monkeypatch):
    pytest.importorskip("triton")
    from attn_sage import launching

    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_repeated", {})
    return launching


class Compiled:
    """A kernel of Triton, or what it was compiled to; what Triton would compile anew for is found out by Triton itself."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel, specialised=None):
        self.kernel, self.params, self.specialised = kernel, kernel.params, specialised
        self.compiled, self.searched, self.direct, self.hooked = {}, [], [], 0

    def __getitem__(self, grid):
        return partial(self.search if self.specialised is None else self.run_hooked, grid)

    def found_by_triton(self, arguments, options):
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime.jit import create_function_from_signature

        binder = create_function_from_signature(
            self.kernel.signature, self.params, CUDABackend(GPUTarget("cuda", 90, 32))
        )
        return repr(binder(*arguments)[1]) + repr(sorted(options.items()))

    def search(self, grid, *arguments, **options):
        self.searched.append((grid, *arguments))
        specialised = self.found_by_triton(arguments, options)
        return self.compiled.setdefault(specialised, Compiled(self, specialised))

    def run_hooked(self, grid, *arguments, stream=None):
        assert stream == 7
        self.hooked += 1
        self.direct.append((grid, *arguments))

    def run(self, first, second, third, stream, function, metadata, launch_metadata, entered, left, *arguments):
        assert (stream, function, metadata) == (7, self.function, self.packed_metadata)
        assert launch_metadata is entered is left is None
        self.direct.append(((first, second, third), *arguments))

    def runs(self):
        return sum(len(each.direct) for each in self.compiled.values())


@pytest.fixture
def kernel(launching, monkeypatch, tmp_path):
    """Of two pointers, five numbers of which one is none of those that Triton looks at, and a constant."""
    path = tmp_path / "kernel_of_test.py"
    path.write_text(
        "import triton\n@triton.jit(do_not_specialize=['length'])\n"
        "def kernel(to, source, row, head, length, scale, flag, dim: triton.language.constexpr):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kernel_of_test", raising=False)
    monkeypatch.setattr(launching, "CompiledKernel", Compiled)
    monkeypatch.setattr(launching, "KNOWN", True)
    monkeypatch.setattr(launching, "_stream", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Compiled(importlib.import_module("kernel_of_test").kernel)


HALF = torch.zeros(64, dtype=torch.float16)
USUAL = {"pointers": (HALF, HALF), "others": (64, 24, 3, 0.5, True, 64), "device": 0, "warps": None, "stages": None}
GRID = (5, 2, 1)


def with_other(at, value):
    return {"others": (*USUAL["others"][:at], value, *USUAL["others"][at + 1 :])}


ANEW = [
    {"pointers": (torch.zeros(64), HALF)}, {"pointers": (HALF, None)}, {"pointers": (HALF, HALF[1:])},
    {"pointers": (HALF[1:], HALF)}, {"pointers": (HALF[1:], HALF[1:])},
    with_other(0, 1), with_other(0, 8), with_other(0, 2**31), with_other(0, 2**31 + 1), with_other(0, 2**63),
    with_other(0, None), with_other(0, 64.0), with_other(0, True),
    with_other(1, 1), with_other(1, 16), with_other(2, 2**40), with_other(2, 2**63), with_other(3, 1), with_other(4, 1),
    with_other(5, 96), with_other(5, 64.0), {"device": 1}, {"warps": 4}, {"warps": 8}, {"stages": 3}, {"stages": 4},
]  # fmt: skip
ALIKE = [
    {"pointers": (HALF[8:], HALF[16:])}, with_other(0, 128), with_other(0, 0), with_other(0, -16), with_other(0, 2**31 - 16),
    with_other(1, 25), with_other(1, -1), with_other(2, 1), with_other(2, 16), with_other(3, -1.5), with_other(4, False),
]  # fmt: skip


def launched(launching, kernel, **changed):
    call = {**USUAL, **changed}
    launching.launch(kernel, call["device"], GRID, call["pointers"], call["others"], call["warps"], call["stages"])


def test_what_triton_would_compile_anew_is_asked_for_and_what_it_would_not_is_launched_at_once(launching, kernel):
    launched(launching, kernel)
    launched(launching, kernel)
    assert kernel.searched == [(GRID, *USUAL["pointers"], *USUAL["others"])]
    (compiled,) = kernel.compiled.values()
    assert compiled.direct == [(GRID, HALF.data_ptr(), HALF.data_ptr(), *USUAL["others"])]
    for changed in ALIKE:
        for _ in range(2):
            launched(launching, kernel, **changed)
    assert len(kernel.searched) == 1
    assert compiled.direct[-1][3:] == with_other(4, False)["others"]
    for changed in ANEW:
        before = len(kernel.searched), kernel.runs()
        for _ in range(3):
            launched(launching, kernel, **changed)
        assert (len(kernel.searched), kernel.runs()) == (before[0] + 1, before[1] + 2), changed
    for _ in range(2):
        launching.launch(Compiled(kernel.kernel), 0, GRID, USUAL["pointers"], USUAL["others"])
    assert len(kernel.searched) == 1 + len(ANEW)


def test_nothing_is_compiled_while_a_graph_is_captured(launching, kernel, monkeypatch):
    launched(launching, kernel)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launched(launching, kernel)
    launched(launching, kernel, **ALIKE[0])
    with pytest.raises(CallRefused, match="make the same call once before the capture"):
        launched(launching, kernel, **ANEW[0])
    assert len(kernel.searched) == 1
    assert kernel.runs() == 2


def test_no_launch_is_of_what_triton_compiled_for_other_arguments(launching, kernel, monkeypatch):
    """By Triton's own word, over all pairs of arguments."""
    monkeypatch.setattr(launching, "MOST", 50)
    monkeypatch.setattr(Compiled, "run", run_strictly)
    numbers = (-(2**31) - 1, -(2**31), -16, -1, 0, 1, 2, 16, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**63 - 16, 2**63)
    numbers = (*numbers, 2**63 + 1, 0.0, 1.0, True, False, None)
    for _ in range(2):
        for row, other in itertools.product(numbers, (1, 16, 3)):
            launched(launching, kernel, others=(row, other, row, 1.0, row == 1, other))
            launched(launching, kernel, others=(other, row, other, row, True, row), pointers=(HALF[other:], None))
    assert kernel.runs() > 100


def run_strictly(compiled, *arguments):
    grid, arguments = arguments[:3], arguments[9:]
    given = (HALF[(address - HALF.data_ptr()) // 2 :] if address else None for address in arguments[:2])
    assert compiled.kernel.found_by_triton((*given, *arguments[2:]), {}) == compiled.specialised
    compiled.direct.append((grid, *arguments))


@pytest.mark.parametrize(
    ("entered", "left", "heard"), [([], [], False), ([print], [], True), ([], [print], True), (None, None, True)]
)
def test_a_launch_that_somebody_is_to_hear_of_is_left_to_the_compiled_kernel(
    launching, kernel, monkeypatch, entered, left, heard
):
    chains = (hooks if hooks is None else types.SimpleNamespace(calls=hooks) for hooks in (entered, left))
    hooks = types.SimpleNamespace(**dict(zip(("launch_enter_hook", "launch_exit_hook"), chains, strict=True)))
    monkeypatch.setattr(launching, "_RUNTIME", hooks)
    launched(launching, kernel)
    launched(launching, kernel)
    (compiled,) = kernel.compiled.values()
    assert compiled.direct == [(GRID, HALF.data_ptr(), HALF.data_ptr(), *USUAL["others"])]
    assert bool(compiled.hooked) == heard


def test_where_triton_gives_no_compiled_kernel_or_is_not_known_each_launch_is_searched_for(
    launching, kernel, monkeypatch
):
    for known, kind in ((True, tuple), (False, Compiled)):
        monkeypatch.setattr(launching, "CompiledKernel", kind)
        monkeypatch.setattr(launching, "KNOWN", known)
        kernel.searched.clear()
        for _ in range(2):
            launched(launching, kernel)
        assert len(kernel.searched) == 2
        assert not kernel.runs()


def test_a_part_of_an_allocation_is_launched_by_its_address_and_given_to_triton_as_a_tensor(launching, kernel):
    held = torch.arange(64, dtype=torch.uint8)
    part = launching.Part(held, held.data_ptr(), 16, torch.float32)
    for _ in range(2):
        launched(launching, kernel, pointers=(part, HALF))
    assert torch.equal(kernel.searched[0][1], held[16:].view(torch.float32))
    (compiled,) = kernel.compiled.values()
    assert compiled.direct[0][1] == held.data_ptr() + 16
