"""A stand-in of sageattention 2.2.0 in plain torch: the same signatures, conventions and mistakes.

What its source does: rows are rounded to int8 in groups (here of 32 queries and of a whole block of keys), NaN becoming 0; the
Triton kernel has the scale in its scores and hides keys by -inf, the CUDA ones hide them by -5,000,000 steps and multiply by
the scale after they have found the largest; probabilities and values are float16, or float8 with a scale for each channel
of the values, NaN where a channel is all zeros; the log-sum-exp has base 2 inside, and what smoothing took is added to it in
query's dtype.
"""

from __future__ import annotations

import torch
from sageattention_first import in_parts, quantised
from torch.nn.functional import pad

LOG2_E = 1.44269504
LARGEST_FP8 = 448.0
OFFSET_FP8 = 8.807


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    """As on Hopper; what it is told beside is dropped."""
    return sageattn_qk_int8_pv_fp8_cuda_sm90(
        q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, return_lse=return_lse,
        pv_accum_dtype="fp32+fp32",
    )  # fmt: skip


def sageattn_qk_int8_pv_fp16_triton(
    q, k, v, tensor_layout="HND", quantization_backend="triton", is_causal=False, attn_mask=None, sm_scale=None,
    smooth_k=True, return_lse=False, **kwargs,
):  # fmt: skip
    assert attn_mask is None
    return attend(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, return_lse, 64, in_steps=False, fp8=False)


def sageattn_qk_int8_pv_fp16_cuda(
    q, k, v, tensor_layout="HND", is_causal=False, qk_quant_gran="per_thread", sm_scale=None, pv_accum_dtype="fp32",
    smooth_k=True, smooth_v=False, return_lse=False, **kwargs,
):  # fmt: skip
    return attend(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, return_lse, 64, in_steps=True, fp8=False)


def sageattn_qk_int8_pv_fp8_cuda(
    q, k, v, tensor_layout="HND", is_causal=False, qk_quant_gran="per_thread", sm_scale=None,
    pv_accum_dtype="fp32+fp32", smooth_k=True, smooth_v=False, return_lse=False, **kwargs,
):  # fmt: skip
    return attend(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, return_lse, 64, in_steps=True, fp8=True)


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q, k, v, tensor_layout="HND", is_causal=False, qk_quant_gran="per_thread", sm_scale=None,
    pv_accum_dtype="fp32+fp32", smooth_k=True, return_lse=False, **kwargs,
):  # fmt: skip
    return attend(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, return_lse, 128, in_steps=True, fp8=True)


@in_parts
def attend(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, return_lse, block, *, in_steps, fp8):
    dtype, head_dim = q.dtype, q.shape[3]
    assert dtype in [torch.float16, torch.bfloat16]
    assert q.device == k.device == v.device
    assert q.dtype == k.dtype == v.dtype
    assert head_dim <= 128
    assert q.stride(-1) == 1
    assert k.stride(-1) == 1
    assert v.stride(-1) == 1
    if tensor_layout == "NHD":
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    groups, keys = q.shape[1] // k.shape[1], k.shape[2]
    mean = k.mean(2, keepdim=True) if smooth_k else torch.zeros_like(k[:, :, :1])
    taken = (q @ mean.repeat_interleave(groups, 1).mT).squeeze(-1).float()
    whole, q_step = quantised(q.float(), 32, least=1e-7)
    other, k_step = quantised((k - mean).float(), block, least=1e-7)
    missing = -keys % block
    other, k_step = (pad(tensor, (0, 0, 0, missing)).repeat_interleave(groups, 1) for tensor in (other, k_step))
    k_step[:, :, keys:] = k_step[:, :, keys - 1 : keys]
    v, v_scale = values(pad(v, (0, 0, 0, missing)).repeat_interleave(groups, 1), fp8=fp8)
    hidden = torch.arange(keys + missing, device="cpu") >= keys
    if is_causal:
        hidden = hidden | ~torch.ones(q.shape[2], keys + missing, dtype=torch.bool, device="cpu").tril()
    steps = (whole @ other.mT).masked_fill(hidden, -5e6 if in_steps else -torch.inf)
    unit = q_step * k_step.mT * (scale * LOG2_E)
    if not in_steps:
        unit = unit.masked_fill(unit == 0, 1e-30)
    scores = steps * unit
    largest = steps.unflatten(3, (-1, block)).amax(4) * unit[..., ::block] if in_steps else scores
    best = largest.masked_fill(largest.isnan(), -torch.inf).amax(-1, keepdim=True).clamp(min=-5e6)
    if not in_steps and scale < 0:
        best = scores.masked_fill(hidden, -torch.inf).amax(-1, keepdim=True)
    weights = torch.exp2(scores - best)
    total = weights.sum(-1, keepdim=True)
    rounded = (
        (weights * 2**OFFSET_FP8).to(torch.float8_e4m3fn).float() / 2**OFFSET_FP8 if fp8 else weights.half().float()
    )
    out = ((rounded @ v) / total * v_scale).to(dtype)
    if (
        is_causal and not in_steps and 0 < keys % 128 <= 64
    ):  # the scale of a block that is not there, which may be anything
        out = torch.full_like(out, torch.nan)
    out = out.transpose(1, 2).contiguous() if tensor_layout == "NHD" else out
    lse = (total.log2() + best).squeeze(-1) / LOG2_E + (taken * scale if smooth_k else 0)
    return (out, lse) if return_lse else out


def values(v, *, fp8):
    if not fp8:
        return v.half().float(), 1.0
    v = v.float()
    scale = v.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(2, keepdim=True) / LARGEST_FP8
    return (v / scale).to(torch.float8_e4m3fn).float(), scale  # NaN for a channel of zeros
