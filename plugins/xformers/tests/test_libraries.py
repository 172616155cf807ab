"""What each operator is asked for, and what is refused before it is."""

from __future__ import annotations

import pytest
import torch
from xformers.ops.fmha import operators

from attn_core import KeyPadding, attention
from attn_core.facts import Facts
from attn_core.testing import reference
from attn_xformers.specs import CUTLASS, FLASH, SPLITK, XFORMERS


@pytest.fixture(autouse=True)
def calls():
    operators.CALLS.clear()
    return operators.CALLS


def half(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "bias"),
    [
        ({}, "NoneType"),
        ({"causal": True}, "LowerTriangularMask"),
        ({"window_size": (3, 0)}, "LowerTriangularFromBottomRightLocalAttentionMask"),
        ({"window_size": (3, 2)}, "LocalAttentionFromBottomRightMask"),
        ({"window_size": (-1, 2)}, "LocalAttentionFromBottomRightMask"),
        ({"attn_mask": KeyPadding(torch.tensor([[True] * 5 + [False]]))}, "BlockDiagonalMask"),
    ],
)
def test_each_option_has_its_bias_class(calls, options, bias):
    query = half(1, 6, 2, 16)
    attention(query, query, query, backend="xformers_standin", **options)
    assert [call[1] for call in calls] == [bias]


def test_unequal_lengths_are_aligned_bottom_right(calls):
    query, key = half(1, 3, 2, 16), half(1, 6, 2, 16)
    attention(query, key, key, causal=True, backend="xformers_cutlass_standin")
    attention(key, query, query, causal=True, backend="xformers_cutlass_standin")  # the blind queries stay out
    assert [call[1] for call in calls] == ["LowerTriangularFromBottomRightMask", "LowerTriangularMask"]
    assert calls[1][2] == (1, 3, 2, 16)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_padding_that_leaves_no_key_at_all(heads):
    query = half(2, 3, heads[0], 16).requires_grad_()
    key = half(2, 5, heads[1], 16).requires_grad_()
    value = half(2, 5, heads[1], 16).requires_grad_()
    padding = KeyPadding(torch.zeros(2, 5, dtype=torch.bool))
    out, lse = attention(query, key, value, attn_mask=padding, return_lse=True, backend="xformers_flash_standin")
    out.sum().backward()
    assert out.shape == query.shape
    assert lse.shape == (2, heads[0], 3)
    assert lse.eq(-torch.inf).all()
    assert not any(item.any() for item in (out, query.grad, key.grad, value.grad))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dims", [(264, 264), (16, 264)])
def test_padding_is_added_where_its_own_choice_is_cutlass(calls, batch, dims):
    query, key = half(batch, 4, 4, dims[0]).requires_grad_(), half(batch, 300, 4, dims[0]).requires_grad_()
    value = half(batch, 300, 4, dims[1]).requires_grad_()
    padding = KeyPadding(torch.arange(300)[None].expand(batch, -1) >= 10)
    out, lse = attention(query, key, value, attn_mask=padding, return_lse=True, backend="xformers_standin")
    grads = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    assert {call[:2] for call in calls} == {("CutlassFw", "Tensor")}
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected, expected_lse = reference(*exact, attn_mask=padding)
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-4)
    for grad, due in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(grad.double(), due, atol=0.05, rtol=0.03)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_split_k_takes_no_more_at_a_time_than_its_grid_has(calls, heads):
    batch = 65536 // heads[0] + 1
    query, key = half(batch, 1, heads[0], 16), half(batch, 2, heads[1], 16)
    out, lse = attention(query, key, key, return_lse=True, backend="xformers_splitk_standin")
    assert [call[2][0] for call in calls] == [65535 // heads[0], batch - 65535 // heads[0]]
    part = slice(batch - 3, None)
    last = attention(query[part], key[part], key[part], return_lse=True, backend="xformers_splitk_standin")
    torch.testing.assert_close((out[part], lse[part]), last)


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 1, 1, 64), (1, 4, 1, 64), (1, 1, 64, 64)])
@pytest.mark.parametrize("keys", [64, 61])
def test_what_a_mask_says_once_is_not_written_out(shape, keys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        operators, "added", lambda *given, whole=operators.added: seen.append(given[3]) or whole(*given)
    )
    query, key = half(2, 64, 4, 16), half(2, keys, 4, 16)
    mask = half(*shape)[..., :keys]
    attention(query, key, key, attn_mask=mask, backend="xformers_standin")
    (bias,) = seen
    assert bias.shape == (2, 4, 64, keys)
    assert bias.untyped_storage().nbytes() <= mask.untyped_storage().nbytes()
    assert (bias.data_ptr() == mask.data_ptr()) is (keys == 64 or mask.stride(2) % 8 == 0)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_row_of_the_smallest_numbers_hides_nothing(gradients):
    query, key = half(1, 3, 2, 16), half(1, 5, 2, 16)
    mask = half(1, 1, 3, 5).masked_fill(torch.tensor([False, True, False])[:, None], torch.finfo(torch.bfloat16).min)
    out, lse = attention(
        query.requires_grad_(gradients), key, key, attn_mask=mask, return_lse=True, backend="xformers_standin"
    )
    expected, expected_lse = reference(query.detach(), key, key, attn_mask=mask)
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-5)


