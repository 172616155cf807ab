"""A stand-in of sageattention 1.0.6 in plain torch: the same signature, and the same results, mistakes included.

What its source does: queries times the scale are rounded to int8 in blocks of 128, keys in blocks of 64, NaN becoming 0; scores
are in base 2; the keys that the last block of 64 lacks have a score of 0 and are counted unless causal; the causal
diagonal begins at the first key; probabilities and values are float16. ``smooth_k`` changes the caller's keys.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

LOG2_E = 1.44269504


def in_parts(function):
    """Thousands of sequences one part after another, for the sake of the memory."""

    def run(q, k, v, *settings, **options):
        if len(q) <= 1024:
            return function(q, k, v, *settings, **options)
        parts = zip(q.split(1024), k.split(1024), v.split(1024), strict=True)
        return torch.cat([function(*part, *settings, **options) for part in parts])

    return run


@in_parts
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    dtype = q.dtype
    assert dtype in [torch.float16, torch.bfloat16, torch.float32]
    assert q.device == k.device == v.device
    assert q.dtype == k.dtype == v.dtype
    assert q.size(-1) in [64, 96, 128]
    assert q.stride(-1) == 1
    assert k.stride(-1) == 1
    assert v.stride(-1) == 1
    if smooth_k:
        k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
    if tensor_layout == "NHD":
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scale = (q.shape[3] ** -0.5 if sm_scale is None else sm_scale) * LOG2_E
    q, q_scale = quantised(q.float() * scale, 128)
    k, k_scale = (tensor.repeat_interleave(groups, 1) for tensor in quantised(k.float(), 64))
    v = pad(v.half().float(), (0, 0, 0, -v.shape[2] % 64)).repeat_interleave(groups, 1)
    scores = (q @ k.mT) * q_scale * k_scale.mT
    if is_causal:
        assert q.shape[2] == k.shape[2]
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device="cpu").tril()
        scores = torch.where(seen, scores, scores - 1e6)
        v = v[:, :, : k.shape[2]]
        if 0 < k.shape[2] % 128 <= 64:  # reads the scale of a block that is not there, which may be anything
            scores = scores * torch.nan
    else:
        scores = pad(scores, (0, -k.shape[2] % 64))
    out = weighted(scores, v).to(dtype)
    return out.transpose(1, 2).contiguous() if tensor_layout == "NHD" else out


def quantised(x, block, least=0.0):
    """Whole numbers up to 127 and a scale for each row, the same one in a block of rows."""
    block = min(block, x.shape[2])
    missing = -x.shape[2] % block
    blocks = pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block))
    scale = blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax((-2, -1), keepdim=True) / 127 + least
    rounded = blocks / scale
    rounded = (rounded + 0.5 * rounded.sign()).trunc().nan_to_num(nan=0.0).clamp(-128, 127)
    rows = slice(0, x.shape[2])
    return rounded.flatten(2, 3)[:, :, rows], scale.expand(*blocks.shape[:-1], 1).flatten(2, 3)[:, :, rows]


def weighted(scores, v):
    """The average of the values, weighted by 2 to the scores; the largest score is found without regard to NaN."""
    best = scores.masked_fill(scores.isnan(), -torch.inf).amax(-1, keepdim=True)
    weights = torch.exp2(scores - best)
    return (weights.half().float() @ v) / weights.sum(-1, keepdim=True)
