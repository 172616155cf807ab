"""What kernels give, made into what is meant."""

from __future__ import annotations

import pytest
import torch

from attn_core.shaping import natural_lse

inf, nan = torch.inf, torch.nan


@pytest.mark.parametrize("nothing", [inf, -inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_lse_is_minus_infinity_for_nothing_and_nan_for_a_nan_in_the_scores(dtype, nothing):
    lse = torch.tensor(
        [1.5, nothing, nothing, 2.5, 3.5, nan, -4.5], dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    out = torch.ones(7, 1, 4, dtype=dtype)
    out[1] = 0.0
    out[2] = nan
    out[3] = nan  # where keys are split, the part with the NaN is left out of the lse
    out[4, :, 0] = nan  # of a value
    out[5] = nan
    out[6] = inf
    found = natural_lse(lse[None], out, nothing)
    assert found.dtype == lse.dtype
    torch.testing.assert_close(found[0], lse.new_tensor([1.5, -inf, nan, nan, 3.5, nan, -4.5]), equal_nan=True)


@pytest.mark.parametrize("nothing", [inf, -inf])
@pytest.mark.parametrize("queries", [5, 64 * 600])
def test_where_each_query_sees_a_key_the_number_is_of_nan_alone(nothing, queries):
    lse, out = torch.full((1, queries), 1.5), torch.ones(queries, 1, 4)
    lse[0, :4] = torch.tensor([-4.5, nothing, nan, -nothing])
    out[1] = out[2] = nan
    found = natural_lse(lse, out, nothing, all_see=True)
    torch.testing.assert_close(found[0, :5], torch.tensor([-4.5, nan, nan, -nothing, 1.5]), equal_nan=True)
    out[4] = nan  # where keys are split
    assert natural_lse(lse, out, nothing, all_see=True)[0, 4].isnan() == (queries == 5)


def test_keys_are_not_split_where_there_are_many_queries():
    queries = 64 * 600
    out, lse = torch.zeros(queries, 1, 2, dtype=torch.float16), torch.ones(1, queries)
    out[5], lse[:, 6] = nan, inf
    found = natural_lse(lse, out)
    assert found[0, 5] == 1.0  # nobody looks
    assert found[0, 6] == -inf
