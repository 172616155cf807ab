"""A backend's functions are held to its declaration when they are loaded, and tried where that is asked for."""

from __future__ import annotations

import sys

import fake_distributions
import pytest
from fake_distributions import declaring

from attn_core import BackendNotUsable, list_backends, loading, registry

world = fake_distributions.world

CONSTRAINTS = """constraints=Constraints(platforms={'cpu'}, dtypes={'float32'}, masks={'none', 'bool'}, causal=True, softcap=True,
    dropout=True, lse=True, deterministic=True, window_size=True, backward=Backward(softcap=No('not in the backward')))"""

OPTIONS = (
    "attn_mask=None, causal=False, window_size=None, softcap=None, dropout_p=0.0, deterministic=False, return_lse=False"
)

GRADIENT = "attn_mask=None, causal=False, window_size=None"


def spec_of(world, kernel, extra="", constraints=CONSTRAINTS):
    (world.folders[0] / "acme_kernel.py").write_text(kernel)
    world.wheel("acme-attn", declaring(f"'acme', forward='acme_kernel:forward', {constraints}{extra}"))
    return world.row().spec


def refusal(spec):
    with pytest.raises(BackendNotUsable) as caught:
        loading.load(spec)
    message = str(caught.value)
    assert message.startswith("backend acme is broken: ")
    assert "Next: " in message
    return message


@pytest.mark.parametrize(
    "signature",
    [
        f"query, key, value, *, scale, {OPTIONS}",
        f"query, key, value, scale=None, {OPTIONS}, own_option=3",
        "q, k, v, /, *, scale, **options",
        "*tensors, scale, causal=False, **options",
    ],
)
def test_a_forward_that_takes_what_is_declared_is_loaded_once(world, signature):
    spec = spec_of(world, f"def forward({signature}): return 7")
    adapter = loading.load(spec)
    assert adapter.forward(1, 2, 3, scale=1.0) == 7
    assert adapter.backward is None
    assert loading.load(spec) is adapter


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("import acme_cuda", "ModuleNotFoundError: No module named 'acme_cuda'"),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart.so.12: cannot open"),
        ("import sys; sys.exit(4)", "SystemExit: 4"),
        ("def other(): pass", "has no attribute 'forward'"),
        ("forward = 3", "acme_kernel:forward is a int, not a function"),
        (
            f"def forward(query, key, *, scale, {OPTIONS}): pass",
            "takes 2 arguments by position; it is called with query, key, value",
        ),
        (f"def forward(query, key, value, *, {OPTIONS}): pass", "does not take scale by keyword"),
        (
            "def forward(query, key, value, *, scale, attn_mask=None, causal=False, dropout_p=0.0, return_lse=False): pass",
            "does not take deterministic, softcap, window_size by keyword, which its declaration admits",
        ),
        (
            f"def forward(query, key, value, *, scale, {OPTIONS.replace('causal=False', 'causal=True')}): pass",
            "True as the default of causal",
        ),
        (
            f"def forward(query, key, value, *, scale, {OPTIONS.replace('=None, soft', '=(-1, -1), soft')}): pass",
            "(-1, -1) as the default of window",
        ),
        (
            f"def forward(query, key, value, *, scale, {OPTIONS.replace('dropout_p=0.0', 'dropout_p=0.1')}): pass",
            "0.1 as the default of dropout_p",
        ),
        ("def forward(query, key, value, *, scale, page_table, **options): pass", "can't be called without page_table"),
    ],
)
def test_what_does_not_load_or_does_not_fit_is_refused_with_the_reason(world, kernel, reason):
    assert reason in refusal(spec_of(world, kernel))


def test_an_option_that_is_not_declared_need_not_be_taken(world):
    constraints = "constraints=Constraints(platforms={'cpu'}, dtypes={'float32'}, masks={'none'}, lse=True)"
    spec = spec_of(
        world, "def forward(query, key, value, *, scale, return_lse=False): return 7", constraints=constraints
    )
    assert loading.load(spec).forward(1, 2, 3, scale=1.0) == 7


def test_the_backward_takes_what_is_declared_with_a_gradient_alone(world):
    spec = spec_of(
        world,
        f"def forward(query, key, value, *, scale, {OPTIONS}): pass\n"
        f"def backward(grad_out, query, key, value, out, lse, *, scale, {GRADIENT}): return 8",
        ", backward='acme_kernel:backward', autograd='own'",
    )
    assert loading.backward_options(spec) == {"scale", "attn_mask", "causal", "window_size"}
    assert loading.load(spec).backward(*range(6), scale=1.0) == 8


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("grad_out, query, key, value, out, lse, *, scale, attn_mask=None, causal=False", "does not take window_size"),
        (f"grad_out, query, key, value, *, scale, {GRADIENT}", "takes 4 arguments by position"),
    ],
)
def test_a_backward_that_does_not_fit_is_refused(world, signature, reason):
    kernel = f"def forward(query, key, value, *, scale, {OPTIONS}): pass\ndef backward({signature}): pass"
    assert reason in refusal(spec_of(world, kernel, ", backward='acme_kernel:backward', autograd='own'"))


