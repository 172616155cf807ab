"""The functions of ``flash_attn.cute.interface`` that the adapter uses. An unlimited side is None; -1 is the key before.

The lse is -inf both for a query that sees nothing and for one that meets a NaN. Keys, and in the backward
queries too, are read in whole tiles, beyond the end of a packed sequence.
"""

from __future__ import annotations

import plain_attention
import torch

CALLS = []
TILE = 128


def _check(tensors, window_size):
    assert not torch.compiler.is_dynamo_compiling(), "the library can't be traced"
    for tensor in tensors:
        assert type(tensor) is torch.Tensor, "the library hands pointers to a compiler"
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.shape[-1] % 8 == 0
        assert 8 <= tensor.shape[-1] <= 256
        assert tensor.stride(-1) == 1
        assert tensor.storage_offset() % 8 == 0
    assert all(side is None or side >= 0 for side in window_size), "a single -1 is a number here"


def _check_used(used, starts, k):
    if used is not None:
        assert starts == (None, None), "lengths beside starts are not stood in for"
        assert used.dtype == torch.int32
        assert used.shape == k.shape[:1]
        assert k.shape[1] >= max(int(used.max()), 1)


def _flash_attn_fwd(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    softcap=None,
    window_size_left=None,
    window_size_right=None,
    learnable_sink=None,
    tile_mn=None,
    mma_pv_is_rs=None,
    intra_wg_overlap=None,
    num_threads=384,
    num_splits=1,
    pack_gqa=None,
    _arch=None,
    score_mod=None,
    mask_mod=None,
    block_sparse_tensors=None,
    return_lse=False,
    out=None,
    lse=None,
    aux_tensors=None,
    aux_scalars=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    gather_kv_indices=None,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
):
    starts, window_size = (cu_seqlens_q, cu_seqlens_k), (window_size_left, window_size_right)
    _check((q, k, v), window_size)
    _check_used(seqused_k, starts, k)
    if cu_seqlens_q is not None:
        assert q.ndim == 3
        assert all(item.dtype == torch.int32 and item.stride(0) == 1 for item in starts)
        for bound, item in zip((max_seqlen_q, max_seqlen_k), starts, strict=True):
            assert bound >= int(item.diff().max())
    CALLS.append(("packed" if cu_seqlens_q is not None else "dense", tuple(q.shape), tuple(k.shape)))
    with torch.no_grad():
        out, lse = plain_attention.whole_forward(
            q, k, v, *starts, causal, *window_size, softmax_scale, softcap, used=seqused_k, tile=TILE
        )
        lse = lse.masked_fill(lse.isnan(), -torch.inf)
    requires_grad = any(item.requires_grad for item in (q, k, v))
    return out, lse if return_lse or requires_grad else None, None, None, None


def flash_attn_func(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    left, right = window_size
    return _flash_attn_fwd(
        q, k, v, softmax_scale=softmax_scale, causal=causal, softcap=softcap, window_size_left=left, window_size_right=right,
        return_lse=return_lse,
    )[:2]  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    left, right = window_size
    return _flash_attn_fwd(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k, softmax_scale=softmax_scale, causal=causal, softcap=softcap, window_size_left=left,
        window_size_right=right, return_lse=return_lse,
    )[:2]  # fmt: skip


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    window_size_left=None,
    window_size_right=None,
    m_block_size=64,
    n_block_size=128,
    num_threads=256,
    pack_gqa=False,
    num_stages_Q=2,
    num_stages_dO=2,
    SdP_swapAB=False,
    dKV_swapAB=False,
    dQ_swapAB=False,
    AtomLayoutMSdP=2,
    AtomLayoutNdKV=2,
    AtomLayoutMdQ=2,
    V_in_regs=False,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    deterministic=False,
    dq=None,
    dk=None,
    dv=None,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    dlse=None,
    learnable_sink=None,
):
    _check((q, k, v, out, dout), (window_size_left, window_size_right))
    assert all(-width % 32 < 16 for width in (q.shape[-1], v.shape[-1])), "read in steps of 32 what is laid out in 16"
    if q.shape[-2] != k.shape[-2]:
        assert q.shape[-1] == v.shape[-1], "GQA backward requires head_dim == head_dim_v"
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert lse.shape == (*q.shape[:-3], q.shape[-2], q.shape[-3])
    starts = (cu_seqlens_q, cu_seqlens_k)
    _check_used(seqused_k, starts, k)
    return plain_attention.whole_backward(
        dout, q, k, v, out, lse, *starts, causal, window_size_left, window_size_right, softmax_scale, softcap,
        used=seqused_k, tile=TILE,
    )  # fmt: skip
