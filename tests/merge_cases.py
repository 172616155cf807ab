"""What ``merge_`` is tested on, in whichever form; run as a script, with Triton's interpreter."""

from __future__ import annotations

import itertools

import torch

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = [(2, 7, 3, 8), (1, 33, 2, 80), (1, 1, 1, 1), (2, 70, 3, 64), (2, 16, 4, 256)]


def drawn(shape, dtype, device, strided, seed):
    """A whole, some rows of it to merge into, and a part; a third of the rows sees nothing on one side or on both."""
    random = torch.Generator().manual_seed(seed)
    batch, length, heads, dim = shape

    def normal(*size):
        return torch.randn(size, generator=random).to(device)

    whole, whole_lse = normal(batch, length + 9, heads, dim), normal(batch, heads, length + 9) * 30
    part, part_lse = normal(batch, length, heads, dim).to(dtype), normal(batch, heads, length) * 30
    if strided:
        part = normal(batch, heads, length, 2 * dim).to(dtype).transpose(1, 2)[..., ::2]
        part_lse = (normal(batch, length, heads) * 30).transpose(1, 2)
    sight = torch.randint(0, 6, (batch, heads, length), generator=random).to(device)
    rows = slice(4, 4 + length)
    unseen, part_unseen = (sight <= 1), (sight == 0) | (sight == 2)
    whole_lse[:, :, rows].masked_fill_(unseen, -torch.inf)
    whole[:, rows].masked_fill_(unseen.transpose(1, 2)[..., None], 0.0)
    part_lse.masked_fill_(part_unseen, -torch.inf)
    part.masked_fill_(part_unseen.transpose(1, 2)[..., None], 0.0)
    return whole, whole_lse, rows, part, part_lse


def merged(out, lse, part, part_lse):
    """The same in float64, from the sums of the softmax themselves."""
    both = torch.stack((lse.double(), part_lse.double()))
    top = both.amax(0).nan_to_num(neginf=0.0)
    sums = (both - top).exp()
    weights = (sums / sums.sum(0).clamp_min(1e-300)).transpose(2, 3)[..., None]
    return out.double() * weights[0] + part.double() * weights[1], top + sums.sum(0).log()


def largest_error(merge, device):
    """Of all cases; inf where what lies beside the rows was touched."""
    worst = 0.0
    for seed, (shape, dtype, strided) in enumerate(itertools.product(SHAPES, DTYPES, (False, True))):
        whole, whole_lse, rows, part, part_lse = drawn(shape, getattr(torch, dtype), device, strided, seed)
        before, before_lse = whole.clone(), whole_lse.clone()
        expected, expected_lse = merged(whole[:, rows], whole_lse[:, :, rows], part, part_lse)
        merge(whole[:, rows], whole_lse[:, :, rows], part, part_lse)
        assert torch.equal(whole_lse[:, :, rows].isneginf(), expected_lse.isneginf())
        seen = ~expected_lse.isneginf()
        difference = (whole_lse[:, :, rows] - expected_lse)[seen].abs() / expected_lse[seen].abs().clamp_min(1.0)
        worst = max(worst, (whole[:, rows] - expected).abs().max().item(), *difference.tolist())
        before[:, rows], before_lse[:, :, rows] = whole[:, rows], whole_lse[:, :, rows]
        if not (torch.equal(before, whole) and torch.equal(before_lse, whole_lse)):
            worst = float("inf")
    return worst


if __name__ == "__main__":
    from attn_core.parallel import fused

    print(largest_error(fused.merge_, "cpu"))
