"""Stands in for flash-attn 2.8.3 on a CPU, with its signatures and conventions.

Of a query that sees nothing the result is 0 and the lse +inf. A side of a window that is not limited, or reaches beyond the
longest sequence of keys, is that length. At most one query per sequence is no causal call. lse is (B, H, S) or (H, N).
"""

from __future__ import annotations

import plain_attention
import torch
from torch import Tensor

CALLS = []


def _check(tensors, dropout_p, softcap):
    q, k, v = tensors[:3]
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    for tensor in tensors:
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.shape[-1] % 8 == 0
        assert tensor.stride(-1) == 1
        assert tensor.storage_offset() % 8 == 0
        assert all(stride % 8 == 0 for stride in tensor.stride()[:-1])
    assert not (softcap > 0 and dropout_p > 0), "Softcapping does not support dropout for now"


def _sides(left, right, causal, longest_q, longest_k):
    if left >= longest_k:
        left = -1
    if right >= longest_k:
        right = -1
    if longest_q == 1:
        causal = False
    if causal:
        right = 0
    if left < 0 and right >= 0:
        left = longest_k
    if left >= 0 and right < 0:
        right = longest_k
    return left, right


def _draw(rng_state, dropout_p):
    if not dropout_p:
        return None
    seed = int(rng_state[0])

    def draw(number, shape):
        generator = torch.Generator().manual_seed(seed + number)
        return (torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") >= dropout_p).float() / (
            1 - dropout_p
        )

    return draw


def _fwd(q, k, v, starts, longest, dropout_p, softmax_scale, causal, left, right, softcap):
    _check((q, k, v), dropout_p, softcap)
    CALLS.append((starts[0] is not None, tuple(q.shape), tuple(k.shape)))
    rng_state = torch.zeros(2, dtype=torch.int64, device="cpu")
    if dropout_p:
        rng_state[0] = torch.randint(2**40, (), device="cpu")
    left, right = _sides(left, right, causal, *longest)
    out, lse = plain_attention.whole_forward(
        q, k, v, *starts, False, left, right, softmax_scale, softcap, _draw(rng_state, dropout_p)
    )
    lse = lse.masked_fill(lse.isnan() | (lse == -torch.inf), torch.inf)
    return out, lse, q.new_empty(0), rng_state


def _bwd(dout, q, k, v, out, lse, grads, starts, longest, dropout_p, scale, causal, left, right, softcap, rng_state):
    _check((q, k, v, out, dout), dropout_p, softcap)
    assert lse.is_contiguous()
    assert not (lse == -torch.inf).any(), "exp(-inf - -inf)"
    if longest[1] == 0:  # a grid of no blocks
        raise RuntimeError("CUDA error: invalid argument")
    left, right = _sides(left, right, causal, *longest)
    draw = _draw(rng_state, dropout_p)
    found = plain_attention.whole_backward(dout, q, k, v, out, lse, *starts, False, left, right, scale, softcap, draw)
    for grad, item in zip(grads, found, strict=True):
        grad.copy_(item)
    return torch.zeros((), dtype=torch.float32, device="cpu")


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), device_types="cpu")
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert not return_softmax, "a tensor of (Sq, Skv)"
    longest = (q.shape[1], k.shape[1])
    sides = (window_size_left, window_size_right)
    return _fwd(q, k, v, (None, None), longest, dropout_p, softmax_scale, causal, *sides, softcap)


@_flash_attn_forward.register_fake
def _(q, k, v, *others):
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=(), device_types="cpu")
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert not return_softmax, "a tensor of (Sq, Skv)"
    starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    for bound, item in zip(longest, starts, strict=True):
        assert item.dtype == torch.int32
        assert bound >= int(item.diff().max())
    assert max_seqlen_q > 1 or bool((cu_seqlens_q.diff() == 1).all()), "each sequence would be taken to have one query"
    sides = (window_size_left, window_size_right)
    return _fwd(q, k, v, starts, longest, dropout_p, softmax_scale, causal, *sides, softcap)


@_flash_attn_varlen_forward.register_fake
def _(q, k, v, *others, **more):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    dout, q, k, v, out = (item if item.stride(-1) == 1 else item.contiguous() for item in (dout, q, k, v, out))
    longest, sides = (q.shape[1], k.shape[1]), (window_size_left, window_size_right)
    return _bwd(
        dout, q, k, v, out, softmax_lse, (dq, dk, dv), (None, None), longest, dropout_p, softmax_scale, causal, *sides,
        softcap, rng_state,
    )  # fmt: skip


@_flash_attn_backward.register_fake
def _(dout, *others, **more):
    return dout.new_empty((), dtype=torch.float32)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    dout, q, k, v, out = (item if item.stride(-1) == 1 else item.contiguous() for item in (dout, q, k, v, out))
    starts, longest, sides = (
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        (window_size_left, window_size_right),
    )
    return _bwd(
        dout, q, k, v, out, softmax_lse, (dq, dk, dv), starts, longest, dropout_p, softmax_scale, causal, *sides,
        softcap, rng_state,
    )  # fmt: skip


@_flash_attn_varlen_backward.register_fake
def _(dout, *others, **more):
    return dout.new_empty((), dtype=torch.float32)


class _Func(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, starts, dropout_p, scale, causal, window_size, softcap, deterministic, probs, is_grad):
        is_grad = is_grad and any(item.requires_grad for item in (q, k, v))
        options = (dropout_p, scale, causal, *window_size, softcap, None)
        if starts is None:
            op = torch.ops.flash_attn._flash_attn_forward
            out, lse, probabilities, rng_state = op(q, k, v, *options, probs and dropout_p > 0)
        else:
            op = torch.ops.flash_attn._flash_attn_varlen_forward
            out, lse, probabilities, rng_state = op(q, k, v, *starts, *options, probs and dropout_p > 0)
        if is_grad:
            ctx.save_for_backward(q, k, v, out, lse, rng_state, *(() if starts is None else starts[:2]))
            ctx.longest, ctx.options, ctx.deterministic = () if starts is None else starts[2:], options, deterministic
        return (out, lse, probabilities) if probs else out

    @staticmethod
    def backward(ctx, dout, *_others):
        q, k, v, out, lse, rng_state, *starts = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        op = torch.ops.flash_attn._flash_attn_varlen_backward if starts else torch.ops.flash_attn._flash_attn_backward
        op(dout, q, k, v, out, lse, *grads, *starts, *ctx.longest, *ctx.options, ctx.deterministic, rng_state)
        return (*grads, *(None,) * 9)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return _Func.apply(
        q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs,
        torch.is_grad_enabled(),
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    starts = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _Func.apply(
        q, k, v, starts, dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs,
        torch.is_grad_enabled(),
    )  # fmt: skip
