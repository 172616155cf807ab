"""The reference is right: closed forms, finite differences, equivalences, and masks written out by hand."""

from __future__ import annotations

from math import log, sqrt, tanh

import pytest
import torch
from torch.autograd import gradcheck

from attn_core.masks import KeyPadding, Packed, visible_mask
from attn_core.testing import reference

INF = float("inf")


@pytest.fixture(autouse=True)
def fresh_numbers():
    torch.manual_seed(2)


def tensors(batch=2, queries=5, keys=7, heads=4, key_heads=2, dim=3, value_dim=4, dtype=torch.float64):
    return (
        torch.randn(batch, queries, heads, dim, dtype=dtype),
        torch.randn(batch, keys, key_heads, dim, dtype=dtype),
        torch.randn(batch, keys, key_heads, value_dim, dtype=dtype),
    )


def cu(*offsets):
    return torch.tensor(offsets, dtype=torch.int32)


def weights(queries, keys, **options):
    """The probabilities themselves, (Sq, Skv): all scores equal, and the values are the unit vectors."""
    query, key = torch.zeros(1, queries, 1, 1), torch.zeros(1, keys, 1, 1)
    out, lse = reference(query, key, torch.eye(keys)[None, :, None, :], **options)
    return out[0, :, 0], lse[0, 0]


def seen(queries, keys, **options):
    return (weights(queries, keys, **options)[0] > 0).int().tolist()


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_uniform_scores_average_the_values_and_lse_is_the_log_of_their_number():
    query, key, value = tensors()
    out, lse = reference(query, torch.zeros_like(key), value)
    mean = value.mean(1).repeat_interleave(2, 1)[:, None].expand_as(out)
    torch.testing.assert_close(out, mean)
    torch.testing.assert_close(lse, torch.full_like(lse, log(7)))


def test_scale_zero_averages_too():
    query, key, value = tensors()
    torch.testing.assert_close(reference(query, key, value, scale=0)[0], reference(query * 0, key, value)[0])


def test_one_great_score_picks_its_value():
    query = torch.eye(4)[None, :, None, :]
    value = torch.randn(1, 4, 1, 6)
    out, lse = reference(query, query, value, scale=1000)
    torch.testing.assert_close(out, value.double())
    torch.testing.assert_close(lse, torch.full_like(lse, 1000))


def test_two_keys_are_a_logistic_function():
    query, key = torch.tensor([2.0]).reshape(1, 1, 1, 1), torch.tensor([0.5, -0.25]).reshape(1, 2, 1, 1)
    value = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    out, lse = reference(query, key, value)
    assert out.item() == pytest.approx(1 / (1 + 2.718281828459045**-1.5), rel=1e-14)
    assert lse.item() == pytest.approx(log(2.718281828459045**1.0 + 2.718281828459045**-0.5), rel=1e-14)


def test_scale_is_one_over_the_root_of_the_query_head_dim():
    query, key, value = tensors(dim=3, value_dim=5)
    torch.testing.assert_close(reference(query, key, value)[1], reference(query, key, value, scale=1 / sqrt(3))[1])


def test_softcap_is_c_times_tanh_of_the_scaled_scores_before_the_mask():
    query, key, value = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, 1)
    _, lse = reference(query, key, value, scale=0.5, softcap=2.0, attn_mask=torch.full((1, 1, 1, 1), 7.0))
    assert lse.item() == pytest.approx(2 * tanh(3 / 2) + 7, rel=1e-14)


def test_float_mask_is_added_to_the_scaled_scores():
    query, key, value = tensors()
    mask = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    one = torch.ones_like(query[..., :1])
    wide_query = torch.cat([query / sqrt(3), one], -1)  # the mask of one row as one more feature of the keys
    for h, i in ((0, 0), (3, 4)):
        column = mask[:, h, i][:, :, None, None].expand(2, 7, 2, 1)
        expected, expected_lse = reference(wide_query, torch.cat([key, column], -1), value, scale=1)
        out, lse = reference(query, key, value, attn_mask=mask)
        torch.testing.assert_close(out[:, i, h], expected[:, i, h])
        torch.testing.assert_close(lse[:, h, i], expected_lse[:, h, i])


