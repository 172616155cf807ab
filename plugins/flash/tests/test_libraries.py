"""What is there, what is missing, and what is broken: each library by itself, each refusal with its reason."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from attn_core import CallRefused, KeyPadding, Packed, attention
from attn_core.facts import Facts
from attn_core.testing import reference
from attn_flash.specs import FLASH, FLASH_3, FLASH_4

TESTS = Path(__file__).parent


def metadata_of(folder, name, version, extras=()):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    for extra, line in extras:
        lines += [f"Provides-Extra: {extra}", f'Requires-Dist: {line}; extra == "{extra}"']
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    return info


@pytest.fixture
def site(tmp_path):
    """A folder of installed distributions, attn-flash among them."""
    extras = [("flash", "flash-attn<3,>=2.7.3"), ("flash-4", "flash-attn-4>=4.0.0b36")]
    info = metadata_of(tmp_path, "attn-flash", "0.1.0", extras)
    (info / "entry_points.txt").write_text("[attn.backends]\nflash = attn_flash.plugin\n")
    return tmp_path


def listed(site, code="row.status, row.reason, row.next_step"):
    """What a process of its own that has only these distributions says of each backend."""
    root = TESTS.parent.parent.parent
    places = [str(site), str(root), str(TESTS.parent)]
    script = f"""
import sys
sys.path[:0] = {places!r}
from attn_core import list_backends
for row in list_backends():
    if row.distribution == "attn-flash":
        print(row.name, {code}, sep=" | ")
print("torch" in sys.modules, "flash_attn" in sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONPATH": ""}, cwd=site
    )
    return found.stdout


def test_missing_libraries_come_with_lines_that_install_them(site):
    found = listed(site)
    assert "flash | missing | needs flash-attn<3,>=2.7.3 | pip install --no-build-isolation 'flash-attn" in found
    assert "flash_3 | missing | needs the module flash_attn_interface | build it: git clone" in found
    assert "flash_4 | missing | needs flash-attn-4>=4.0.0b36 | pip install --pre 'flash-attn-4[cu13]" in found
    assert found.endswith("False False\n")


@pytest.mark.parametrize(
    ("name", "version", "row"),
    [
        ("flash-attn", "2.6.3", "flash | incompatible | needs flash-attn<3,>=2.7.3, found 2.6.3"),
        ("flash-attn", "3.0.0", "flash | incompatible | needs flash-attn<3,>=2.7.3, found 3.0.0"),
        ("flash-attn", "2.8.3", "flash | available"),
        ("flash-attn-4", "4.0.0b12", "flash_4 | incompatible | needs flash-attn-4>=4.0.0b36, found 4.0.0b12"),
        ("flash-attn-4", "4.0.0b36", "flash_4 | available"),
    ],
)
def test_each_library_counts_by_itself(site, name, version, row):
    metadata_of(site, name, version)
    found = listed(site)
    assert row in found
    other = "flash_4 | missing" if name == "flash-attn" else "flash | missing"
    assert other in found


def test_all_were_run_on_hardware():
    assert not any(spec.unverified for spec in (FLASH, FLASH_3, FLASH_4))


def loaded(site, module, files):
    """What importing an adapter says where a library is this."""
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    root = TESTS.parent.parent.parent
    script = f"import sys; sys.path[:0] = {[str(site), str(root), str(TESTS.parent)]!r}\nimport {module}"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={"PYTHONPATH": ""}, cwd=site
    ).stderr


def test_the_early_flash_4_that_flash_2_carries_is_told_apart(site):
    early = "def flash_attn_func(q, k, v, softmax_scale=None, causal=False): ...\nflash_attn_varlen_func = flash_attn_func\n"
    files = {
        "flash_attn/__init__.py": "",
        "flash_attn/cute/__init__.py": early,
        "flash_attn/cute/interface.py": "def _flash_attn_bwd(): ...\n_flash_attn_fwd = _flash_attn_bwd\n",
    }
    assert "flash_attn.cute is not that of flash-attn-4 but the early one" in loaded(site, "attn_flash.flash_4", files)


def test_flash_4_alone_is_no_flash_2(site):
    error = loaded(site, "attn_flash.flash_2", {"flash_attn/cute/__init__.py": ""})
    assert "No module named 'flash_attn.flash_attn_interface'" in error


