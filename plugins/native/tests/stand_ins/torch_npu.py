"""A stand-in of torch_npu in plain torch: the signature and the conventions of its documentation."""

from __future__ import annotations

import torch


def npu_fusion_attention(
    query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0,
    pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0, prefix=None, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False,
):  # fmt: skip
    assert pse is None
    assert padding_mask is None
    assert keep_prob == 1.0
    assert scale > 0
    assert query.shape[-1] % 16 == 0
    assert query.dtype in (torch.float16, torch.bfloat16)
    if input_layout == "TND":
        assert atten_mask is None
        parts, before = [], (0, 0)
        for ends in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
            rows_q, rows_k = slice(before[0], ends[0]), slice(before[1], ends[1])
            assert ends[0] > before[0]
            assert ends[1] > before[1]
            one = query[None, rows_q], key[None, rows_k], value[None, rows_k]
            parts.append(attend(*one, None, scale))
            before = ends
        assert before == (query.shape[0], key.shape[0])
        out, largest, total = (torch.cat(items, 1)[0] for items in zip(*parts, strict=True))
        return (
            out,
            *(eight(item) for item in (largest, total)),
            torch.empty(0, dtype=torch.float32, device="cpu"),
            0,
            0,
            0,
        )
    assert input_layout == "BSND"
    assert head_num == query.shape[2]
    hidden = atten_mask
    if sparse_mode == 3:
        assert atten_mask.shape == (2048, 2048)
        assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool, device="cpu").triu(1))
        lengths = query.shape[1], key.shape[1]
        assert lengths[0] <= lengths[1]
        hidden = ~torch.ones(lengths, dtype=torch.bool, device="cpu").tril(lengths[1] - lengths[0])
    elif hidden is not None:
        sizes = query.shape[0], query.shape[2]
        assert hidden.dtype == torch.bool
        assert tuple(hidden.shape[:2]) in {sizes, (sizes[0], 1), (1, 1)}
        assert hidden.shape[2:] == (query.shape[1], key.shape[1])
    out, largest, total = attend(query, key, value, hidden, scale)
    return (
        out,
        eight(largest.transpose(1, 2)),
        eight(total.transpose(1, 2)),
        torch.empty(0, dtype=torch.float32, device="cpu"),
        0,
        0,
        0,
    )


def attend(query, key, value, hidden, scale):
    """A hidden score is low, not infinite: the queries that see nothing see all alike. (B, S, H, ...) throughout."""
    groups = query.shape[2] // key.shape[2]
    q, k, v = (tensor.transpose(1, 2).float() for tensor in (query, key, value))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.mT) * scale
    scores = scores if hidden is None else scores.masked_fill(hidden, -torch.finfo(torch.float32).max / 2)
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights / total) @ v
    return out.transpose(1, 2).to(query.dtype), largest[..., 0].transpose(1, 2), total[..., 0].transpose(1, 2)


def eight(tensor):
    return tensor.unsqueeze(-1).expand(*tensor.shape, 8)
