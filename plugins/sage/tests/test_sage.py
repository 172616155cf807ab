"""What the kit does not ask of the adapters of sageattention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sageattention_first
import sageattention_second
import torch

from attn_core import KeyPadding, admission, requirements
from attn_core.errors import CallRefused
from attn_core.facts import Facts
from attn_core.testing import reference
from attn_sage import declarations, first, inputs, second

STAND_INS = Path(__file__).parent / "stand_ins"
KERNELS = (declarations.FP16_TRITON, declarations.FP16_CUDA, declarations.FP8_CUDA, declarations.FP8_SM90)


def drawn(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(length=70, keys=None, heads=2, dim=64, dtype=torch.float16):
    return (
        drawn(2, length, heads, dim, dtype=dtype),
        drawn(2, keys or length, heads, dim, dtype=dtype, seed=1),
        drawn(2, keys or length, heads, dim, dtype=dtype, seed=2),
    )


def off(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


# --- what of the library is mended, seen without the adapter and with it ----------------------------------------------------


def test_the_library_counts_keys_that_are_not_there_and_the_adapter_takes_them_out():
    query, key, value = tensors(keys=77)
    expected, _ = reference(query, key, value)
    by_itself = sageattention_first.sageattn(query, key.clone(), value, tensor_layout="NHD")
    assert off(by_itself, expected) > 0.2
    assert off(first.forward(query, key, value, scale=64**-0.5), expected) < 0.02


def test_a_long_sequence_takes_one_call_of_the_kernel(monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return sageattention_first.sageattn(*arguments, **options)

    monkeypatch.setattr(first, "sageattn", counted)
    for keys, expected in ((64, 1), (63 * 1001, 1), (77, 2), (4500, 2)):
        calls.clear()
        query, key, value = (drawn(1, length, 1, 64) for length in (2, keys, keys))
        first.forward(query, key, value, scale=0.125)
        assert len(calls) == expected, keys


def test_the_largest_share_that_is_left_as_it_is_stays_within_the_declared_error():
    length = 64 * 63 * 16 - 63 + 1  # of 64, 62 are missing
    query, key, value = drawn(1, 4, 1, 64), 0.01 * drawn(1, length, 1, 64), drawn(1, length, 1, 64) + 1
    expected, _ = reference(query, key, value)
    assert off(first.forward(query, key, value, scale=0.125), expected) < 0.004


def test_hidden_steps_of_the_quantisation_are_seen_by_small_queries_and_the_adapter_does_not_rely_on_them():
    query, key, value = tensors(length=4, keys=77)
    small = query * 1e-3, key * 1e-3, value.abs() + 1
    expected, expected_lse = reference(*small)
    found = sageattention_second.sageattn_qk_int8_pv_fp16_cuda(*small, tensor_layout="NHD")
    assert off(found, expected) > 0.2
    out, lse = second.fp16_cuda(*small, scale=64**-0.5, return_lse=True)
    assert off(out, expected) < 0.02
    assert torch.allclose(lse.double(), expected_lse, atol=0.02)


def test_a_large_mean_of_the_keys_does_not_spoil_the_log_sum_exp():
    query, key, value = tensors(keys=128, dtype=torch.bfloat16)
    key = key + 30 * drawn(1, 1, 2, 64, dtype=torch.bfloat16, seed=5)
    expected, expected_lse = reference(query, key, value)
    _, by_itself = sageattention_second.sageattn_qk_int8_pv_fp16_triton(
        query, key, value, tensor_layout="NHD", return_lse=True
    )
    assert (by_itself.double() - expected_lse).abs().max() > 0.2
    out, lse = second.fp16_triton(query, key, value, scale=64**-0.5, return_lse=True)
    assert (lse.double() - expected_lse).abs().max() < 0.1
    assert off(out, expected) < 0.02


@pytest.mark.parametrize("forward", [first.forward, second.automatic, second.fp16_cuda, second.fp8_cuda])
def test_a_negative_scale_leaves_no_probability_beyond_1(forward):
    query, key, value = tensors(keys=128)
    expected, _ = reference(query, key, value, scale=-2.0)
    assert (
        off(forward(query, key, value, scale=-2.0), expected) < 0.5
    )  # scores of 100 are off by 1 in int8; inf is not near


@pytest.mark.parametrize("forward", [first.forward, second.automatic, second.fp16_triton, second.fp8_cuda])
def test_a_sequence_of_padding_alone_is_zero_and_its_neighbours_are_not(forward):
    query, key, value = tensors()
    keep = torch.ones(2, 70, dtype=torch.bool)
    keep[0] = False
    out = forward(query, key, value, scale=0.125, attn_mask=KeyPadding(keep))
    assert not out[0].any()
    assert out[1].any()


@pytest.mark.parametrize("forward", [first.forward, second.automatic, second.fp16_cuda, second.fp8_cuda])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_few_keys_among_many_keep_small_values_in_float16(forward, size):
    query, key, value = (
        drawn(1, length, heads, 64, seed=n) for n, (length, heads) in enumerate([(4, 2), (4096, 1), (4096, 1)])
    )
    value = torch.cat([value * size, value * size * 4096], 2)  # of two heads
    key = key.expand(-1, -1, 2, -1)
    padding = KeyPadding(torch.arange(4096)[None] < 2)
    out = forward(query, key, value, scale=0.125, attn_mask=padding)
    expected, _ = reference(query, key, value, scale=0.125, attn_mask=padding)
    for head in range(2):
        assert off(out[:, :, head], expected[:, :, head]) < 0.03


@pytest.mark.parametrize("forward", [second.automatic, second.fp8_cuda, second.fp8_sm90])
def test_a_channel_of_zeros_stays_zero_in_float8(forward):
    query, key, value = tensors(keys=128)
    value[0, :, 1, 5] = 0.0
    by_itself = sageattention_second.sageattn_qk_int8_pv_fp8_cuda(query, key, value, tensor_layout="NHD")
    assert by_itself[0, :, 1, 5].isnan().all()
    out = forward(query, key, value, scale=0.125)
    assert not out[0, :, 1, 5].any()
    assert off(out, reference(query, key, value)[0]) < 0.06


@pytest.mark.parametrize("forward", [second.automatic, second.fp8_cuda, second.fp8_sm90])
def test_a_channel_of_zeros_hides_no_nan(forward):
    query, key, value = tensors(128)
    query[0, 3, 0, 0] = torch.nan
    value[..., 5] = 0.0
    assert forward(query, key, value, scale=0.125)[0, 3, 0].isnan().all()


@pytest.mark.parametrize("length", [1, 64, 65, 128, 129, 192, 200])
def test_causal_reads_no_scale_of_a_block_that_is_not_there(length):
    query, key, value = tensors(length)
    expected, expected_lse = reference(query, key, value, causal=True)
    assert off(first.forward(query, key, value, scale=64**-0.5, causal=True), expected) < 0.02
    out, lse = second.fp16_triton(query, key, value, scale=64**-0.5, causal=True, return_lse=True)
    assert off(out, expected) < 0.02
    assert lse.shape == expected_lse.shape
    assert (lse.double() - expected_lse).abs().max() < 0.1


@pytest.mark.parametrize("forward", [first.forward, second.automatic, second.fp16_cuda])
@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_whole_token_that_is_not_finite_is_not_hidden(forward, name, bad):
    query, key, value = tensors()
    {"query": query, "key": key}[name][0, 11] = bad
    out = forward(query, key, value, scale=0.125)
    assert not out[0, 11].isfinite().any()
    assert out[1].isfinite().all()


# --- what is refused --------------------------------------------------------------------------------------------------------


def test_more_sequences_than_a_grid_has_are_refused():
    query = torch.zeros(1, 1, 1, 64, dtype=torch.float16).expand(70_000, 1, 1, 64)
    with pytest.raises(CallRefused, match=r"found a batch of 70000 .* accepted: up to 65535"):
        inputs.check_sizes("sage", query, query, query)


def test_more_numbers_than_32_bits_count_are_refused():
    query = torch.empty_strided((1, 2, 1, 64), (2**31, 2**31, 64, 1), dtype=torch.float16, device="meta")
    with pytest.raises(CallRefused, match="query spans .* accepted: up to 2147483648"):
        inputs.check_sizes("sage", query, query, query)


def test_architectures_are_those_that_upstream_builds_for():
    accepted = {
        spec.name: {
            capability
            for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1))
            if not spec.reasons(
                Facts(platform="cuda", compute_capability=capability, dtype="float16", head_dim=64, value_head_dim=64)
            )
        }
        for spec in KERNELS
    }
    ampere_to_hopper = {(8, 0), (8, 6), (8, 9), (9, 0)}
    assert accepted == {
        "sage_fp16_triton": ampere_to_hopper,
        "sage_fp16_cuda": ampere_to_hopper | {(10, 0), (12, 0), (12, 1)},
        "sage_fp8_cuda": {(8, 9), (9, 0), (10, 0), (12, 0), (12, 1)},
        "sage_fp8_sm90": {(9, 0)},
    }


@pytest.mark.parametrize("spec", [declarations.SAGE, *KERNELS])
def test_a_gradient_is_refused(spec):
    facts = Facts(platform="cuda", compute_capability=(9, 0), dtype="float16", backward=True)
    assert "backward: not supported: sageattention has no backward: it is for inference" in spec.reasons(facts)


# --- libraries that are not there, or do not load ---------------------------------------------------------------------------


def listed(folder, *arguments, **environment):
    """What ``attn`` prints in a process of its own that finds this folder first."""
    command = [sys.executable, "-m", "attn_core", "list-backends", "--json", *arguments]
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    kept = {"PYTHONPATH": path, "ATTN_ONLY": "attn-sage", **environment}
    done = subprocess.run(command, env={**os.environ, **kept}, capture_output=True, text=True, check=True, cwd=folder)
    return {row["name"]: row for row in json.loads(done.stdout) if row["distribution"] == "attn-sage"}


def installed(folder, version, source):
    """A sageattention of a version whose package holds ``source``."""
    info = folder / f"sageattention-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sageattention\nVersion: {version}\n")
    package = folder / "sageattention"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    return folder


def test_without_sageattention_each_row_has_a_line_that_installs_it(tmp_path):
    rows = listed(tmp_path)
    assert {row["status"] for row in rows.values()} == {"missing"}
    assert rows["sage"]["next_step"] == "pip install 'attn-sage[sage]'"
    assert (
        "pip install --no-build-isolation git+https://github.com/thu-ml/SageAttention@"
        in rows["sage_fp8_cuda"]["next_step"]
    )


def test_version_1_brings_sage_alone(tmp_path):
    rows = listed(installed(tmp_path, "1.0.6", "raise ImportError('not to be imported by a listing')"))
    assert {name: row["status"] for name, row in rows.items()} == {
        "sage": "available", "sage_fp16_triton": "missing", "sage_fp16_cuda": "missing", "sage_fp8_cuda": "missing",
        "sage_fp8_sm90": "missing",
    }  # fmt: skip


def test_a_kernel_of_another_version_is_told_the_line_that_installs_the_right_one(tmp_path):
    folder = installed(tmp_path, "2.0.1", "")
    (folder / "sageattention" / "_qattn_sm80.py").write_text("")
    row = listed(folder)["sage_fp16_cuda"]
    assert row["status"] == "incompatible"
    assert row["next_step"].startswith("pip install --no-build-isolation git+https://github.com/thu-ml/SageAttention@")


@pytest.mark.parametrize("version", ["2.0.1", "3.0.0"])
def test_a_version_that_the_adapters_are_not_written_for_is_incompatible(tmp_path, version):
    row = listed(installed(tmp_path, version, ""))["sage"]
    assert row["status"] == "incompatible"
    assert version in row["reason"]


def test_a_sageattention_that_does_not_load_gives_its_reason_and_breaks_nothing_else(tmp_path, monkeypatch):
    from attn_core import loading
    from attn_core.errors import BackendNotUsable

    monkeypatch.syspath_prepend(installed(tmp_path, "1.0.6", "raise ImportError(\"No module named 'triton'\")"))
    monkeypatch.delitem(sys.modules, "attn_sage.automatic", raising=False)
    with pytest.raises(BackendNotUsable, match="backend sage is broken: .*No module named 'triton'"):
        loading.load(declarations.SAGE)
    assert "native_math" in {row.name for row in __import__("attn_core").list_backends()}


def test_a_refusal_is_that_of_the_version_that_is_installed(monkeypatch):
    facts = Facts(platform="cuda", compute_capability=(9, 0), dtype="float16", causal=True)
    monkeypatch.setattr(
        requirements, "library_reason", lambda library: "another version" if "<2" in str(library) else None
    )
    reasons = admission.refusals(declarations.SAGE, facts)
    assert "quantisation steps" in reasons[0]


@pytest.mark.parametrize(("stand_in", "uses"), [("sageattention_first", "first"), ("sageattention_second", "second")])
def test_sage_takes_the_adapter_for_the_version_that_is_installed(tmp_path, stand_in, uses):
    installed(tmp_path, "1.0.6", f"from {stand_in} import *\n")
    code = (
        "import torch\nfrom attn_sage import automatic\n"
        "import sys\nq = torch.randn(1, 64, 1, 64, dtype=torch.float16)\n"
        "assert automatic.forward(q, q, q, scale=0.1).shape == q.shape\n"
        "print(*sorted({'first', 'second'} & {name.rpartition('.')[2] for name in sys.modules if 'attn_sage.' in name}))"
    )
    path = os.pathsep.join([str(tmp_path), str(STAND_INS), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == uses, done.stderr
