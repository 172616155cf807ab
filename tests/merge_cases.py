"""What ``merge`` and ``add`` are tested on, in whichever form; run as a script, with Triton's interpreter."""

from __future__ import annotations

import itertools
import os

import torch

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = [(2, 7, 3, 8), (1, 33, 2, 80), (1, 1, 1, 1), (2, 70, 3, 64), (2, 16, 4, 256)]
COUNTS = [2, 4, 3, 1]
ROUNDING = (
    1.0 if os.environ.get("TRITON_INTERPRET") == "1" else 0.5
)  # units in the last place; the interpreter cuts off


def drawn(shape, dtype, strided, random):
    """A result and its lse; a third of the rows sees nothing."""
    batch, length, heads, dim = shape
    out, lse = torch.randn(shape, generator=random).to(dtype), torch.randn(batch, heads, length, generator=random) * 30
    if strided:
        out = torch.randn(batch, heads, length, 2 * dim, generator=random).to(dtype).transpose(1, 2)[..., ::2]
        lse = (torch.randn(batch, length, heads, generator=random) * 30).transpose(1, 2)
    unseen = torch.randint(0, 3, (batch, heads, length), generator=random) == 0
    return out.masked_fill_(unseen.transpose(1, 2)[..., None], 0.0), lse.masked_fill_(unseen, -torch.inf)


def merged(parts):
    """The same in float64, from the sums of the softmax themselves."""
    levels = torch.stack([lse.double() for _, lse in parts])
    top = levels.amax(0).nan_to_num(neginf=0.0)
    sums = (levels - top).exp()
    weights = (sums / sums.sum(0).clamp_min(1e-300)).transpose(2, 3)[..., None]
    out = sum(part.double() * weight for (part, _), weight in zip(parts, weights, strict=True))
    return out, top + sums.sum(0).log()


def cases(device):
    """Parts, and a larger room with the rows that they are for: what is there counts as a part, where it is given as one."""
    random = torch.Generator().manual_seed(0)
    counts = itertools.cycle(COUNTS)
    for shape, dtype, strided, in_place in itertools.product(SHAPES, DTYPES, (False, True), (False, True)):
        room_dtype = torch.float32 if in_place or strided else getattr(torch, dtype)
        batch, length, heads, dim = shape
        room, room_lse = drawn((batch, length + 9, heads, dim), room_dtype, strided=False, random=random)
        room, room_lse = room.to(device), room_lse.to(device)
        rows = slice(4, 4 + length)
        parts = [drawn(shape, getattr(torch, dtype), strided, random) for _ in range(next(counts))]
        parts = [tuple(tensor.to(device) for tensor in part) for part in parts]
        if in_place:
            parts[0] = room[:, rows], room_lse[:, :, rows]
        yield parts, room, room_lse, rows, in_place


def largest_error(merge, device):
    """Of all cases, over the rounding of the result; inf where what lies beside the rows was touched."""
    worst = 0.0
    for parts, room, room_lse, rows, in_place in cases(device):
        before, before_lse = room.clone(), room_lse.clone()
        expected, expected_lse = merged(parts)
        target = parts[0] if in_place else (room[:, rows], room_lse[:, :, rows])
        merge(parts, *target)
        found, found_lse = room[:, rows], room_lse[:, :, rows]
        assert torch.equal(found_lse.isneginf(), expected_lse.isneginf())
        seen = ~expected_lse.isneginf()
        difference = (found_lse - expected_lse)[seen].abs() / expected_lse[seen].abs().clamp_min(1.0)
        worst = max(worst, _off(found, expected), *difference.tolist())
        worst = max(worst, _untouched(before, room, rows, 1), _untouched(before_lse, room_lse, rows, 2))
    return worst


def largest_error_of_sums(add, device):
    """The same of sums."""
    worst = 0.0
    for parts, room, _, rows, in_place in cases(device):
        before = room.clone()
        expected = sum(part.double() for part, _ in parts)
        add([part for part, _ in parts], parts[0][0] if in_place else room[:, rows])
        worst = max(worst, _off(room[:, rows], expected), _untouched(before, room, rows, 1))
    return worst


def _off(found, expected):
    """The largest difference, less what a narrow dtype is rounded by."""
    rounding = 0.0 if found.dtype == torch.float32 else expected.abs() * torch.finfo(found.dtype).eps * ROUNDING + 1e-7
    return ((found.double() - expected).abs() - rounding).clamp_min(0.0).max().item()


def _untouched(before, after, rows, dim):
    """0.0, or inf where anything beside the rows has changed."""
    beside = [slice(None)] * dim + [slice(0, rows.start)], [slice(None)] * dim + [slice(rows.stop, None)]
    return 0.0 if all(torch.equal(before[tuple(at)], after[tuple(at)]) for at in beside) else float("inf")


if __name__ == "__main__":
    from attn_core.parallel import fused

    print(max(largest_error(fused.merge, "cpu"), largest_error_of_sums(fused.add, "cpu")))