def test_a_failed_load_is_tried_again(world):
    spec = spec_of(world, "import acme_cuda")
    refusal(spec)
    (world.folders[0] / "acme_kernel.py").write_text("def forward(query, key, value, **options): return 7")
    assert loading.load(spec).forward(1, 2, 3) == 7


# --- the probe -----------------------------------------------------------------------------------------------------------

RIGHT = """
import torch

calls = []
def forward(query, key, value, *, scale, attn_mask=None, return_lse=False):
    calls.append((query.dtype, query.shape[-1], type(attn_mask).__name__))
    q, k, v = (tensor.transpose(1, 2).float() for tensor in (query, key, value))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2).to(query.dtype)
"""


def tried(world, kernel, dtypes="{'float32', 'bfloat16'}", masks="{'none'}", more="", changes=""):
    constraints = f"constraints=Constraints(platforms={{'cpu'}}, dtypes={dtypes}, masks={masks}, lse=True{more})"
    spec_of(world, kernel, changes, constraints)
    (row,) = list_backends(probe=True)
    return row


def test_what_returns_attention_works(world):
    pytest.importorskip("torch")
    row = tried(world, RIGHT)
    assert (row.status, row.reason, row.next_step) == ("works", "tried on cpu in bfloat16", "")


def test_an_adapter_that_says_itself_that_it_waits_for_something_is_not_broken(world):
    pytest.importorskip("torch")
    from attn_core.testing import check_backend

    waits = "from attn_core import BackendNotUsable\nraise BackendNotUsable('acme: not allowed. Next: allow it')"
    row = tried(world, waits)
    assert (row.status, row.reason) == ("unsupported", "acme: not allowed. Next: allow it")
    with pytest.raises(BackendNotUsable, match="^acme: not allowed"):
        loading.load(row.spec)
    outcomes = list(check_backend("acme", quick=True, only=("loads", "results").__contains__))
    assert {outcome.status for outcome in outcomes} == {"not checked"}


@pytest.mark.parametrize(
    ("masks", "more", "seen"),
    [
        ("{'none'}", ", head_dims={96}", ("torch.float32", 96, "NoneType")),
        ("{'none'}", ", head_dims=range(8, 17, 8)", ("torch.float32", 16, "NoneType")),
        ("{'packed'}", "", ("torch.float32", 64, "Packed")),
        ("{'key_padding', 'packed'}", "", ("torch.float32", 64, "KeyPadding")),
        ("{'bool'}", "", ("torch.float32", 64, "Tensor")),
        ("{'float'}", "", ("torch.float32", 64, "Tensor")),
    ],
)
def test_the_probe_calls_with_what_is_declared(world, masks, more, seen):
    pytest.importorskip("torch")
    assert tried(world, RIGHT, "{'float32'}", masks, more).status == "works"
    ((dtype, head_dim, mask),) = sys.modules["acme_kernel"].calls
    assert (str(dtype), head_dim, mask) == seen


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("import acme_cuda", "does not load: ModuleNotFoundError: No module named 'acme_cuda'"),
        (RIGHT.replace("* scale", "* scale * 2"), "is off by"),
        (RIGHT.replace("softmax(-1)", "softmax(-1) * float('nan')"), "is off by nan"),
        (RIGHT.replace(".transpose(1, 2).to", ".to"), "returns (1, 2, 128, 64) where (1, 128, 2, 64) is due"),
        ("def forward(query, key, value, **options): return None", "returns NoneType where"),
        (
            "def forward(query, key, value, **options): raise RuntimeError('no kernel image')",
            "raises RuntimeError: no kernel image",
        ),
    ],
)
def test_what_does_not_is_broken(world, kernel, reason):
    pytest.importorskip("torch")
    row = tried(world, kernel)
    assert row.status == "broken"
    assert reason in row.reason
    assert "acme-attn" in row.next_step


def test_an_approximate_backend_is_held_to_its_own_error(world):
    pytest.importorskip("torch")
    kernel = RIGHT.replace(".to(query.dtype)", ".to(query.dtype) * 1.08")
    assert tried(world, kernel, changes=", numerics=Approximate(0.04)").status == "works"


def test_what_this_machine_does_not_have_is_unsupported(world):
    torch = pytest.importorskip("torch")
    constraints = "constraints=Constraints(platforms={'npu'}, dtypes={'float16'}, masks={'none'})"
    spec_of(world, RIGHT, constraints=constraints)
    (row,) = list_backends(probe=True)
    assert row.status == "unsupported"
    assert "accepted: npu" in row.reason
    if not torch.cuda.is_available():
        assert row.reason == "device: found cpu; accepted: npu"


def test_other_rows_stay_as_they_are(world):
    pytest.importorskip("torch")
    world.wheel("acme-attn", declaring("'acme', needs='no_such_module'"))
    assert registry.probe(world.row()) == world.row()


def test_an_option_without_a_default_is_always_given(world):
    kernel = "def forward(query, key, value, *, scale, causal, window_size, **options): return causal, window_size"
    forward = loading.load(spec_of(world, kernel)).forward
    assert forward(1, 2, 3, scale=1.0) == (False, None)
    assert forward(1, 2, 3, scale=1.0, causal=True) == (True, None)
