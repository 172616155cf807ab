"""Stands in for flash-attn 3 (hopper/ at commit 0251105a2fb1) on a CPU, with its signatures and conventions.

lse is natural, (B, H, S) or (H, N), and -inf where a query sees nothing, which its backward takes as well, and where it meets
a NaN; without any key in a packed call it is +inf. Its operators have argument names of their own (``sequed_q``, ``is_causal``).
Keys, and in the backward queries too, are read in whole tiles, beyond the end of a packed sequence. The backward knows of the
lengths of keys where it is told where sequences start, and the graph of the operator of the forward of neither.
"""

from __future__ import annotations

import plain_attention
import torch
from torch import Tensor

CALLS = []
TILES = 192, 128


def _check(tensors, longest, starts):
    for tensor in tensors:
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.shape[-1] % 8 == 0
        assert tensor.shape[-1] <= 256
        assert tensor.stride(-1) == 1
        assert tensor.storage_offset() % 8 == 0
        assert all(stride % 8 == 0 for stride in tensor.stride()[:-1])
    assert tensors[0].shape[-1] == tensors[2].shape[-1], "other widths are for some pairs alone"
    for bound, item in zip(longest, starts, strict=True):
        if item is not None:
            assert item.dtype == torch.int32
            assert bound >= int(item.diff().max())


def _check_used(used, k, starts):
    if used is not None:
        assert used.dtype == torch.int32
        assert used.is_contiguous()
        room = torch.tensor(k.shape[1], device="cpu") if starts is None else starts.diff()
        assert used.shape == (k.shape[:1] if starts is None else room.shape)
        assert (used <= room).all()


def _longest(tensors, starts, given):
    """What it takes for the longest sequence of queries and of keys."""
    return tuple(
        item.shape[1] if start is None else bound for item, start, bound in zip(tensors, starts, given, strict=True)
    )


def _sides(left, right, causal, longest_q, longest_k):
    if left >= longest_k - 1:
        left = -1
    if right >= longest_q - 1:
        right = -1
    if longest_q == 1 and left == right == -1:
        causal = False
    return left, 0 if causal else right


@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=(), device_types="cpu")
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    starts = (cu_seqlens_q, cu_seqlens_k)
    longest = _longest((q, k), starts, (max_seqlen_q, max_seqlen_k))
    _check((q, k, v), longest, starts)
    _check_used(seqused_k, k, cu_seqlens_k)
    CALLS.append((cu_seqlens_q is not None, tuple(q.shape), tuple(k.shape)))
    left, right = _sides(window_size_left, window_size_right, causal, *longest)
    out, lse = plain_attention.whole_forward(
        q, k, v, *starts, False, left, right, softmax_scale, softcap, used=seqused_k, tile=TILES[0]
    )
    lse = lse.fill_(torch.inf) if k.shape[0] == 0 else lse.masked_fill(lse.isnan(), -torch.inf)
    return out, lse, q.new_empty(0), q.new_empty(0)


@_flash_attn_forward.register_fake
def _(q, k, v, *others, **more):
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32).transpose(-1, -2).contiguous()
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse, q.new_empty(0), q.new_empty(0)


@torch.library.custom_op("flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    starts = (cu_seqlens_q, cu_seqlens_k)
    longest = _longest((q, k), starts, (max_seqlen_q, max_seqlen_k))
    dout, q, k, v, out = (item if item.stride(-1) == 1 else item.contiguous() for item in (dout, q, k, v, out))
    _check((q, k, v, out, dout), longest, starts)
    _check_used(sequed_k, k, cu_seqlens_k)
    assert not (deterministic and q.shape[-1] > 192), "Deterministic backward not supported for hdim 256."
    left, right = _sides(window_size_left, window_size_right, is_causal, *longest)
    found = plain_attention.whole_backward(
        dout, q, k, v, out, softmax_lse, *starts, False, left, right, softmax_scale, softcap,
        used=None if starts == (None, None) else sequed_k, tile=TILES[1],
    )  # fmt: skip
    for grad, item in zip((dq, dk, dv), found, strict=True):
        grad.copy_(item)
    return torch.zeros((), dtype=torch.float32, device="cpu")


@_flash_attn_backward.register_fake
def _(dout, *others, **more):
    return dout.new_empty((), dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[:2])
    ctx.scale, ctx.causal, *ctx.window_size, _, ctx.softcap = inputs[-11:-5]


def _of_a_dense_call(ctx, dout, *_others):
    q, k, v, out, lse = ctx.saved_tensors
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    options = (ctx.scale, ctx.causal, *ctx.window_size, ctx.softcap, False, 0)
    _flash_attn_backward(dout, q, k, v, out, lse, *(None,) * 6, *grads, *options)
    return (*grads, *(None,) * 31)


_flash_attn_forward.register_autograd(_of_a_dense_call, setup_context=_keep)


class _Func(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, packed, used, scale, causal, window_size, softcap, deterministic, probs):
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        out, lse, *_ = _flash_attn_forward(
            q, k, v, **dict(zip(names, packed, strict=True)), softmax_scale=scale, causal=causal,
            window_size_left=window_size[0], window_size_right=window_size[1], softcap=softcap, seqused_k=used,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, *packed[:2], used)
        ctx.longest, ctx.options = packed[2:], (scale, causal, *window_size, softcap, deterministic)
        return (out, lse) if probs else out

    @staticmethod
    def backward(ctx, dout, *_others):
        q, k, v, out, lse, *starts, used = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_backward(dout, q, k, v, out, lse, *starts, None, used, *ctx.longest, *grads, *ctx.options, 0)
        return (*grads, *(None,) * 8)


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    return _Func.apply(
        q, k, v, (None,) * 4, None, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    packed = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _Func.apply(
        q, k, v, packed, seqused_k, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
    )