# --- masks written out by hand ----------------------------------------------------------------------------------------


def test_causal_is_bottom_right_with_fewer_queries():
    assert seen(2, 5, causal=True) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_causal_is_bottom_right_with_more_queries():
    assert seen(4, 2, causal=True) == [[0, 0], [0, 0], [1, 0], [1, 1]]


def test_window_is_around_the_same_diagonal():
    assert seen(3, 5, window_size=(1, 0)) == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert seen(3, 5, window_size=(0, 1)) == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert seen(3, 5, window_size=(-1, 0)) == seen(3, 5, causal=True)
    assert seen(3, 5, window_size=(0, -1)) == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert seen(4, 2, window_size=(1, 0)) == [[0, 0], [0, 0], [1, 0], [1, 1]]
    assert seen(5, 2, window_size=(0, 1)) == [[0, 0], [0, 0], [1, 0], [1, 1], [0, 1]]


def test_causal_and_window_and_mask_combine_by_and():
    mask = torch.tensor([1, 0, 1, 1], dtype=torch.bool).reshape(1, 1, 1, 4)
    expected = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert seen(4, 4, causal=True, window_size=(1, 3), attn_mask=mask)[1:] == expected[1:]
    assert seen(4, 4, causal=True, window_size=(1, 3), attn_mask=KeyPadding(mask[0, 0]))[1:] == expected[1:]


def test_key_padding_with_holes_and_left_padding_leaves_the_diagonal_where_it_was():
    keep = KeyPadding(torch.tensor([[False, True, False, True]]))
    assert seen(3, 4, causal=True, attn_mask=keep) == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1]]


def test_packed_documents_have_diagonals_of_their_own():
    packed = Packed(cu(0, 2, 2, 5), cu(0, 3, 4, 6))
    assert seen(5, 6, attn_mask=packed, causal=True) == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_what_is_seen_is_averaged():
    probabilities, lse = weights(4, 2, causal=True)
    assert probabilities.tolist() == [[0, 0], [0, 0], [1, 0], [0.5, 0.5]]
    assert lse.tolist() == [-INF, -INF, 0, pytest.approx(log(2))]


# --- a query that sees nothing ----------------------------------------------------------------------------------------


def hidden_first_row(kind):
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    mask[:, :, 0] = False
    return mask if kind == "bool" else torch.zeros(1, 1, 5, 7, dtype=torch.float64).masked_fill(~mask, -INF)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_query_that_sees_nothing_is_zero_and_so_are_its_gradients(kind, softcap):
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    mask = hidden_first_row(kind)
    inputs = [query, key, value] + ([mask.requires_grad_()] if kind == "float" else [])
    out, lse = reference(query, key, value, attn_mask=mask, softcap=softcap)
    assert bool((out[:, 0] == 0).all())
    assert bool((lse[:, :, 0] == -INF).all())
    assert bool(lse[:, :, 1:].isfinite().all())
    for gradient in torch.autograd.grad(out[:, 0].sum(), inputs, retain_graph=True):
        assert bool((gradient == 0).all())
    for gradient in torch.autograd.grad(out.square().sum(), inputs):
        assert bool(gradient.isfinite().all())


def test_a_batch_without_any_real_key_is_zero():
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    out, _ = reference(query, key, value, attn_mask=KeyPadding(torch.tensor([[True], [False]]).expand(2, 7)))
    assert bool((out[1] == 0).all())
    for gradient in torch.autograd.grad(out.sum(), [query, key, value]):
        assert bool((gradient[1] == 0).all())


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 2, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty_inputs_give_empty_or_zero_results(batch, queries, keys):
    query, key, value = (tensor.requires_grad_() for tensor in tensors(batch, queries, keys))
    out, lse = reference(query, key, value, causal=True)
    assert out.shape == (batch, queries, 4, 4)
    assert lse.shape == (batch, 4, queries)
    assert bool((out == 0).all())
    assert bool((lse == -INF).all())
    for gradient in torch.autograd.grad(out.sum(), [query, key, value]):
        assert bool((gradient == 0).all())


