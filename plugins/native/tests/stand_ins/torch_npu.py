"""A stand-in of torch_npu in plain torch: the signature and the conventions of its documentation."""

from __future__ import annotations

import torch


def npu_fusion_attention(
    query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0,
    pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0, prefix=None, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False,
):  # fmt: skip
    check(query, pse, padding_mask, keep_prob, scale, head_num)
    if input_layout == "TND":
        assert atten_mask is None
        parts = []
        for rows_q, rows_k in sequences(query, key, actual_seq_qlen, actual_seq_kvlen):
            one = query[None, rows_q], key[None, rows_k], value[None, rows_k]
            parts.append(attend(*one, None, scale))
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
    hidden = hidden_of(query, key, atten_mask, sparse_mode)
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


def npu_fusion_attention_grad(
    query, key, value, dy, head_num, input_layout, *, pse=None, padding_mask=None, atten_mask=None, softmax_max=None,
    softmax_sum=None, softmax_in=None, attention_in=None, scale_value=1.0, keep_prob=1.0, pre_tockens=2147483647,
    next_tockens=2147483647, inner_precise=0, seed=0, offset=0, numels=0, prefix=None, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False,
):  # fmt: skip
    check(query, pse, padding_mask, keep_prob, scale_value, head_num)
    if input_layout == "TND":
        parts = []
        for rows_q, rows_k in sequences(query, key, actual_seq_qlen, actual_seq_kvlen):
            one = (
                query[None, rows_q],
                key[None, rows_k],
                value[None, rows_k],
                dy[None, rows_q],
                attention_in[None, rows_q],
            )
            softmax = (item[None, rows_q].transpose(1, 2)[..., :1] for item in (softmax_max, softmax_sum))
            parts.append(gradients(*one, *softmax, None, scale_value))
        grads = [torch.cat(items, 1)[0] for items in zip(*parts, strict=True)]
    else:
        softmax = (item[..., :1] for item in (softmax_max, softmax_sum))
        hidden = hidden_of(query, key, atten_mask, sparse_mode)
        grads = gradients(query, key, value, dy, attention_in, *softmax, hidden, scale_value)
    return (*grads, torch.empty(0, dtype=torch.float32, device="cpu"))


def check(query, pse, padding_mask, keep_prob, scale, head_num):
    assert pse is None
    assert padding_mask is None
    assert keep_prob == 1.0
    assert scale > 0
    assert query.shape[-1] % 16 == 0
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert head_num == query.shape[-2]
    assert head_num <= 256


def sequences(query, key, ends_q, ends_k):
    assert len(ends_q) <= 2048
    before = (0, 0)
    for ends in zip(ends_q, ends_k, strict=True):
        assert ends[0] > before[0]
        assert ends[1] > before[1]
        yield slice(before[0], ends[0]), slice(before[1], ends[1])
        before = ends
    assert before == (query.shape[0], key.shape[0])


def hidden_of(query, key, atten_mask, sparse_mode):
    if sparse_mode == 3:
        assert atten_mask.shape == (2048, 2048)
        assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool, device="cpu").triu(1))
        lengths = query.shape[1], key.shape[1]
        assert lengths[0] <= lengths[1]
        return ~torch.ones(lengths, dtype=torch.bool, device="cpu").tril(lengths[1] - lengths[0])
    if atten_mask is not None:
        sizes = query.shape[0], query.shape[2]
        assert atten_mask.dtype == torch.bool
        assert tuple(atten_mask.shape[:2]) in {sizes, (sizes[0], 1), (1, 1)}
        assert atten_mask.shape[2:] == (query.shape[1], key.shape[1])
    return atten_mask


def scores_of(query, key, hidden, scale):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.mT) * scale
    return scores if hidden is None else scores.masked_fill(hidden, -torch.finfo(torch.float32).max / 2)


def gradients(query, key, value, dy, out, largest, total, hidden, scale):
    """From the maximum and the sum of each query's softmax, (B, H, S, 1). (B, S, H, D) otherwise."""
    heads = key.shape[2]
    q, k, v, grad, out = (tensor.transpose(1, 2).float() for tensor in (query, key, value, dy, out))
    wide_k, wide_v = (tensor.repeat_interleave(q.shape[1] // heads, 1) for tensor in (k, v))
    weights = (scores_of(q, k, hidden, scale) - largest).exp() / total
    change = weights * (grad @ wide_v.mT - (grad * out).sum(-1, keepdim=True))
    dq, dk, dv = change @ wide_k * scale, change.mT @ q * scale, weights.mT @ grad
    dk, dv = (each.unflatten(1, (heads, -1)).sum(2) for each in (dk, dv))
    return [each.transpose(1, 2).to(query.dtype) for each in (dq, dk, dv)]


def attend(query, key, value, hidden, scale):
    """A hidden score is low, not infinite: the queries that see nothing see all alike. (B, S, H, ...) throughout."""
    groups = query.shape[2] // key.shape[2]
    q, k, v = (tensor.transpose(1, 2).float() for tensor in (query, key, value))
    scores = scores_of(q, k, hidden, scale)
    v = v.repeat_interleave(groups, 1)
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights / total) @ v
    return out.transpose(1, 2).to(query.dtype), largest[..., 0].transpose(1, 2), total[..., 0].transpose(1, 2)


def eight(tensor):
    return tensor.unsqueeze(-1).expand(*tensor.shape, 8)
