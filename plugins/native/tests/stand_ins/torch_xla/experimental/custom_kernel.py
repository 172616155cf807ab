"""A stand-in of torch_xla 2.9.0's flash attention in plain torch: the same signature, limits and conventions."""

from __future__ import annotations

import torch

HIDDEN = -0.7 * torch.finfo(torch.float32).max


BLOCKS = {"q": (512,), "k": (512,)}
BLOCKS_OF_BACKWARD = {"q": (1024, 512), "k": (512, 256)}


def verify(blocks, **lengths):
    """As jax does: a block is as long as the sequence at most, and divides it."""
    for name, length in lengths.items():
        for block in blocks[name]:
            if length % min(block, length):
                raise ValueError(f"{name}={length} must be divisible by block={min(block, length)}")


class Verified(torch.autograd.Function):
    """Verifies the blocks of the backward, when it is run."""

    @staticmethod
    def forward(ctx, out, queries, keys):
        ctx.lengths = {"q": queries, "k": keys}
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        verify(BLOCKS_OF_BACKWARD, **ctx.lengths)
        return grad, None, None


def flash_attention(
    q,
    k,
    v,
    causal=False,
    q_segment_ids=None,
    kv_segment_ids=None,
    sm_scale=1.0,
    *,
    ab=None,
    partition_spec=None,
    mesh=None,
):
    assert ab is None
    assert q.shape[:2] == k.shape[:2] == v.shape[:2]
    assert sm_scale > 0
    for tensor in (q, k):
        length = tensor.shape[2]
        assert length % 128 == 0
    verify(BLOCKS, q=q.shape[2], k=k.shape[2])
    assert (q_segment_ids is None) == (kv_segment_ids is None)
    scores = (q.float() @ k.float().mT) * sm_scale
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device="cpu")
    if causal:
        hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool, device="cpu").tril()
    if q_segment_ids is not None:
        hidden = hidden | (q_segment_ids[:, None, :, None] != kv_segment_ids[:, None, None, :])
    out = (scores.masked_fill(hidden, HIDDEN).softmax(-1) @ v.float()).to(q.dtype)
    return Verified.apply(out, q.shape[2], k.shape[2])