def test_nan_in_what_a_query_sees_passes_through():
    query, key, value = tensors()
    value[0, 3, 0, 0] = torch.nan
    out, _ = reference(query, key, value)
    assert bool(out[0, :, :2, 0].isnan().all())
    assert not bool(out[0, :, 2:].isnan().any())


# --- finite differences -----------------------------------------------------------------------------------------------


MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.rand(2, 1, 5, 7) < 0.6,
    "float": lambda: torch.randn(1, 4, 5, 1, dtype=torch.float64).requires_grad_(),
    "key padding": lambda: KeyPadding(torch.rand(2, 7) < 0.6),
    "nothing seen": lambda: hidden_first_row("bool"),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (1, 2), "scale": -0.7},
        {"softcap": 1.5, "causal": True, "window_size": (3, 0)},
    ],
)
def test_gradients_are_those_of_finite_differences(mask, options):
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    attn_mask = MASKS[mask]()

    def out(query, key, value, attn_mask):
        return reference(query, key, value, attn_mask=attn_mask, **options)[0]

    assert gradcheck(out, (query, key, value, attn_mask))


def test_gradients_of_packed_documents_are_those_of_finite_differences():
    query, key, value = (tensor.requires_grad_() for tensor in tensors(batch=1))
    packed = Packed(cu(0, 2, 5), cu(0, 1, 7))
    assert gradcheck(lambda *inputs: reference(*inputs, attn_mask=packed, causal=True)[0], (query, key, value))


def test_lse_is_detached():
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    out, lse = reference(query, key, value)
    assert out.requires_grad
    assert not lse.requires_grad


# --- equivalences -----------------------------------------------------------------------------------------------------


def same(left, right):
    torch.testing.assert_close(left[0], right[0])
    torch.testing.assert_close(left[1], right[1])


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("window_size", [(-1, -1), (0, 0), (2, 1), (-1, 0), (3, -1), (-1, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_is_a_mask(lengths, window_size, causal):
    query, key, value = tensors(queries=lengths[0], keys=lengths[1])
    mask = torch.zeros(1, 1, *lengths, dtype=torch.bool)
    for i in range(lengths[0]):
        for j in range(lengths[1]):
            distance = j - (i + lengths[1] - lengths[0])
            before = window_size[0] == -1 or distance >= -window_size[0]
            after = window_size[1] == -1 or distance <= window_size[1]
            mask[0, 0, i, j] = before and after and not (causal and distance > 0)
    expected = reference(query, key, value, attn_mask=mask)
    same(reference(query, key, value, window_size=window_size, causal=causal), expected)
    same(reference(query, key, value, attn_mask=torch.zeros(()).masked_fill(~mask, -INF)), expected)


def test_packed_is_a_loop_over_documents():
    query, key, value = tensors(batch=1, queries=9, keys=8)
    ends_q, ends_k = (0, 3, 3, 8, 9), (0, 2, 4, 8, 8)
    options = {"causal": True, "window_size": (2, 0), "softcap": 3.0}
    parts = [
        reference(query[:, a:b], key[:, c:d], value[:, c:d], **options)
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:])  # noqa: B905 (of unequal lengths on purpose)
    ]
    expected = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 2)
    same(reference(query, key, value, attn_mask=Packed(cu(*ends_q), cu(*ends_k)), **options), expected)


def test_packed_is_a_padded_batch():
    query, key, value = tensors(batch=2, queries=4, keys=4)
    expected, _ = reference(query[:1, :4], key[:1], value[:1], causal=True)
    other, _ = reference(query[1:, :2], key[1:, :2], value[1:, :2], causal=True)
    laid_out = (torch.cat([tensor[:1], tensor[1:, :2]], 1) for tensor in (query, key, value))
    out, _ = reference(*laid_out, attn_mask=Packed(cu(0, 4, 6)), causal=True)
    torch.testing.assert_close(out, torch.cat([expected, other], 1))


