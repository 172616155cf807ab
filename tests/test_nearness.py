"""An approximate backend is held to its error in the whole, in each head and in each row."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attn_core.testing import reference
from attn_core.testing.nearness import assert_near

ERROR = 0.02
near = partial(assert_near, bound=torch.zeros(()), error=ERROR)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(tensor, block):
    """As int8, with a scale for each block of rows of a head."""
    parts = []
    for part in tensor.split(block, 1):
        size = part.abs().amax((1, 3), keepdim=True) / 127
        parts.append((part / size).round() * size)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 70), (5, 17), (33, 33), (130, 130), (300, 300), (7, 600)])
@pytest.mark.parametrize("dim", [64, 128])
def test_queries_and_keys_rounded_to_8_bits_are_within_what_such_backends_declare(queries, keys, causal, dim):
    tensors = [drawn(2, length, 3, dim, seed=n) for n, length in enumerate((queries, keys, keys))]
    expected, expected_lse = reference(*tensors, causal=causal)
    out, lse = reference(rounded(tensors[0], 128), rounded(tensors[1], 64), tensors[2], causal=causal)
    near(out, expected, what="result")
    near(lse, expected_lse, what="lse")


@pytest.fixture
def expected():
    return drawn(2, 300, 4, 16)


def refused(found, expected, **options):
    with pytest.raises(AssertionError, match=r"a relative error of 0\.02") as told:
        near(found, expected, **{"what": "result", **options})
    return str(told.value)


def test_the_whole_may_be_off_by_the_error_and_no_more(expected):
    near(1.019 * expected, expected, what="result")
    assert refused(1.021 * expected, expected).startswith("result: is off by")


def test_a_head_that_is_off_by_more_is_no_average_of_all(expected):
    found = expected.clone()
    found[1, :, 2] *= 1.03
    assert refused(found, expected).startswith("result: head (1, 2) is off by")


def test_a_row_that_is_off_by_more_is_no_average_of_all(expected):
    found = expected.clone()
    found[0, 17, 3] *= 0.75
    assert float((found - expected).norm() / expected.norm()) < ERROR
    assert refused(found, expected).startswith("result: row (0, 17, 3) is off by")


def test_a_row_that_is_small_beside_its_head_may_be_off_as_that_is(expected):
    expected[0, 17, 3] *= 1e-3
    found = expected.clone()
    found[0, 17, 3] += 3 * ERROR
    near(found, expected, what="result")


def test_a_row_of_zeros_is_zero(expected):
    expected[0, 17, 3] = 0
    found = expected.clone()
    found[0, 17, 3] = 1e-6
    assert refused(found, expected).startswith("result: row (0, 17, 3) is off by")
    near(found, expected, what="result", bound=torch.full((), 1e-6))


def test_one_number_of_the_lse_is_no_average_of_all():
    expected = drawn(2, 4, 300)
    found = expected.clone()
    found[1, 2, 17] += 3.9 * ERROR
    near(found, expected, what="lse")
    found[1, 2, 17] += 0.2 * ERROR
    assert refused(found, expected, what="lse").startswith("lse: row (1, 2, 17) is off by")
    assert refused(expected + 1.01 * ERROR, expected, what="lse").startswith("lse: is off by")


def test_infinities_are_where_they_are_expected():
    expected = drawn(1, 1, 4)
    expected[0, 0, 2] = -torch.inf
    near(expected.clone(), expected, what="lse")
    with pytest.raises(AssertionError, match="infinities are not where"):
        near(expected.nan_to_num(), expected, what="lse")