def test_key_padding_for_cutlass_is_one_row_for_each_sequence(monkeypatch):
    seen = []
    monkeypatch.setattr(
        operators, "added", lambda *given, whole=operators.added: seen.append(given[3]) or whole(*given)
    )
    query, padding = half(2, 64, 4, 16), KeyPadding(torch.rand(2, 64) > 0.5)
    for _ in range(2):
        attention(query, query, query, attn_mask=padding, backend="xformers_cutlass_standin")
    assert seen[0].untyped_storage().nbytes() == 2 * 64 * 2
    assert seen[0].data_ptr() == seen[1].data_ptr()


@pytest.mark.parametrize(
    ("spec", "facts", "reason"),
    [
        (CUTLASS, {"causal": True, "mask": "key_padding"}, "causal excludes a mask of its own"),
        (CUTLASS, {"window_size": (3, 0)}, "window_size: found (3, 0)"),
        (CUTLASS, {"compute_capability": (10, 0)}, "compute capability: found 10.0; accepted: 8.0 to 9.0"),
        (CUTLASS, {"mask": "float", "mask_dtype": "float32"}, "a float mask of another dtype"),
        (CUTLASS, {"mask": "packed"}, "attn_mask: found packed"),
        (FLASH, {"mask": "packed", "window_size": (3, 2)}, "a window whose right side is not 0 excludes packed"),
        (FLASH, {"window_size": (3, 2), "lengths": "more queries"}, "excludes more queries than keys"),
        (FLASH, {"dtype": "float32"}, "dtype: found float32"),
        (FLASH, {"deterministic": True, "backward": True}, "adds with atomics"),
        (XFORMERS, {"softcap": True}, "xformers has no softcap"),
        (SPLITK, {"backward": True}, "xformers' split-K operator has no backward"),
        (SPLITK, {"causal": True}, "takes up to 16 queries"),
    ],
)
def test_refusals(spec, facts, reason):
    known = {"platform": "cuda", "compute_capability": (9, 0), "dtype": "bfloat16"}
    assert any(reason in item for item in spec.reasons(Facts(**{**known, **facts})))


def test_both_alternatives_of_its_own_choice():
    known = {"platform": "cuda", "compute_capability": (9, 0)}
    assert XFORMERS.reasons(Facts(**known, dtype="float32", mask="bool")) == []
    assert XFORMERS.reasons(Facts(**known, dtype="bfloat16", mask="packed", causal=True)) == []
    assert XFORMERS.reasons(Facts(**{**known, "compute_capability": (12, 0)}, dtype="bfloat16")) == []
    assert XFORMERS.reasons(Facts(**known, dtype="float32", mask="packed")) != []


def test_the_core_knows_this_wheel():
    from attn_core.known import known_wheels
    from attn_xformers.plugin import attn_backends

    assert list(known_wheels()["attn-xformers"]) == [spec.name for spec in attn_backends()]


def test_split_k_takes_no_more_queries_than_its_partial_results_can_be_counted(calls, monkeypatch):
    monkeypatch.setattr("attn_xformers.adapters._MOST_PARTIAL_NUMBERS", 4 * 16 * (128 + 5))
    query, key = half(2, 12, 4, 16), half(2, 9, 2, 16)
    out, lse = attention(query, key, key, return_lse=True, backend="xformers_splitk_standin")
    assert [call[2][1] for call in calls] == [5, 5, 2]
    expected = attention(query, key, key, return_lse=True, backend="native_math")
    torch.testing.assert_close((out, lse), expected, atol=1e-2, rtol=1e-2)
