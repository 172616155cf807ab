"""What the test's kernel repositories hold: functions with the signatures and conventions of the real ones, in plain torch."""

PLAIN = """
import torch

def attend(q, k, v, scale, causal, blind_lse):
    groups = q.shape[2] // k.shape[2]
    q, k, v = (tensor.transpose(1, 2).float() for tensor in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT
    assert scale > 0, "the largest score is looked for before the scale"
    scores = scores * scale
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cpu").tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    lse = scores.detach().logsumexp(-1).masked_fill(blind[..., 0], blind_lse)
    return (weights @ v).transpose(1, 2), lse

def dense(q, k, v, scale, causal, blind_lse):
    assert q.shape[-1] % 8 == 0 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.dtype in (torch.float16, torch.bfloat16)
    out, lse = attend(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, causal, blind_lse)
    return out.to(q.dtype), lse

def packed(q, k, v, starts_q, starts_k, longest_q, longest_k, scale, causal, blind_lse):
    assert starts_q.dtype == starts_k.dtype == torch.int32 and longest_q >= 2
    outs, lses = [], []
    for (a, b), (c, d) in zip(zip(starts_q.tolist(), starts_q.tolist()[1:]), zip(starts_k.tolist(), starts_k.tolist()[1:])):
        assert b - a <= longest_q and d - c <= longest_k
        if d == c:
            outs.append(q[a:b] * 0.0)
            lses.append(torch.full((q.shape[1], b - a), blind_lse, dtype=torch.float32, device="cpu"))
            continue
        out, lse = dense(q[None, a:b], k[None, c:d], v[None, c:d], scale, causal, blind_lse)
        outs.append(out[0])
        lses.append(lse[0])
    outs.append(q[:0] + (k[:0].sum() + v[:0].sum()))  # all three are in the graph, as in that of an autograd function
    rest = q.shape[0] - starts_q.tolist()[-1]
    lses.append(torch.zeros(q.shape[1], rest, dtype=torch.float32, device="cpu"))
    return torch.cat([*outs, q[:rest] * 0.0]), torch.cat(lses, 1)
"""

FLASH_2 = (
    PLAIN
    + """
INF = float("inf")

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    out, lse = dense(q, k, v, softmax_scale, causal, INF)
    return (out, lse, None) if return_attn_probs else out

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                           causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                           return_attn_probs=False, block_table=None):
    out, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, INF)
    return (out, lse, None) if return_attn_probs else out
"""
)
FLASH_3 = (
    PLAIN
    + """
INF = -float("inf")

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
                    sm_margin=0, return_attn_probs=False):
    found = dense(q, k, v, softmax_scale, causal, INF)
    return found if return_attn_probs else found[0]

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                           softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                           window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                           deterministic=False, sm_margin=0, return_attn_probs=False):
    found = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, INF)
    return found if return_attn_probs else found[0]
"""
)
FLASH_4 = (
    PLAIN
    + """
INF = -float("inf")

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
                    num_splits=1, pack_gqa=None, deterministic=False, return_lse=False):
    out, lse = dense(q, k, v, softmax_scale, causal, INF)
    return out, lse if return_lse else None

def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                           seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,
                           window_size=(None, None), softcap=0.0, num_splits=1, pack_gqa=None, return_lse=False):
    out, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, INF)
    return out, lse if return_lse else None
"""
)
AITER = (
    PLAIN
    + """
INF = -float("inf")

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1, 0), bias=None,
                    alibi_slopes=None, return_lse=False, return_attn_probs=False, s_aux=None, **kwargs):
    assert not kwargs, "what it does not know it drops"
    with torch.no_grad():
        found = dense(q, k, v, softmax_scale, causal, INF)
    return found if return_lse else found[0]

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                           causal=False, window_size=(-1, -1, 0), bias=None, alibi_slopes=None, return_lse=False, **kwargs):
    assert not kwargs, "what it does not know it drops"
    with torch.no_grad():
        found = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, INF)
    return found if return_lse else found[0]
"""
)
SAGE = (
    PLAIN
    + """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "NHD" and not is_causal and sm_scale >= 0 and k.shape[1] % 128 == 0 and not kwargs
    out, lse = attend(q, k, v, max(sm_scale, 1e-30), False, 0.0)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)
"""
)
SAGE_BLACKWELL = (
    PLAIN
    + """
def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and attn_mask is None and not kwargs
    k -= k.mean(dim=-2, keepdim=True)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, _ = attend(q, k, v, q.shape[-1] ** -0.5, is_causal, 0.0)
    return out.to(q.dtype).transpose(1, 2)
"""
)

SOURCES = {
    "kernels-community/flash-attn2": FLASH_2,
    "kernels-community/flash-attn3": FLASH_3,
    "kernels-community/flash-attn4": FLASH_4,
    "kernels-community/aiter-flash-attn-ck": AITER,
    "SageAttention/sage-attention": SAGE,
    "SageAttention/sage-blackwell": SAGE_BLACKWELL,
}