def test_gqa_is_repeated_heads():
    query, key, value = tensors(heads=6, key_heads=2)
    order = [0, 0, 0, 1, 1, 1]
    same(reference(query, key, value), reference(query, key[:, :, order], value[:, :, order]))


def test_each_head_and_each_batch_is_alone():
    query, key, value = tensors()
    out, lse = reference(query, key, value, causal=True)
    for b in range(2):
        for h in range(4):
            alone = reference(
                query[b : b + 1, :, h : h + 1], key[b : b + 1, :, h // 2][:, :, None], value[b : b + 1, :, h // 2][:, :, None],
                causal=True,
            )  # fmt: skip
            same(alone, (out[b : b + 1, :, h : h + 1], lse[b : b + 1, h : h + 1]))


def test_a_shift_of_the_scores_shifts_the_lse_only():
    query, key, value = tensors()
    out, lse = reference(query, key, value)
    shift = torch.randn(2, 4, 5, 1, dtype=torch.float64)
    same(reference(query, key, value, attn_mask=shift), (out, lse + shift[..., 0]))


def test_the_order_of_the_keys_does_not_matter():
    query, key, value = tensors()
    mask, order = torch.randn(2, 1, 5, 7), torch.randperm(7)
    expected = reference(query, key, value, attn_mask=mask)
    same(reference(query, key[:, order], value[:, order], attn_mask=mask[..., order]), expected)


def test_values_and_scale_are_linear():
    query, key, value = tensors()
    out, lse = reference(query * 2, key, value * 3, scale=0.25)
    expected, expected_lse = reference(query, key, value, scale=0.5)
    same((out, lse), (expected * 3, expected_lse))


def test_two_parts_of_the_keys_merge_by_their_lse():
    query, key, value = tensors()
    (a, lse_a), (b, lse_b) = (reference(query, key[:, part], value[:, part]) for part in (slice(0, 3), slice(3, 7)))
    lse = torch.logaddexp(lse_a, lse_b)
    share_a, share_b = ((part - lse).exp().transpose(1, 2)[..., None] for part in (lse_a, lse_b))
    same(reference(query, key, value), (a * share_a + b * share_b, lse))


def test_kept_probabilities_are_scaled_and_others_gone():
    query, key, _ = tensors(queries=7, heads=1, key_heads=1)
    unit = torch.eye(7, dtype=torch.float64).expand(2, 7, 7)[:, :, None]
    probabilities, lse = reference(query, key, unit)
    kept = torch.rand(2, 1, 7, 7) < 0.7
    expected = probabilities * kept.transpose(1, 2) / 0.7
    same(reference(query, key, unit, dropout_p=0.3, kept=kept), (expected, lse))


def test_half_precision_inputs_are_taken_as_they_are():
    query, key, value = tensors(dtype=torch.bfloat16)
    out, lse = reference(query, key, value)
    assert (out.dtype, lse.dtype) == (torch.float64, torch.float64)
    same((out, lse), reference(query.double(), key.double(), value.double()))


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("kind", ["none", "bool", "key padding", "packed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (2, 1)}, {"window_size": (0, -1)}, {"causal": True, "window_size": (1, 4)}],
)
def test_the_shared_mask_helpers_agree(lengths, kind, options):
    queries, keys = lengths
    query, key, value = tensors(batch=1, queries=queries, keys=keys)
    mask = {
        "none": lambda: None,
        "bool": lambda: torch.rand(1, 4, queries, keys) < 0.6,
        "key padding": lambda: KeyPadding(torch.rand(1, keys) < 0.6),
        "packed": lambda: Packed(cu(0, 2, 2, queries), cu(0, 3, 4, keys)),
    }[kind]()
    visible = visible_mask(query, key, attn_mask=mask, **options)
    same(reference(query, key, value, attn_mask=mask, **options), reference(query, key, value, attn_mask=visible))