HOPPER = {"platform": "cuda", "compute_capability": (9, 0), "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("spec", "capability", "admitted"),
    [
        *((FLASH, item, True) for item in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
        (FLASH, (7, 5), False),
        (FLASH_3, (9, 0), True),
        (FLASH_3, (8, 0), False),
        (FLASH_3, (10, 0), False),
        *((FLASH_4, item, True) for item in [(9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]),
        (FLASH_4, (8, 0), False),
    ],
)
def test_architectures(spec, capability, admitted):
    reasons = spec.reasons(Facts(platform="cuda", compute_capability=capability, dtype="bfloat16"))
    assert (reasons == []) is admitted
    if not admitted:
        assert "compute capability: found {}.{}".format(*capability) in reasons[0]


@pytest.mark.parametrize(
    ("spec", "facts", "reason"),
    [
        (FLASH, {"softcap": True, "dropout": True}, "softcap excludes dropout"),
        (FLASH, {"dropout": True, "return_lse": True}, "dropout excludes return_lse"),
        (FLASH, {"mask": "bool"}, "attn_mask: found bool; accepted: none, key_padding, packed"),
        (FLASH, {"mask": "key_padding", "causal": True, "softcap": True}, "softcap excludes key padding"),
        (
            FLASH_3,
            {"deterministic": True, "backward": True, "head_dim": 256, "value_head_dim": 256},
            "deterministic excl",
        ),
        (FLASH_3, {"softcap": True, "return_lse": True}, "softcap excludes return_lse"),
        (FLASH_4, {"head_dim": 256, "mask": "key_padding", "causal": True}, "head dims above 248 exclude key padding"),
        (FLASH_4, {"dropout": True}, "flash-attn 4 has no dropout"),
        (
            FLASH_4,
            {"compute_capability": (10, 0), "softcap": True, "backward": True, "head_dim": 192},
            "softcap excludes head dims above 128 with gradients",
        ),
        (FLASH_4, {"compute_capability": (12, 0), "head_dim": 192}, "head_dim: found"),
        (FLASH_4, {"compute_capability": (12, 0), "deterministic": True, "backward": True}, "is not deterministic"),
        (FLASH_4, {"dtype": "float32"}, "dtype: found float32"),
    ],
)
def test_refusals(spec, facts, reason):
    assert any(reason in item for item in spec.reasons(Facts(**{**HOPPER, **facts})))


def test_aliases_are_those_of_the_seed_and_nobody_elses():
    from attn_core import known

    names = {name for spec in (FLASH, FLASH_3, FLASH_4) for name in spec.aliases}
    assert names == {"flash_varlen", "_flash_3", "_flash_varlen_3"}
    assert not names & {name for wheel in known.known_wheels().values() for name in wheel}


# --- how calls are made -------------------------------------------------------------------------------------------------


@pytest.fixture
def library():
    from flash_attn.cute import interface

    interface.CALLS.clear()
    return interface.CALLS


def half(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def test_padding_is_left_out_of_the_work(library):
    query = half(2, 6, 2, 16)
    keep = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    attention(query, query, query, attn_mask=KeyPadding(keep), backend="flash_4_standin")
    assert library == [("dense", (2, 6, 2, 16), (2, 2, 2, 16))]


@pytest.mark.parametrize(
    ("left", "form"),
    [(True, ("dense", (2, 6, 2, 16), (2, 3, 2, 16))), (False, ("dense", (2, 6, 2, 24), (2, 6, 2, 24)))],
)
def test_a_diagonal_over_padding_leaves_out_work_where_that_moves_nothing(library, left, form):
    query = half(2, 6, 2, 16)
    keep = torch.zeros(2, 6, dtype=torch.bool)
    keep[0, 3 if left else 0 :][: 6 if left else 3] = True
    keep[1, -2:] = True
    attention(query, query, query, attn_mask=KeyPadding(keep), causal=True, backend="flash_4_standin")
    assert library == [form]


def test_indices_are_made_once(library, monkeypatch):
    from attn_core import packing

    made = []
    monkeypatch.setattr(
        packing, "_front", lambda *given, whole=packing._front, **more: made.append(1) or whole(*given, **more)
    )
    query, padding = half(1, 6, 2, 16), KeyPadding(torch.tensor([[True] * 3 + [False] * 3]))
    for _ in range(3):
        attention(query, query, query, attn_mask=padding, backend="flash_4_standin")
    assert len(library) == 3
    assert made == [1]


@pytest.mark.parametrize("name", ["flash_standin", "flash_3_standin", "flash_4_standin"])
def test_a_scale_that_hides_nothing_is_refused(name):
    query, keep = half(1, 4, 1, 16).half(), torch.tensor([[True, False, True, False]])
    with pytest.raises(CallRefused, match="key padding and a diagonal"):
        attention(query, query, query, attn_mask=KeyPadding(keep), causal=True, scale=1e-13, backend=name)


def test_packed_sequences_without_queries_or_keys():
    query, key = half(1, 5, 2, 16), half(1, 4, 2, 16)
    starts = torch.tensor([[0, 0, 3, 5], [0, 2, 4, 4]], dtype=torch.int32)
    out, lse = attention(
        query, key, key, attn_mask=Packed(*starts), causal=True, return_lse=True, backend="flash_4_standin"
    )
    assert not out[:, [0, 3, 4]].any()
    assert (lse[:, :, [0, 3, 4]] == -torch.inf).all()
    assert lse[:, :, [1, 2]].isfinite().all()


@pytest.mark.parametrize("dim", [1, 16, 32, 40, 72, 112, 136, 256])
def test_flash_4_differentiates_in_steps_of_32_of_the_head_dim(dim):
    tensors = [half(1, 5, 2, dim).requires_grad_() for _ in range(3)]
    grads = torch.autograd.grad(attention(*tensors, backend="flash_4_standin").sum(), tensors)  # the stand-in wants it
    expected = torch.autograd.grad(attention(*tensors, backend="native_math").sum(), tensors)
    torch.testing.assert_close(grads, expected, atol=0.02, rtol=0.02)


def test_flash_2_is_never_given_the_lse_of_a_blind_query_as_it_is():
    from attn_flash import flash_2

    query, key = half(1, 4, 2, 16), half(1, 2, 2, 16)
    given = {"scale": 0.3, "causal": True}
    out, lse = flash_2.forward(query, key, key, return_lse=True, **given)
    assert (lse[:, :, :2] == -torch.inf).all()
    grads = flash_2.backward(torch.ones_like(out), query, key, key, out, lse, **given)  # the stand-in refuses -inf
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, :2].any()


STANDINS = ["flash_standin", "flash_3_standin", "flash_4_standin"]


@pytest.mark.parametrize("name", STANDINS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_that_can_not_be_read_16_bytes_at_a_time_are_copied(name, packed):
    tensors = [half(1, 5, 2, 16).requires_grad_() for _ in range(3)]
    mask = Packed(*torch.tensor([[0, 2, 5]] * 2, dtype=torch.int32)) if packed else None
    for grad in (half(1, 5, 2, 19)[..., 3:], half(163)[3:].view(1, 5, 2, 16), half(1).expand(1, 5, 2, 16)):
        found, expected = (
            torch.autograd.grad(attention(*tensors, attn_mask=mask, backend=backend), tensors, grad)
            for backend in (name, "native_math")
        )
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("name", STANDINS)
def test_a_nan_is_in_the_lse_and_nothing_is_minus_infinity(name):
    query, key = half(1, 4, 2, 16), half(1, 3, 2, 16)
    query[0, 2, 1, 0] = torch.nan
    out, lse = attention(query, key, key, causal=True, return_lse=True, backend=name)
    assert lse[0, 1, 2].isnan()
    assert (lse[0, :, 0] == -torch.inf).all()
    assert int(lse.isfinite().sum()) == 5
    assert out[0, 2, 1].isnan().all()


@pytest.mark.parametrize("name", STANDINS)
def test_without_any_key_the_lse_is_minus_infinity(name):
    query = half(2, 4, 2, 16)
    hidden = KeyPadding(torch.zeros(2, 4, dtype=torch.bool))
    out, lse = attention(query, query, query, attn_mask=hidden, return_lse=True, backend=name)
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_an_early_flash_3_is_told_apart(site):
    early = {
        "flash_attn_interface.py": "def flash_attn_func(q, k, v): ...\n"
        "flash_attn_varlen_func = _flash_attn_forward = _flash_attn_backward = None"
    }
    assert "takes no return_attn_probs" in loaded(site, "attn_flash.flash_3", early)


def test_flash_2_is_not_told_that_every_sequence_has_one_query():
    query, key = half(1, 2, 2, 16), half(1, 6, 2, 16)
    starts = torch.tensor([[0, 0, 1, 2], [0, 2, 4, 6]], dtype=torch.int32)
    out = attention(query, key, key, attn_mask=Packed(*starts), causal=True, backend="flash_standin")
    alone = attention(query[:, :1], key[:, 2:4], key[:, 2:4], backend="flash_standin")
    assert torch.equal(out[:, :1], alone)


@pytest.mark.parametrize("name", ["flash_standin", "flash_3_standin", "flash_4_standin"])
def test_hidden_keys_get_no_gradient_where_lengths_could_not_be_read(name, monkeypatch):
    from attn_core import packing

    monkeypatch.setattr(packing, "_readable", lambda _: False)
    query = half(2, 6, 2, 16).requires_grad_()
    key, value = half(2, 6, 2, 16).requires_grad_(), half(2, 6, 2, 16).requires_grad_()
    keep = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    attention(query, key, value, attn_mask=KeyPadding(keep), backend=name).sum().backward()
    for tensor in (key, value):
        assert not tensor.grad[~keep].any()
    assert value.grad[keep].all()
    assert not query.grad[1].any()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_long_padded_keys_stay_where_they_are(dense, causal, monkeypatch):
    from attn_core import packed_calls, packing

    made = []
    monkeypatch.setattr(
        packed_calls, "pack", lambda *given, **more: made.append(packing.pack(*given, **more)) or made[-1]
    )
    keep = torch.arange(300) >= torch.tensor([[250], [300], [0], [3]])
    keep = keep if causal else keep & (torch.arange(300) < 290)
    query = half(4, 40, 4, 16).requires_grad_()
    key, value = (half(4, 300 if dense else 320, 2, 16)[:, :300].requires_grad_() for _ in range(2))
    for tensor in (key, value):
        tensor.data[~keep] = torch.nan
    out, lse = attention(
        query, key, value, attn_mask=KeyPadding(keep), causal=causal, return_lse=True, backend="flash_standin"
    )
    grads = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    assert [item.rows is None for item in made] == [dense]
    alone = [tensor.detach().nan_to_num().double().requires_grad_() for tensor in (query, key, value)]
    expected, expected_lse = reference(*alone, attn_mask=KeyPadding(keep), causal=causal)
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-4)
    for grad, due in zip(grads, torch.autograd.grad(expected.sum(), alone), strict=True):
        torch.testing.assert_close(grad.double(), due, atol=0.05, rtol=0.03)


def spoiled(sequence, *tensors):
    for tensor in tensors:
        tensor.data[sequence] = torch.nan


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["flash_3_standin", "flash_4_standin"])
def test_no_sequence_of_a_padded_batch_gets_the_nan_of_another(name, readable, causal, monkeypatch):
    from attn_core import packing

    if not readable:
        monkeypatch.setattr(packing, "_readable", lambda _: False)
    tensors = [half(4, 5, 2, 16).requires_grad_() for _ in range(3)]
    keep = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    spoiled(1, *tensors)
    if readable or not causal:  # else padding is hidden by columns, and stays where it is
        spoiled(2, *tensors[1:])
    if not causal:
        keep[3] = keep[3].flip(0)
    out = attention(*tensors, attn_mask=KeyPadding(keep), causal=causal, backend=name)
    grad_out = torch.ones_like(out)
    spoiled(1, grad_out)
    grads = torch.autograd.grad(out, tensors, grad_out)
    for row in (0, 2, 3):
        alone = [item[row : row + 1].detach().nan_to_num(0).requires_grad_() for item in tensors]
        mask = KeyPadding(keep[row : row + 1])
        expected = attention(*alone, attn_mask=mask, causal=causal, backend="native_math")
        torch.testing.assert_close(out[row : row + 1], expected, atol=0.02, rtol=0.02)
        for grad, due in zip(grads, torch.autograd.grad(expected.sum(), alone), strict=True):
            torch.testing.assert_close(grad[row : row + 1], due, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    ("place", "reached"), [("v", ["out", "dq"]), ("k", ["dq"]), ("q", ["dk", "dv"]), ("go", ["dk", "dv"])]
)
def test_the_stand_in_of_flash_4_reads_on_into_the_next_packed_sequence(place, reached):
    """As was seen on an H100; see docs/known-issues.md."""
    from flash_attn.cute.interface import _flash_attn_bwd, flash_attn_varlen_func

    starts = torch.tensor([0, 40, 80], dtype=torch.int32)
    given = {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": 40,
        "max_seqlen_k": 40,
        "softmax_scale": 0.2,
    }
    tensors = {name: half(80, 2, 32) for name in ("q", "k", "v", "go")}
    tensors[place][40:] = torch.nan
    q, k, v, go = tensors.values()
    out, lse = flash_attn_varlen_func(q, k, v, return_lse=True, **given)
    grads = _flash_attn_bwd(q, k, v, out.nan_to_num(), go, lse.nan_to_num().contiguous(), **given)
    found = {"out": out[:40], "lse": lse[:, :40], **dict(zip(("dq", "dk", "dv"), (x[:40] for x in grads), strict=True))}
    assert [name for name, item in found.items() if item.isnan().any()] == reached


def test_the_core_knows_this_wheel():
    from attn_core.known import known_wheels
    from attn_flash.plugin import attn_backends

    assert list(known_wheels()["attn-flash"]) == [spec.name for spec in attn_backends()]


def test_loading_flash_attn_4_leaves_warnings_and_the_hook_for_errors_as_they_were(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS / "standins"))
    for name in [name for name in sys.modules if name == "attn_flash.flash_4" or name.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    filters, hook = list(warnings.filters), sys.excepthook
    adapter = importlib.import_module("attn_flash.flash_4")
    monkeypatch.setitem(sys.modules, "attn_flash.flash_4", adapter)
    assert warnings.filters == filters
    assert sys.excepthook is hook
