"""What each operator supports, and how it leaves an lse: what the real ones check and return."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import xformers_plain

from .attn_bias import (
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    BlockDiagonalMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightLocalAttentionMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
)

HALF = (torch.float16, torch.bfloat16)
CALLS = []


class Operator:
    """A forward or a backward."""

    backward = False
    dtypes = HALF
    most = 256
    other_value_dim = False
    groups = True
    biases: tuple = ()

    @classmethod
    def apply(cls, inp, needs_gradient):
        """Result, and what holds the lse where it is asked for. Checks what it is given: the adapter does not each time."""
        assert inp.p == 0.0
        assert inp.is_partial == (cls is SplitK and needs_gradient)
        out, lse = forward(cls, inp.query, inp.key, inp.value, inp.attn_bias, inp.scale)
        assert not inp.is_partial or inp.output_dtype == out.dtype  # a partial result would be float32 else
        return out, SimpleNamespace(lse=lse) if needs_gradient else None

    @classmethod
    def check(cls, query, key, value, bias):
        assert not torch.compiler.is_dynamo_compiling(), "dispatch in Python is not traced"
        if query.dtype not in cls.dtypes or type(bias) not in cls.biases or query.shape[-1] > cls.most:
            raise ValueError(f"{cls.__name__} does not support {query.dtype}, {type(bias)}, {query.shape}")
        if query.shape[-1] != value.shape[-1] and not cls.other_value_dim:
            raise ValueError("value's head dim")
        if query.ndim == 5 and not cls.groups:
            raise ValueError("BMGHK")
        for tensor in (query, key, value):
            if tensor.stride(-1) != 1 or tensor.shape[-1] % 8:
                raise ValueError("alignment of the last dimension")
        if isinstance(bias, LowerTriangularMask) and query.shape[1] != key.shape[1] and cls in (FlashFw, FlashBw):
            raise ValueError("Only support LowerTriangularMask if equal number of keys and queries")
        if isinstance(bias, torch.Tensor):
            step = 128 // torch.finfo(bias.dtype).bits
            if any(bias.stride(place) % step for place in range(3)) or bias.stride(-1) > 1:
                raise ValueError(f"attn_bias.stride() = {bias.stride()}")
            if bias.dtype != query.dtype:
                raise ValueError("bias dtype")


_FLASH = (
    type(None),
    LowerTriangularMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularFromBottomRightLocalAttentionMask,
    LocalAttentionFromBottomRightMask,
    BlockDiagonalMask,
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionFromBottomRightMask,
)
_CUTLASS = (type(None), torch.Tensor, LowerTriangularMask, LowerTriangularFromBottomRightMask, BlockDiagonalMask)


class FlashFw(Operator):
    biases = _FLASH


class FlashBw(Operator):
    biases = _FLASH
    groups = False
    backward = True


class CutlassFw(Operator):
    biases = _CUTLASS
    dtypes = (*HALF, torch.float32)
    most = 65536
    other_value_dim = True


class CutlassBw(CutlassFw):
    groups = False
    backward = True


class SplitK(Operator):
    biases = (type(None), torch.Tensor)
    most = 512

    @classmethod
    def check(cls, query, key, value, bias):
        super().check(query, key, value, bias)
        if query.shape[-1] not in (16, 32, 64, 128, 256, 512):
            raise ValueError(f"Embed dim {query.shape[-1]} not supported")
        if query.shape[0] * query.shape[2:-1].numel() > 65535:
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        if query.shape[1:].numel() * 64 >= 2**31:  # counted in 32 bits
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


def sides(bias, queries, keys, flash):
    """causal, left and right, bottom-right, as the kernels take them."""
    left = right = -1
    causal = isinstance(
        bias, (LowerTriangularMask, LowerTriangularFromBottomRightMask, BlockDiagonalCausalFromBottomRightMask)
    )
    if hasattr(bias, "_window_size"):
        left = bias._window_size - 1
    if isinstance(bias, LocalAttentionFromBottomRightMask):
        left, right = bias.window_left, bias.window_right
    if isinstance(bias, LowerTriangularMask):
        assert queries == keys, "top-left"
    if flash:  # as FlashAttention-2 has them
        if left >= keys:
            left = -1
        if right >= keys:
            right = -1
        if queries == 1:
            causal = False
        if causal:
            right = 0
        if left < 0 and right >= 0:
            left = keys
        if left >= 0 and right < 0:
            right = keys
        causal = False
    return causal, left, right


def flattened(query, key, value):
    if query.ndim == 4:
        assert query.shape[2] == key.shape[2] == value.shape[2], "no broadcasting"
        return query, key, value
    assert query.shape[2:4] == key.shape[2:4] == value.shape[2:4]
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def each(operator, bias, query, key, value):
    """Everything of a call that the plain functions want: starts, sides, and a bias of each sequence."""
    if isinstance(bias, BlockDiagonalMask):
        assert query.shape[0] == 1
        for item in (query, key, value):
            item.reshape([item.shape[0] * item.shape[1], -1, item.shape[-1]])  # which the real one does as well
        assert bias.q_seqinfo.seqstart.dtype == torch.int32
        longest = bias.q_seqinfo.max_seqlen, bias.k_seqinfo.max_seqlen
        for bound, item in zip(longest, (bias.q_seqinfo, bias.k_seqinfo), strict=True):
            assert bound >= int(item.seqstart.diff().max())
        return (bias.q_seqinfo.seqstart, bias.k_seqinfo.seqstart), longest
    return (None, None), (query.shape[1], key.shape[1])


def forward(operator, query, key, value, bias, scale):
    operator.check(query, key, value, bias)
    grouped = query.shape[2:4] if query.ndim == 5 else None
    query, key, value = flattened(query, key, value)
    CALLS.append((operator.__name__, type(bias).__name__, tuple(query.shape), tuple(key.shape)))
    starts, longest = each(operator, bias, query, key, value)
    assert operator is not CutlassFw or starts[0] is None, "an lse of (sequences, H, longest), rounded up"
    flash = operator is FlashFw
    causal, left, right = sides(bias, *longest, flash)
    if isinstance(bias, torch.Tensor):
        out, lse = added(query, key, value, bias, scale)
    else:
        packed = starts[0] is not None
        given = [item.squeeze(0) if packed else item for item in (query, key, value)]
        out, lse = xformers_plain.whole_forward(*given, *starts, causal, left, right, scale, 0.0)
        if packed:
            out, lse = out.unsqueeze(0), lse.unsqueeze(0)
    if flash:
        lse = lse.masked_fill(lse.isnan() | (lse == -torch.inf), torch.inf)
    if operator is CutlassFw:  # 0 where a query sees nothing, and rows in steps of 32
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    if grouped is not None:
        out, lse = out.unflatten(2, grouped), lse.unflatten(1, grouped)
    return out, lse


LOST = -2.4e38
"""A row of scores below this is taken for one that sees nothing, with a log-sum-exp of 0."""


def added(query, key, value, bias, scale):
    scores = torch.einsum("bihd,bjhd->bhij", query.float(), key.float()) * scale + bias.float()
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    lost = (scores.amax(-1) < LOST) & (lse != -torch.inf)
    weights, lse = weights.masked_fill(lost[..., None], 0), lse.masked_fill(lost, 0)
    return torch.einsum("bhij,bjhd->bihd", weights, value.float()).to(query.dtype), lse


def backward(operator, grad, out, lse, query, key, value, bias, scale):
    operator.check(query, key, value, bias)
    assert grad.ndim == 4
    assert not (lse == -torch.inf).any(), "exp(-inf - -inf)"
    assert lse.is_contiguous()
    assert query.shape[2] == key.shape[2] == value.shape[2]
    starts, longest = each(operator, bias, query, key, value)
    causal, left, right = sides(bias, *longest, operator is FlashBw)
    lse = lse[..., : query.shape[1]]
    if isinstance(bias, torch.Tensor):
        scores = torch.einsum("bihd,bjhd->bhij", query.float(), key.float()) * scale + bias.float()
        weights = (scores - lse[..., None]).exp()
        grad_value = torch.einsum("bhij,bihd->bjhd", weights, grad.float())
        delta = (grad.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
        grad_scores = weights * (torch.einsum("bihd,bjhd->bhij", grad.float(), value.float()) - delta) * scale
        grad_query = torch.einsum("bhij,bjhd->bihd", grad_scores, key.float())
        grad_key = torch.einsum("bhij,bihd->bjhd", grad_scores, query.float())
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
    packed = starts[0] is not None
    given = [item.squeeze(0) if packed else item for item in (grad, query, key, value, out, lse)]
    found = xformers_plain.whole_backward(*given, *starts, causal, left, right, scale, 0.0)
    return tuple(item.unsqueeze(0) for item in found) if packed else found
