"""What the test's kernel repositories hold: files with the signatures and conventions of the real ones, in plain torch.

What a kernel reads by pointers, 16 bytes at a time, is held to that: the last dimension dense, and all else a multiple of 8.
"""

PLAIN = """
import torch
from torch.nn.functional import pad

def readable(*tensors):
    assert not torch.compiler.is_dynamo_compiling(), "the library is not for tracing here"
    for tensor in tensors:
        assert type(tensor) is torch.Tensor, "the library reads memory"
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        strides = [step for step, size in zip(tensor.stride(), tensor.shape) if size > 1]
        assert tensor.shape[-1] % 8 == 0 and tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension"
        assert tensor.storage_offset() % 8 == 0 and not any(step % 8 for step in strides[:-1]), "misaligned address"

def repeated(q, k):
    return k.float().repeat_interleave(q.shape[-3] // k.shape[-3], -3)

def probabilities(q, k, scale, causal, queries=None, keys=None):
    # of what was read so many queries and keys are of the sequence
    assert scale > 0, "the largest score is looked for before the scale"
    queries, keys = q.shape[-2] if queries is None else queries, k.shape[-2] if keys is None else keys
    scores = q.float() @ repeated(q, k).mT * scale
    seen = (torch.arange(scores.shape[-1], device="cpu") < keys).expand(scores.shape[-2:])
    if causal:
        seen = seen.tril(keys - queries)
    return scores.masked_fill(~seen, -torch.inf)

def attend(q, k, v, scale, causal, blind_lse, keys=None):
    # (B, S, H, D)
    q, k, v = (tensor.transpose(-2, -3) for tensor in (q, k, v))
    scores = probabilities(q, k, scale, causal, None, keys)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    lse = scores.logsumexp(-1).masked_fill(blind[..., 0], blind_lse)
    lse = lse.masked_fill(lse.isnan(), blind_lse)
    return (weights @ repeated(q, v)).transpose(-2, -3), lse

def gradients(grad, q, k, v, out, lse, scale, causal, blind_lse, queries=None, keys=None):
    # of a sequence, (S, H, D), from a result and an lse that may be those of a longer one
    assert not (lse == -blind_lse).any(), "the lse of another convention"
    heads = k.shape[1]
    grad, q, k, v, out = (tensor.transpose(0, 1).float() for tensor in (grad, q, k, v, out))
    weights = (probabilities(q, k, scale, causal, queries, keys) - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp()
    change = weights * (grad @ repeated(q, v).mT - (grad * out).sum(-1, keepdim=True))
    dq, dk, dv = change @ repeated(q, k) * scale, change.mT @ q * scale, weights.mT @ grad
    dk, dv = (each.unflatten(0, (heads, -1)).sum(1) for each in (dk, dv))
    return [each.transpose(0, 1) for each in (dq, dk, dv)]

def dense(q, k, v, scale, causal, blind_lse):
    readable(q, k, v)
    out, lse = attend(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, causal, blind_lse)
    return out.to(q.dtype).contiguous(), lse

def shortened(q, k, v, lengths, scale, causal, blind_lse):
    readable(q, k, v)
    assert lengths.dtype == torch.int32 and lengths.is_contiguous() and lengths.shape == k.shape[:1]
    assert q.ndim == k.ndim == 4 and int(lengths.max()) <= k.shape[1]
    parts = [attend(*one, scale, causal, blind_lse, int(keys)) for *one, keys in zip(q, k, v, lengths)]
    out, lse = (torch.stack(part) for part in zip(*parts))
    return out.to(q.dtype).contiguous(), lse

def slices(starts, longest, tensor):
    if starts is None:
        return [slice(number * tensor.shape[1], (number + 1) * tensor.shape[1]) for number in range(tensor.shape[0])]
    assert starts.dtype == torch.int32 and max(starts.diff().tolist()) <= longest
    return [slice(*ends) for ends in zip(starts.tolist(), starts.tolist()[1:])]

def read(place, whole, size, dense, tile):
    # in tiles, on into what is packed behind a sequence, and weighed with 0 there
    end = whole.stop if dense else size
    return slice(place.start, min(place.start + max(-(-(place.stop - place.start) // tile), 1) * tile, end)) if tile else place

def packed(q, k, v, starts_q, starts_k, longest_q, longest_k, scale, causal, blind_lse, tile=0):
    readable(q, k, v)
    assert longest_q >= 2
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), blind_lse, dtype=torch.float32, device="cpu")
    for rows, keys in zip(slices(starts_q, longest_q, q), slices(starts_k, longest_k, k)):
        if keys.stop > keys.start:
            wide = read(keys, keys, k.shape[0], False, tile)
            part, lse[:, rows] = attend(q[rows], k[wide], v[wide], scale, causal, blind_lse, keys.stop - keys.start)
            out[rows] = part.to(q.dtype)
    return out, lse

def backward(grad, q, k, v, out, lse, starts, scale, causal, blind_lse, lengths=None, tile=0):
    # what is beyond the keys of a sequence stays unwritten
    readable(grad, q, k, v, out)
    assert lse.dtype == torch.float32 and lse.is_contiguous() and q.shape[-1] == v.shape[-1]
    starts_q, starts_k, longest_q, longest_k = starts or (None,) * 4
    if starts_q is not None and longest_k == 0:
        raise RuntimeError("CUDA error: invalid argument")  # a grid of no blocks
    places = list(zip(slices(starts_q, longest_q, q), slices(starts_k, longest_k, k)))
    lse = lse.transpose(0, 1).flatten(1) if starts_q is None else lse
    flat = [tensor.flatten(0, 1) if tensor.ndim == 4 else tensor for tensor in (grad, q, k, v, out)]
    grads = [torch.full_like(tensor, torch.nan if lengths is not None else 0.0) for tensor in flat[1:4]]
    for number, (rows, whole) in enumerate(places):
        keys = whole if lengths is None else slice(whole.start, whole.start + int(lengths[number]))
        queries, count = rows.stop - rows.start, keys.stop - keys.start
        high = read(rows, rows, flat[1].shape[0], starts_q is None, tile)
        wide = read(keys, whole, flat[2].shape[0], starts_k is None, tile)
        more = high.stop - high.start - queries
        own = pad(flat[4][rows], (0, 0, 0, 0, 0, more)), pad(lse[:, rows], (0, more), value=blind_lse)
        read_on = flat[0][high], flat[1][high], flat[2][wide], flat[3][wide], *own
        found = gradients(*read_on, scale, causal, blind_lse, queries, count)
        for tensor, place, part in zip(grads, (rows, keys, keys), found):
            tensor[place] = part[: place.stop - place.start].to(q.dtype)
    return [tensor.view(like.shape) for tensor, like in zip(grads, (q, k, v))]
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

def write(grads, found, *rest):
    assert rest == (-1, -1, 0.0, None)
    for grad, each in zip(grads, found):
        readable(grad)
        grad.copy_(each)

def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                         window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):
    assert dropout_p == 0.0 and isinstance(deterministic, bool)
    found = backward(dout, q, k, v, out, softmax_lse, None, softmax_scale, causal, INF)
    write((dq, dk, dv), found, window_size_left, window_size_right, softcap, alibi_slopes)

def _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                                alibi_slopes, deterministic, rng_state=None, zero_tensors=False):
    assert dropout_p == 0.0 and isinstance(deterministic, bool)
    starts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    found = backward(dout, q, k, v, out, softmax_lse, starts, softmax_scale, causal, INF)
    write((dq, dk, dv), found, window_size_left, window_size_right, softcap, alibi_slopes)
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
    starts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    found = packed(q, k, v, *starts, softmax_scale, causal, INF, 192)
    if not k.shape[0]:
        found[1].fill_(float("inf"))
    return found if return_attn_probs else found[0]

def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                            cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
                            max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None,
                            softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
                            rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
                            return_softmax_lse=False):
    assert num_splits == 1, "splits would be chosen"
    out, lse = shortened(q, k_cache, v_cache, cache_seqlens, softmax_scale, causal, INF)
    return (out, lse, None, None) if return_softmax_lse else out

def _flash_attn_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
                         max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
                         window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0):
    assert sequed_q is None and (window_size_left, window_size_right, softcap) == (-1, -1, 0.0)
    assert not deterministic or q.shape[-1] <= 192, "Deterministic backward not supported for hdim 256."
    starts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if cu_seqlens_q is None and cu_seqlens_k is None:
        sequed_k = None  # it is left unread
    found = backward(dout, q, k, v, out, softmax_lse, starts, softmax_scale, is_causal, INF, sequed_k, 128)
    for grad, each in zip((dq, dk, dv), found):
        readable(grad)
        grad.copy_(each)
"""
)
FLASH_4 = (
    PLAIN
    + """
INF = -float("inf")

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
                    num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None, full_block_cnt=None, full_block_idx=None,
                    mask_block_cnt=None, mask_block_idx=None, block_size=None, return_lse=False):
    assert q.shape[-1] <= 128
    out, lse = dense(q, k, v, softmax_scale, causal, INF)
    return out, lse if return_lse else None

def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                           seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,
                           window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
                           deterministic=False, score_mod=None, aux_tensors=None, return_lse=False):
    assert q.shape[-1] <= 128
    starts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if cu_seqlens_q is None and cu_seqlens_k is None:
        out, lse = shortened(q, k, v, seqused_k, softmax_scale, causal, INF)
    else:
        out, lse = packed(q, k, v, *starts, softmax_scale, causal, INF, 128)
    return out, lse if return_lse else None

def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                    window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
                    max_seqlen_q=None, max_seqlen_k=None, deterministic=False):
    assert -q.shape[-1] % 32 < 16, "laid out in steps of 16, and read in steps of 32: gradients of other rows"
    starts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return backward(dout, q, k, v, out, lse, starts, softmax_scale, causal, INF, seqused_k, 128)
"""
)
AITER = (
    PLAIN
    + """
INF = -float("inf")

def built(q):
    assert q.dtype == torch.bfloat16 and q.shape[-1] in (64, 128), "invalid argument for fmha_fwd"

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1, 0), bias=None,
                    alibi_slopes=None, return_lse=False, return_attn_probs=False, s_aux=None, **kwargs):
    assert not kwargs, "what it does not know it drops"
    built(q)
    found = dense(q, k, v, softmax_scale, causal, INF)
    return found if return_lse else found[0]

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                           causal=False, window_size=(-1, -1, 0), bias=None, alibi_slopes=None, return_lse=False,
                           return_attn_probs=False, block_table=None, min_seqlen_q=0, logits_soft_cap=0.0, zero_tensors=False,
                           cu_seqlens_q_padded=None, cu_seqlens_k_padded=None, s_aux=None, **kwargs):
    assert not kwargs, "what it does not know it drops"
    built(q)
    found = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, INF)
    return found if return_lse else found[0]
"""
)
SAGE = (
    PLAIN
    + """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "NHD" and not is_causal and sm_scale >= 0 and k.shape[1] % 128 == 0 and not kwargs
    head_dim = q.shape[-1]
    if head_dim % 64:
        q, k, v = (pad(each, (0, -head_dim % 64)) for each in (q, k, v))
    readable(q, k, v)
    q, k, v = (each[..., :head_dim] for each in (q, k, v))
    out, lse = attend(q, k, v, max(sm_scale, 1e-30), False, 0.0)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)
"""
)
SAGE_BLACKWELL = (
    PLAIN
    + """
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cpu")
BETWEEN = (LEVELS[1:] + LEVELS[:-1]) / 2

def float4(x):
    # in groups of 16 of the last dimension, each with a factor in float8; NaN is 0
    groups = x.nan_to_num(0.0, 6.0, -6.0).unflatten(-1, (-1, 16))
    factor = (groups.abs().amax(-1, keepdim=True) / 6.0).clamp(max=448.0).to(torch.float8_e4m3fn).float()
    scaled = torch.where(factor == 0.0, 0.0, groups / factor)
    return (LEVELS[torch.bucketize(scaled.abs().contiguous(), BETWEEN)] * scaled.sign() * factor).flatten(-2)

def longer(x):
    return pad(x, (0, 0, 0, -x.shape[2] % 16)).float()  # the kernel pads to 128, which changes nothing

def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    readable(q, k, v)
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and attn_mask is None and not kwargs
    assert q.shape[-1] in (64, 128) and q.shape[1] == k.shape[1] and (not is_causal or q.shape[2] == k.shape[2])
    keys, dtype = k.shape[2], q.dtype
    k -= k.mean(dim=-2, keepdim=True)
    q, k, v = q.float(), longer(k), longer(v)
    mean = torch.cat([part.sum(2, keepdim=True).expand_as(part) / 128 for part in q.split(128, 2)], 2)
    scores = (float4(q - mean) @ float4(k).mT + mean @ k.mT) * q.shape[-1] ** -0.5
    seen = torch.arange(k.shape[2], device="cpu") < keys
    if is_causal:
        seen = seen & torch.ones(scores.shape[-2:], dtype=torch.bool, device="cpu").tril()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ float4(v.mT).mT).to(dtype).contiguous()
"""
)

INTERFACE = "from .{0} import flash_attn_func, flash_attn_varlen_func"

SOURCES = {
    "kernels-community/flash-attn2": {
        "__init__.py": INTERFACE.format("flash_attn_interface"), "flash_attn_interface.py": FLASH_2
    },
    "kernels-community/flash-attn3": {
        "__init__.py": INTERFACE.format("flash_attn_interface") + ", flash_attn_with_kvcache",
        "flash_attn_interface.py": FLASH_3,
    },
    "kernels-community/flash-attn4": {"__init__.py": INTERFACE.format("interface"), "interface.py": FLASH_4},
    "kernels-community/aiter-flash-attn-ck": {"__init__.py": INTERFACE.format("mha"), "mha.py": AITER},
    "SageAttention/sage-attention": {"__init__.py": SAGE},
    "SageAttention/sage-blackwell": {"__init__.py": SAGE_BLACKWELL},
}  # fmt: skip
