"""Results of pieces put together for the rows that they are for, however many wait for one pass."""

from __future__ import annotations

import random

import pytest
import torch

from attn_core.parallel import rows as under_test
from attn_core.parallel.layout import Segment
from attn_core.parallel.rows import Rows

LENGTH = 24


def pieces(seed, dtype):
    """Segments of rows with a result and an lse for each; some rows are in none."""
    chance, normal = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(chance.randrange(12)):
        start = chance.choice([0, 0, 6, 12, 12, 17])
        stop = chance.choice([LENGTH - 2, LENGTH - 2, start + 5, 18])
        if chance.random() < 0.3:
            start, stop = 0, LENGTH
        if start < stop:
            part = torch.randn(2, stop - start, 3, 8, generator=normal).to(dtype)
            yield Segment(start, stop), (part, torch.randn(2, 3, stop - start, generator=normal) * 5)


def expected(given, *, weighted):
    """All at once, in float64."""
    out = torch.zeros(len(given), 2, LENGTH, 3, 8, dtype=torch.float64)
    lse = torch.full((len(given), 2, 3, LENGTH), -torch.inf, dtype=torch.float64)
    for nth, ((start, stop), (part, level)) in enumerate(given):
        out[nth, :, start:stop], lse[nth, :, :, start:stop] = part.double(), level.double()
    if not weighted:
        return (out.sum(0),)
    total = lse.logsumexp(0) if given else torch.full(lse.shape[1:], -torch.inf)
    weights = (lse - total).exp().nan_to_num(0.0)
    return (out * weights.transpose(2, 3)[..., None]).sum(0), total


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [2, 3, 4])
def test_is_what_one_gets_of_all_at_once(at_once, dtype, weighted, monkeypatch):
    monkeypatch.setattr(under_test, "at_once", lambda query: at_once)
    for seed in range(60):
        given = list(pieces(seed, dtype))
        found = Rows(torch.empty(2, LENGTH, 3, 5, dtype=dtype), 8, weighted=weighted)
        kept = [[tensor.clone() for tensor in part] for _, part in given]
        for segment, part in given:
            found.add(segment, part if weighted else part[:1])
        results, wanted = found.finished(), expected(given, weighted=weighted)
        assert results[0].dtype == dtype
        assert all(tensor.is_contiguous() for tensor in results)
        for result, right in zip(results, wanted, strict=True):
            bound = {"rtol": 1e-2, "atol": 1e-2} if result.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(result.double(), right.double(), **bound)
        for (_, part), before in zip(given, kept, strict=True):  # a kernel may keep what it has given
            assert all(torch.equal(tensor, old) for tensor, old in zip(part, before, strict=True))


def test_narrow_results_are_rounded_once():
    query = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16)
    found = Rows(query, 1, weighted=False)
    for number in (256.0, 0.5, 0.5, 0.5, 0.5):
        found.add(Segment(0, 1), (torch.full_like(query, number),))
    assert found.finished()[0].item() == 258.0
