"""Kernels that lie: the example backend's, each with one planted defect, and the check that has to find it.

A lie is what somebody could write in good faith. Its name is what is wrong, and the honest kernel does everything else.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from math import log

import torch

from attn_core import CallRefused, KeyPadding, Packed
from attn_core.masks import visible_mask
from attn_example import adapter

LIES = {}
"""By name: the check that finds it, and what of the declaration is other than the honest one's."""

honest = adapter.forward
honest_backward = adapter.backward


def lie(check, **changes):
    """Register a forward (or, by its name, a backward) that lies."""

    def mark(function):
        name = function.__name__
        where = f"{function.__module__}:{name}"
        backward = name.endswith("_backward")
        LIES[name] = (check, {"backward" if backward else "forward": where, **changes})
        setattr(sys.modules[function.__module__], name, function)
        return function

    return mark


def own(check, **changes):
    """The same for a kernel of plain torch operations, whose result carries its graph."""
    return lie(check, autograd="own", backward=None, context_parallel="none", **changes)


def with_lse(call, change):
    """Call, and change the lse of what comes back."""
    found = call()
    return (found[0], change(found[1])) if isinstance(found, tuple) else found


def with_out(call, change):
    """Call, and change the result of what comes back."""
    found = call()
    return (change(found[0]), found[1]) if isinstance(found, tuple) else change(found)


# --- the diagonal and the window ----------------------------------------------------------------------------------------


@lie("causal")
def causal_from_the_top_left(query, key, value, *, attn_mask=None, causal=False, **options):
    if causal and attn_mask is None and query.shape[1] < key.shape[1]:
        key, value = key[:, : query.shape[1]], value[:, : query.shape[1]]
    return honest(query, key, value, attn_mask=attn_mask, causal=causal, **options)


@lie("window_size")
def window_one_wider_on_the_left(query, key, value, *, window_size=None, **options):
    if window_size is not None and window_size[0] >= 0:
        window_size = (window_size[0] + 1, window_size[1])
    return honest(query, key, value, window_size=window_size, **options)


@lie("window_size")
def window_one_narrower_on_the_left(query, key, value, *, window_size=None, **options):
    if window_size is not None and window_size[0] > 0:
        window_size = (window_size[0] - 1, window_size[1])
    return honest(query, key, value, window_size=window_size, **options)


@lie("window_size")
def window_one_wider_on_the_right(query, key, value, *, window_size=None, **options):
    if window_size is not None and window_size[1] >= 0:
        window_size = (window_size[0], window_size[1] + 1)
    return honest(query, key, value, window_size=window_size, **options)


@lie("window_size")
def window_unlimited_taken_for_zero(query, key, value, *, window_size=None, **options):
    if window_size is not None:
        window_size = (max(window_size[0], 0), max(window_size[1], 0))
    return honest(query, key, value, window_size=window_size, **options)


@lie("window_size")
def window_one_wider_where_lengths_differ(query, key, value, *, causal=False, window_size=None, **options):
    if causal and window_size is not None and query.shape[1] != key.shape[1]:
        window_size = (window_size[0] + 1, window_size[1])
    return honest(query, key, value, causal=causal, window_size=window_size, **options)


@lie("window_size")
def window_beyond_64_taken_for_unlimited(query, key, value, *, window_size=None, **options):
    if window_size is not None:
        window_size = tuple(-1 if side > 64 else side for side in window_size)
        window_size = None if window_size == (-1, -1) else window_size
    return honest(query, key, value, window_size=window_size, **options)


# --- masks ----------------------------------------------------------------------------------------------------------------


@lie("masks[bool]")
def mask_of_the_other_polarity(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[bool]")
def mask_of_the_first_head_for_all(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask[:, :1]
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[bool]")
def mask_dropped_beside_causal(query, key, value, *, attn_mask=None, causal=False, **options):
    if causal and isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        attn_mask = None
    return honest(query, key, value, attn_mask=attn_mask, causal=causal, **options)


@lie("masks[key_padding]")
def mask_of_queries_instead_of_keys(query, key, value, *, attn_mask=None, **options):
    if not isinstance(attn_mask, KeyPadding) or query.shape[1] != key.shape[1]:
        return honest(query, key, value, attn_mask=attn_mask, **options)
    keep = attn_mask.keep[:, :, None, None]
    return with_out(partial(honest, query, key, value, **options), lambda out: out.masked_fill(~keep, 0))


@lie("masks[float]")
def additive_mask_dropped(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask != -torch.inf
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[float]")
def additive_mask_scaled_with_the_scores(query, key, value, *, scale, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask * abs(scale)
    return honest(query, key, value, scale=scale, attn_mask=attn_mask, **options)


@lie("masks[key_padding]")
def left_padding_taken_for_right(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, KeyPadding):
        lengths = attn_mask.keep.sum(1, keepdim=True)
        attn_mask = KeyPadding(torch.arange(key.shape[1], device=key.device) < lengths)
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[key_padding]")
def causal_counted_in_kept_keys(query, key, value, *, attn_mask=None, causal=False, **options):
    if not causal or not isinstance(attn_mask, KeyPadding):
        return honest(query, key, value, attn_mask=attn_mask, causal=causal, **options)
    kept = attn_mask.keep.cumsum(1)[:, None, None] - 1
    places = torch.arange(query.shape[1], device=query.device)[:, None] + key.shape[1] - query.shape[1]
    return honest(query, key, value, attn_mask=attn_mask.keep[:, None, None] & (kept <= places), **options)


@lie("masks[packed]")
def packed_with_the_diagonal_of_the_whole(
    query, key, value, *, attn_mask=None, causal=False, window_size=None, **options
):
    if isinstance(attn_mask, Packed) and causal:
        inside = visible_mask(query, key, attn_mask=attn_mask)
        attn_mask = inside & visible_mask(query, key, causal=True)
        causal = False
    return honest(query, key, value, attn_mask=attn_mask, causal=causal, window_size=window_size, **options)


@lie("masks[packed]")
def packed_read_as_one_sequence(query, key, value, *, attn_mask=None, **options):
    return honest(query, key, value, attn_mask=None if isinstance(attn_mask, Packed) else attn_mask, **options)


@lie("masks[packed]")
def packed_without_its_empty_documents(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, Packed):
        ends_q, ends_k = attn_mask.cu_seqlens_q.unique(), attn_mask.cu_seqlens_k.unique()
        if len(ends_q) == len(ends_k) and len(ends_q) > 1:
            attn_mask = Packed(ends_q, ends_k)
        elif len(ends_q) > 1:  # it takes documents of queries alone for those of keys
            whole = torch.arange(key.shape[1], device=key.device)
            attn_mask = (torch.bucketize(whole, attn_mask.cu_seqlens_k[1:-1], right=True) >= 0)[None, None, None]
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[packed]")
def packed_beyond_eight_documents_left_out(query, key, value, *, attn_mask=None, return_lse=False, **options):
    found = honest(query, key, value, attn_mask=attn_mask, return_lse=return_lse, **options)
    if not isinstance(attn_mask, Packed) or len(attn_mask.cu_seqlens_q) <= 9:
        return found
    kept = torch.arange(query.shape[1], device=query.device) < attn_mask.cu_seqlens_q[8]
    return with_out(lambda: found, lambda out: out * kept[:, None, None].to(out.dtype))


@lie("masks[float]")
def float32_mask_rounded_to_the_query(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[bool]")
def mask_of_the_first_sequence_for_all(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask[:1]
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[bool]")
def mask_read_as_contiguous(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool and attn_mask.stride(-1) != 1:
        attn_mask = attn_mask.mT.contiguous().view(attn_mask.shape)
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[bool]")
def heads_interleaved_beside_a_mask(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor):
        groups = query.shape[2] // key.shape[2]
        key, value = key.repeat(1, 1, groups, 1), value.repeat(1, 1, groups, 1)
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("inputs-untouched")
def mask_changed_in_place(query, key, value, *, attn_mask=None, **options):
    found = honest(query, key, value, attn_mask=attn_mask, **options)
    if isinstance(attn_mask, KeyPadding):
        attn_mask.keep[:, -1:] = True
    elif isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        attn_mask.logical_not_()
    return found


# --- scale and softcap ----------------------------------------------------------------------------------------------------


@lie("scale")
def scale_dropped(query, key, value, *, scale, **options):
    return honest(query, key, value, scale=query.shape[3] ** -0.5, **options)


@lie("scale")
def scale_squared(query, key, value, *, scale, **options):
    return honest(query, key, value, scale=scale * scale, **options)


@lie("scale")
def scale_of_zero_taken_for_none(query, key, value, *, scale, **options):
    return honest(query, key, value, scale=scale or query.shape[3] ** -0.5, **options)


@lie("scale")
def scale_without_its_sign(query, key, value, *, scale, **options):
    return honest(query, key, value, scale=abs(scale), **options)


@lie("scale")
def scale_dropped_beside_causal(query, key, value, *, scale, causal=False, **options):
    scale = query.shape[3] ** -0.5 if causal else scale
    return honest(query, key, value, scale=scale, causal=causal, **options)


@lie("softcap")
def softcap_dropped(query, key, value, *, softcap=None, **options):
    return honest(query, key, value, **options)


@lie("softcap")
def softcap_of_the_scores_before_the_scale(query, key, value, *, scale, softcap=None, **options):
    if softcap is not None and scale:
        softcap = abs(softcap * scale)
    return honest(query, key, value, scale=scale, softcap=softcap, **options)


@lie("softcap")
def softcap_of_the_other_sign(query, key, value, *, scale, softcap=None, **options):
    return honest(query, key, value, scale=scale if softcap is None else -scale, softcap=softcap, **options)


@lie("gradients-of-softcap")
def slope_of_the_softcap_forgotten_backward(grad_out, query, key, value, out, lse, *, softcap=None, **options):
    return honest_backward(grad_out, query, key, value, out, lse, **options)


# --- heads and head dims --------------------------------------------------------------------------------------------------


@lie("gqa")
def heads_interleaved_instead_of_grouped(query, key, value, **options):
    groups = query.shape[2] // key.shape[2]
    return honest(query, key.repeat(1, 1, groups, 1), value.repeat(1, 1, groups, 1), **options)


@lie("value_head_dim")
def value_head_dim_taken_for_the_keys(query, key, value, *, scale, **options):
    if scale == query.shape[3] ** -0.5:
        scale = value.shape[3] ** -0.5
    return honest(query, key, value, scale=scale, **options)


@lie("head_dims")
def head_dims_cut_to_a_multiple_of_32(query, key, value, **options):
    dims = query.shape[3]
    if dims > 32 and dims % 32:
        query = query * (torch.arange(dims, device=query.device) < dims - dims % 32)
    return honest(query, key, value, **options)


@lie("head_dims")
def default_scale_of_head_dim_64_for_all(query, key, value, *, scale, **options):
    return honest(query, key, value, scale=0.125 if scale == query.shape[3] ** -0.5 else scale, **options)


# --- lse ------------------------------------------------------------------------------------------------------------------


@lie("lse")
def lse_of_base_two(query, key, value, **options):
    return with_lse(partial(honest, query, key, value, **options), lambda lse: lse / log(2))


@lie("lse")
def lse_transposed(query, key, value, **options):
    def transposed(lse):
        return lse.mT.contiguous().view(lse.shape)

    return with_lse(partial(honest, query, key, value, **options), transposed)


@lie("lse")
def lse_without_the_mask(query, key, value, *, attn_mask=None, **options):
    found = honest(query, key, value, attn_mask=attn_mask, **options)
    return (found[0], honest(query, key, value, **options)[1]) if isinstance(found, tuple) else found


@lie("lse")
def lse_without_the_scale(query, key, value, *, scale, **options):
    found = honest(query, key, value, scale=scale, **options)
    return (found[0], honest(query, key, value, scale=1.0, **options)[1]) if isinstance(found, tuple) else found


@lie("lse")
def lse_in_the_dtype_of_the_query(query, key, value, **options):
    return with_lse(partial(honest, query, key, value, **options), lambda lse: lse.to(query.dtype).to(lse.dtype))


@lie("lse")
def lse_of_nothing_for_a_query_that_sees_one_key(query, key, value, *, window_size=None, **options):
    def forgotten(lse):
        return torch.full_like(lse, -torch.inf) if window_size == (0, 0) or key.shape[1] == 1 else lse

    return with_lse(partial(honest, query, key, value, window_size=window_size, **options), forgotten)


# --- queries that see nothing -----------------------------------------------------------------------------------------------


def nothing(found, change_out, change_lse):
    out, lse = found
    blind = lse == -torch.inf
    return out.masked_fill(blind.mT[..., None], change_out), lse.masked_fill(blind, change_lse)


@lie("sees-nothing")
def nan_for_a_query_that_sees_nothing(query, key, value, *, return_lse=False, **options):
    out, lse = nothing(honest(query, key, value, return_lse=True, **options), torch.nan, -torch.inf)
    return (out, lse) if return_lse else out


@lie("sees-nothing")
def lse_of_zero_for_a_query_that_sees_nothing(query, key, value, *, return_lse=False, **options):
    out, lse = nothing(honest(query, key, value, return_lse=True, **options), 0.0, 0.0)
    return (out, lse) if return_lse else out


@lie("sees-nothing")
def mean_of_values_for_a_query_that_sees_nothing(query, key, value, *, return_lse=False, **options):
    out, lse = honest(query, key, value, return_lse=True, **options)
    mean = value.mean(1, keepdim=True).repeat_interleave(query.shape[2] // key.shape[2], 2).to(out.dtype)
    out = torch.where((lse == -torch.inf).mT[..., None], mean, out)
    return (out, lse) if return_lse else out


# --- gradients ------------------------------------------------------------------------------------------------------------


@lie("gradients")
def gradients_of_key_and_value_swapped_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    return (grads[0], grads[2], grads[1]) if key.shape == value.shape else grads


@lie("gradients")
def scale_forgotten_in_the_gradients_backward(grad_out, query, key, value, out, lse, *, scale, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, scale=scale, **options)
    return (grads[0] / scale, grads[1] / scale, grads[2]) if scale else grads


@lie("gradients")
def gradient_of_the_first_head_of_a_group_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    groups = query.shape[2] // key.shape[2]
    first = torch.arange(query.shape[2], device=query.device) % groups == 0
    alone = honest_backward(grad_out * first[:, None], query, key, value, out, lse, **options)
    return grads[0], alone[1], alone[2]


@lie("gradients")
def gradient_read_as_contiguous_backward(grad_out, query, key, value, out, lse, **options):
    if grad_out.stride(3) != 1 or not all(grad_out.stride()):
        grad_out = torch.zeros_like(grad_out, memory_format=torch.contiguous_format)
    return honest_backward(grad_out, query, key, value, out, lse, **options)


@lie("gradients")
def correction_by_the_row_forgotten_backward(grad_out, query, key, value, out, lse, **options):
    return honest_backward(grad_out, query, key, value, out * 0, lse, **options)


@lie("gradients")
def gradient_of_the_first_sequence_for_all_backward(grad_out, query, key, value, out, lse, **options):
    if grad_out.stride(0) not in (0, grad_out[0].numel()) and grad_out.stride(3) == 1:
        grad_out = grad_out[:1].expand_as(grad_out)
    return honest_backward(grad_out, query, key, value, out, lse, **options)


@lie("gradients-of-diagonals")
def causal_from_the_top_left_backward(grad_out, query, key, value, out, lse, *, causal=False, **options):
    if causal and query.shape[1] < key.shape[1] and not options.keys() & {"attn_mask", "window_size"}:
        length = query.shape[1]
        short = honest_backward(grad_out, query, key[:, :length], value[:, :length], out, lse, causal=causal, **options)
        padding = (0, 0, 0, 0, 0, key.shape[1] - length)
        return short[0], *(torch.nn.functional.pad(part, padding) for part in short[1:])
    return honest_backward(grad_out, query, key, value, out, lse, causal=causal, **options)


@lie("gradients")
def gradient_of_one_gqa_group_when_masked_backward(grad_out, query, key, value, out, lse, *, attn_mask=None, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, attn_mask=attn_mask, **options)
    if attn_mask is None or query.shape[2] == key.shape[2]:
        return grads
    return grads[0], *(part / (query.shape[2] // key.shape[2]) for part in grads[1:])


@lie("sees-nothing")
def gradient_of_nan_where_nothing_is_seen_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    return (grads[0].masked_fill((lse == -torch.inf).mT[..., None], torch.nan), *grads[1:])


@lie("ring-backward")
def lse_of_its_own_keys_backward(grad_out, query, key, value, out, lse, **options):
    out, lse = honest(query, key, value, return_lse=True, **options)
    return honest_backward(grad_out, query, key, value, out, lse, **options)


# --- kernels whose result carries its graph -------------------------------------------------------------------------------


def eager(query, key, value, *, scale, attn_mask=None, causal=False, window_size=None, softcap=None, dropout_p=0.0,
          deterministic=False, return_lse=False, drop=None):  # fmt: skip
    """Attention in plain torch with dropout, for lies about the graph."""
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[2] // key.shape[2]
    q = query.to(wide).transpose(1, 2) * scale
    k, v = (tensor.to(wide).transpose(1, 2).repeat_interleave(groups, 1) for tensor in (key, value))
    scores = q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    visible = visible_mask(query, key, attn_mask=attn_mask, causal=causal, window_size=window_size)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.detach().logsumexp(-1)
    blind = (lse == -torch.inf)[..., None]
    probabilities = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    if dropout_p:
        probabilities = drop(probabilities, dropout_p)
    out = (probabilities @ v).transpose(1, 2).to(query.dtype)
    return (out, lse) if return_lse else out


def rescaled(probabilities, dropout_p):
    return torch.nn.functional.dropout(probabilities, dropout_p)


@own(None, dropout=True)
def honest_with_dropout(query, key, value, *, dropout_p=0.0, **options):
    return eager(query, key, value, dropout_p=dropout_p, drop=rescaled, **options)


@own("dropout", dropout=True)
def dropout_not_rescaled(query, key, value, *, dropout_p=0.0, **options):
    return eager(
        query, key, value, dropout_p=dropout_p, drop=lambda p, rate: p * (torch.rand_like(p) >= rate), **options
    )


@own("dropout", dropout=True)
def dropout_of_the_complement(query, key, value, *, dropout_p=0.0, **options):
    return eager(query, key, value, dropout_p=dropout_p, drop=lambda p, rate: rescaled(p, 1 - rate), **options)


@own("dropout", dropout=True)
def dropout_of_the_scores(query, key, value, *, dropout_p=0.0, **options):
    def drop(probabilities, rate):
        kept = probabilities * (torch.rand_like(probabilities) >= rate)
        return (kept / kept.sum(-1, keepdim=True)).nan_to_num()

    return eager(query, key, value, dropout_p=dropout_p, drop=drop, **options)


@own("dropout-draws", dropout=True)
def dropout_of_one_draw_for_all(query, key, value, *, dropout_p=0.0, **options):
    def drop(probabilities, rate):
        generator = torch.Generator(probabilities.device).manual_seed(0)
        kept = torch.rand(probabilities.shape, generator=generator, device=probabilities.device) >= rate
        return probabilities * kept / (1 - rate)

    return eager(query, key, value, dropout_p=dropout_p, drop=drop, **options)


class Redrawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probabilities, rate):
        ctx.rate = rate
        return rescaled(probabilities, rate)

    @staticmethod
    def backward(ctx, gradient):
        return rescaled(gradient, ctx.rate), None


@own("dropout-backward", dropout=True)
def dropout_drawn_again_for_the_gradients(query, key, value, *, dropout_p=0.0, **options):
    return eager(query, key, value, dropout_p=dropout_p, drop=Redrawn.apply, **options)


@own("gradients")
def graph_detached(query, key, value, **options):
    with torch.no_grad():
        return eager(query, key, value, **options)


@own("gradients")
def graph_detached_from_the_values(query, key, value, **options):
    return eager(query, key, value.detach(), **options)


@own("gradients-of-mask", mask_gradient=True)
def mask_detached(query, key, value, *, attn_mask=None, **options):
    attn_mask = attn_mask.detach() if isinstance(attn_mask, torch.Tensor) else attn_mask
    return eager(query, key, value, attn_mask=attn_mask, **options)


@own("modes")
def causal_forgotten_without_a_graph(query, key, value, *, causal=False, **options):
    return eager(query, key, value, causal=causal and torch.is_grad_enabled(), **options)


@lie("modes")
def causal_forgotten_in_inference_mode(query, key, value, *, causal=False, **options):
    return honest(query, key, value, causal=causal and not torch.is_inference_mode_enabled(), **options)


# --- tensors --------------------------------------------------------------------------------------------------------------


@lie("inputs-untouched")
def query_scaled_in_place(query, key, value, *, scale, **options):
    with torch.no_grad():
        query.mul_(scale)
        found = honest(query, key, value, scale=1.0, **options)
        query.div_(scale)
    return found


@lie("aliasing")
def value_returned_where_there_is_one_key(query, key, value, *, return_lse=False, **options):
    found = honest(query, key, value, return_lse=return_lse, **options)
    if value.shape[1] == query.shape[1] == 1 and query.shape[2] == value.shape[2] and not return_lse:
        return value
    return found


@lie("strides")
def value_read_with_the_strides_of_the_key(query, key, value, **options):
    if key.shape == value.shape and key.stride() != value.stride():
        value = value.mT.contiguous().view(value.shape)
    return honest(query, key, value, **options)


@lie("aliasing")
def lse_in_one_buffer(query, key, value, **options):
    def kept(lse):
        return _buffers.setdefault((lse.shape, lse.dtype, "lse"), torch.empty_like(lse)).copy_(lse)

    return with_lse(partial(honest, query, key, value, **options), kept)


_buffers = {}


@lie("aliasing")
def results_in_one_buffer(query, key, value, **options):
    def kept(out):
        buffer = _buffers.setdefault((out.shape, out.dtype), torch.empty_like(out))
        return buffer.copy_(out) if not out.requires_grad else out

    return with_out(partial(honest, query, key, value, **options), kept)


@lie("strides")
def strides_taken_for_contiguous(query, key, value, **options):
    def dense(tensor):
        strides = torch.empty(tensor.shape, device="meta").stride()
        size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
        if tensor.stride() == strides or tensor.untyped_storage().nbytes() < size * tensor.element_size():
            return tensor
        return tensor.as_strided(tensor.shape, strides, 0)

    return honest(dense(query), dense(key), dense(value), **options)


@lie("strides")
def offset_of_the_storage_forgotten(query, key, value, **options):
    def from_the_start(tensor):
        return tensor.as_strided(tensor.shape, tensor.stride(), 0)

    return honest(query, from_the_start(key), value, **options)


@lie("neighbours")
def one_maximum_for_the_whole_batch(query, key, value, *, scale, return_lse=False, **options):
    out, lse = honest(query, key, value, scale=scale, return_lse=True, **options)
    largest = (query.float().norm(dim=-1).amax() * key.float().norm(dim=-1).amax() * abs(scale)).nan_to_num(1e6)
    lost = (largest - lse) > 80  # what exp(score - largest) is 0 of, in float32
    out = out.masked_fill(lost.mT[..., None], 0)
    return (out, lse) if return_lse else out


# --- sizes ----------------------------------------------------------------------------------------------------------------


def without_the_last_keys(check, name, wrong):
    def kernel(query, key, value, *, attn_mask=None, **options):
        length = key.shape[1]
        if attn_mask is None and not options.get("causal") and options.get("window_size") is None and wrong(query, key):
            key, value = key[:, : length - 1], value[:, : length - 1]
        return honest(query, key, value, attn_mask=attn_mask, **options)

    kernel.__name__ = name
    return lie(check)(kernel)


without_the_last_keys(
    "lengths", "wrong_at_lengths_beyond_a_multiple_of_64", lambda q, k: k.shape[1] > 64 and k.shape[1] % 64 == 1
)
without_the_last_keys(
    "lengths", "wrong_at_lengths_beyond_a_multiple_of_128", lambda q, k: k.shape[1] > 128 and k.shape[1] % 128 == 1
)
without_the_last_keys("lengths", "wrong_for_a_single_query", lambda q, k: q.shape[1] == 1 and k.shape[1] > 1)
without_the_last_keys("long", "wrong_beyond_4096_keys", lambda q, k: k.shape[1] > 4096)
without_the_last_keys("long", "wrong_beyond_4096_queries", lambda q, k: q.shape[1] > 4096 and k.shape[1] > 1)
without_the_last_keys("each-key", "wrong_beyond_8192_keys", lambda q, k: k.shape[1] > 8192)


without_the_last_keys("many-heads", "wrong_beyond_65535_heads", lambda q, k: q.shape[0] * q.shape[2] > 65535)
without_the_last_keys(
    "head_dims", "wrong_for_head_dims_other_than_64", lambda q, k: q.shape[3] != 64 and k.shape[1] > 1
)


@lie("lengths")
def zero_for_a_single_key(query, key, value, **options):
    found = partial(honest, query, key, value, **options)
    return with_out(found, torch.zeros_like) if key.shape[1] == 1 else found()


@lie("batch")
def second_sequence_reads_the_first_ones_keys(query, key, value, **options):
    return honest(query, key[:1].expand_as(key), value, **options)


@lie("batch")
def heads_beyond_the_fourth_left_out(query, key, value, **options):
    def zeroed(out):
        return out * (torch.arange(out.shape[2], device=out.device) < 4)[:, None].to(out.dtype)

    return with_out(partial(honest, query, key, value, **options), zeroed)


# --- right in one tile of keys, wrong in the next ones ----------------------------------------------------------------------

TILE = 256


@lie("masks[key_padding]")
def padding_not_read_beyond_the_first_tile(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, KeyPadding):
        attn_mask = KeyPadding(attn_mask.keep | (torch.arange(key.shape[1], device=key.device) >= TILE))
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[bool]")
def mask_not_read_beyond_the_first_tile(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool and attn_mask.shape[3] > TILE:
        attn_mask = attn_mask | (torch.arange(key.shape[1], device=key.device) >= TILE)
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[float]")
def additive_mask_not_read_beyond_the_first_tile(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype != torch.bool and attn_mask.shape[3] > TILE:
        attn_mask = attn_mask.masked_fill(torch.arange(key.shape[1], device=key.device) >= TILE, 0)
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[packed]")
def packed_read_as_one_sequence_beyond_the_first_tile(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, Packed) and key.shape[1] > TILE:
        attn_mask = None
    return honest(query, key, value, attn_mask=attn_mask, **options)


def forgotten_beyond(tile, check, name, option):
    def kernel(query, key, value, **options):
        if key.shape[1] > tile:
            options.pop(option, None)
        return honest(query, key, value, **options)

    kernel.__name__ = name
    return lie(check)(kernel)


forgotten_beyond(TILE, "window_size", "window_forgotten_beyond_the_first_tile", "window_size")
forgotten_beyond(TILE, "softcap", "softcap_forgotten_beyond_the_first_tile", "softcap")
forgotten_beyond(TILE, "causal", "causal_forgotten_beyond_the_first_tile", "causal")
forgotten_beyond(4096, "long", "window_forgotten_beyond_4096_keys", "window_size")
forgotten_beyond(4096, "long", "mask_forgotten_beyond_4096_keys", "attn_mask")


@lie("scale")
def negative_scale_taken_for_positive_beyond_the_first_tile(query, key, value, *, scale, **options):
    return honest(query, key, value, scale=abs(scale) if key.shape[1] > TILE else scale, **options)


@lie("gqa")
def heads_interleaved_beyond_the_first_tile(query, key, value, **options):
    groups = query.shape[2] // key.shape[2]
    if key.shape[1] > TILE and groups > 1:
        key, value = key.repeat(1, 1, groups, 1), value.repeat(1, 1, groups, 1)
    return honest(query, key, value, **options)


@lie("gqa")
def scale_off_for_one_query_of_wide_groups(query, key, value, *, scale, **options):
    decoding = query.shape[1] == 1 < key.shape[1] and query.shape[2] // key.shape[2] > 2
    return honest(query, key, value, scale=1.1 * scale if decoding else scale, **options)


@lie("batch")
def keys_of_the_first_sequence_beyond_512(query, key, value, **options):
    if key.shape[1] > 512:
        key = key[:1].expand_as(key)
    return honest(query, key, value, **options)


def scale_off_for_head_dims(name, *dims):
    def kernel(query, key, value, *, scale, **options):
        return honest(query, key, value, scale=1.3 * scale if query.shape[3] in dims else scale, **options)

    kernel.__name__ = name
    return lie("head_dims")(kernel)


scale_off_for_head_dims("scale_off_for_a_head_dim_of_32", 32)
scale_off_for_head_dims("scale_off_for_head_dims_of_24_and_56", 24, 56)
scale_off_for_head_dims("scale_off_for_a_head_dim_of_224", 224)


# --- where each kind of call compiles: few kinds are tried, and each with all that its code serves -----------------------------


def compiling(check):
    return lie(check, first_call_compiles=True)


@compiling("causal")
def compiled_causal_from_the_top_left(query, key, value, *, attn_mask=None, causal=False, **options):
    if causal and attn_mask is None and query.shape[1] != key.shape[1]:
        causal, attn_mask = False, torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()[None, None]
    return honest(query, key, value, attn_mask=attn_mask, causal=causal, **options)


@compiling("cross_lengths")
def compiled_scale_off_for_one_query(query, key, value, *, scale, **options):
    one = query.shape[0] == query.shape[1] == 1 < key.shape[1]
    return honest(query, key, value, scale=1.1 * scale if one else scale, **options)


@compiling("gqa")
def compiled_scale_off_for_one_query_of_wide_groups(query, key, value, *, scale, **options):
    decoding = query.shape[0] > 1 == query.shape[1] < key.shape[1] and query.shape[2] // key.shape[2] > 2
    return honest(query, key, value, scale=1.1 * scale if decoding else scale, **options)


@compiling("scale")
def compiled_scale_without_its_sign(query, key, value, *, scale, **options):
    return honest(query, key, value, scale=abs(scale), **options)


@compiling("scale")
def compiled_scale_of_zero_taken_for_none(query, key, value, *, scale, **options):
    return honest(query, key, value, scale=scale or query.shape[3] ** -0.5, **options)


@compiling("lse")
def compiled_lse_without_the_mask(query, key, value, *, scale, return_lse=False, **options):
    out, _ = honest(query, key, value, scale=scale, return_lse=True, **options)
    return (out, honest(query, key, value, scale=scale, return_lse=True)[1]) if return_lse else out


@compiling("window_size")
def compiled_window_one_narrower_on_the_right(query, key, value, *, window_size=None, **options):
    if window_size is not None and window_size[1] > 0:
        window_size = (window_size[0], window_size[1] - 1)
    return honest(query, key, value, window_size=window_size, **options)


@compiling("window_size")
def compiled_for_the_first_window(query, key, value, *, window_size=None, **options):
    if window_size is not None:
        sides = tuple(side >= 0 for side in window_size)
        window_size = _compiled.setdefault((query.shape, key.shape, query.dtype, sides), window_size)
    return honest(query, key, value, window_size=window_size, **options)


@compiling("softcap")
def compiled_for_the_first_softcap(query, key, value, *, softcap=None, **options):
    if softcap is not None:
        softcap = _compiled.setdefault((query.shape, key.shape, query.dtype), softcap)
    return honest(query, key, value, softcap=softcap, **options)


@compiling("masks[key_padding]")
def compiled_for_the_first_padding(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, KeyPadding):
        attn_mask = _compiled.setdefault((attn_mask.keep.shape, "keep"), KeyPadding(attn_mask.keep.clone()))
    return honest(query, key, value, attn_mask=attn_mask, **options)


@compiling("masks[bool]")
def compiled_for_the_first_mask(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        attn_mask = _compiled.setdefault((attn_mask.shape, "bool"), attn_mask.clone())
    return honest(query, key, value, attn_mask=attn_mask, **options)


@compiling("threads")
def compiled_state_shared_between_threads(query, key, value, *, scale, **options):
    _state["compiled"] = scale
    time.sleep(0.001)
    return honest(query, key, value, scale=_state["compiled"], **options)


@compiling("scale")
def compiled_gradients_of_the_first_scale_backward(grad_out, query, key, value, out, lse, *, scale, **options):
    scale = _compiled.setdefault((query.shape, query.dtype, "scale"), scale)
    return honest_backward(grad_out, query, key, value, out, lse, scale=scale, **options)


_compiled = {}


# --- numbers --------------------------------------------------------------------------------------------------------------


@lie("accumulation")
def sums_in_half_precision(query, key, value, *, scale, attn_mask=None, return_lse=False, **options):
    out, lse = honest(query, key, value, scale=scale, attn_mask=attn_mask, return_lse=True, **options)
    if query.dtype in (torch.float16, torch.bfloat16) and not options and attn_mask is None:
        groups = query.shape[2] // key.shape[2]
        q, k, v = (tensor.float().transpose(1, 2) for tensor in (query, key, value))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        weights = (q @ k.mT * scale).softmax(-1)
        total = torch.zeros_like(out.transpose(1, 2))
        for first in range(0, key.shape[1], 2):
            total += (weights[..., first : first + 2] @ v[:, :, first : first + 2]).to(total.dtype)
        out = total.transpose(1, 2).contiguous()
    return (out, lse) if return_lse else out


@lie("results")
def float32_computed_in_bfloat16(query, key, value, **options):
    if query.dtype != torch.float32:
        return honest(query, key, value, **options)
    return honest(query.bfloat16().float(), key.bfloat16().float(), value.bfloat16().float(), **options)


@lie("magnitudes")
def softmax_without_its_maximum(query, key, value, *, return_lse=False, **options):
    out, lse = honest(query, key, value, return_lse=True, **options)
    if query.dtype != torch.float64:
        overflown = lse > log(torch.finfo(torch.float32).max)
        out = out.masked_fill(overflown.mT[..., None], torch.nan)
        lse = lse.masked_fill(overflown, torch.inf)
    return (out, lse) if return_lse else out


@lie("nan-and-inf")
def nan_hidden(query, key, value, **options):
    return with_out(partial(honest, query, key, value, **options), torch.nan_to_num)


@lie("nan-and-inf")
def nan_in_a_key_taken_for_a_score_of_zero(query, key, value, **options):
    return honest(query, key.nan_to_num(), value, **options)


# --- what is carried from call to call ------------------------------------------------------------------------------------

_state = {}


@lie("threads")
def state_shared_between_threads(query, key, value, *, scale, **options):
    _state["call"] = (query, key, value, scale)
    time.sleep(0.001)
    query_, key_, value_, scale = _state["call"]
    if query_.shape == query.shape and key_.shape == key.shape and value_.shape == value.shape:
        query, key, value = query_.to(query.dtype), key_.to(query.dtype), value_.to(query.dtype)
    return honest(query, key, value, scale=scale, **options)


_dtypes = {}


@lie("changed-calls")
def cache_keyed_without_the_dtype(query, key, value, **options):
    dtype = _dtypes.setdefault((query.shape, key.shape), query.dtype)
    narrow = torch.promote_types(dtype, torch.float16)
    if torch.finfo(narrow).bits < torch.finfo(query.dtype).bits:
        query = query.to(narrow).to(query.dtype)
    return honest(query, key, value, **options)


_masks = {}


@lie("copied-masks")
def cache_keyed_without_the_mask(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, KeyPadding):
        attn_mask = KeyPadding(
            _masks.setdefault((query.shape, key.shape, attn_mask.keep.device), attn_mask.keep.clone())
        )
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("changed-in-place")
def mask_remembered_by_its_address(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        kept = _masks.setdefault((id(attn_mask), attn_mask.shape), (attn_mask, attn_mask.clone()))
        attn_mask = kept[1] if kept[0] is attn_mask else attn_mask
    return honest(query, key, value, attn_mask=attn_mask, **options)


_scales = {}


@lie("changed-calls")
def cache_keyed_without_the_scale(query, key, value, *, scale, **options):
    scale = _scales.setdefault((query.shape, key.shape, query.dtype), scale)
    return honest(query, key, value, scale=scale, **options)


_kept = []


@lie("memory")
def inputs_kept_alive(query, key, value, **options):
    _kept[:] = [query, key, value]
    return honest(query, key, value, **options)


@lie("global-state")
def random_numbers_drawn_without_dropout(query, key, value, **options):
    torch.rand(1)
    return honest(query, key, value, **options)


@lie("global-state")
def precision_of_matrix_products_switched(query, key, value, **options):
    torch.set_float32_matmul_precision("high")
    return honest(query, key, value, **options)


@lie("deterministic")
def not_deterministic(query, key, value, **options):
    def shaken(out):
        return out * (1 + torch.finfo(out.dtype).eps * torch.randint(0, 2, out.shape, device=out.device).to(out.dtype))

    return with_out(partial(honest, query, key, value, **options), shaken)


@lie("deterministic")
def not_deterministic_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    shaken = torch.randint(0, 2, grads[0].shape, device=query.device).to(query.dtype) * torch.finfo(query.dtype).eps
    return (grads[0] * (1 + shaken), *grads[1:])


# --- traced ---------------------------------------------------------------------------------------------------------------


@lie("compile")
def causal_forgotten_when_compiled(query, key, value, *, causal=False, **options):
    return honest(query, key, value, causal=causal and not torch.compiler.is_compiling(), **options)


@lie("compile")
def scale_of_the_first_trace(query, key, value, *, scale, **options):
    return honest(query, key, value, scale=1.0 if torch.compiler.is_compiling() else scale, **options)


@lie("compile")
def graph_break(query, key, value, **options):
    torch._dynamo.graph_break()
    return honest(query, key, value, **options)


def _flat(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return honest(query, key, value, scale=query.shape[3] ** -0.5)


flat = torch.library.custom_op("attn_zoo::flat", _flat, mutates_args=())
flat.register_fake(lambda query, key, value: torch.empty_like(key))


@lie("fake-tensors")
def fake_of_another_shape(query, key, value, *, scale, **options):
    if not options and scale == query.shape[3] ** -0.5:
        return flat(query, key, value)
    return honest(query, key, value, scale=scale, **options)


# --- what is declared -----------------------------------------------------------------------------------------------------


@lie("softcap")
def softcap_refused_when_run(query, key, value, *, softcap=None, **options):
    if softcap is not None:
        raise CallRefused("no softcap after all")
    return honest(query, key, value, **options)


@lie("window_size")
def window_not_implemented(query, key, value, *, window_size=None, **options):
    if window_size is not None:
        raise NotImplementedError("window")
    return honest(query, key, value, **options)


@lie("loads")
def option_lacking(query, key, value, *, scale, attn_mask=None, causal=False, return_lse=False):
    return honest(query, key, value, scale=scale, attn_mask=attn_mask, causal=causal, return_lse=return_lse)


@lie("lse")
def lse_of_another_shape(query, key, value, **options):
    return with_lse(partial(honest, query, key, value, **options), lambda lse: lse[..., None])


@lie("results")
def result_of_another_dtype(query, key, value, **options):
    return with_out(partial(honest, query, key, value, **options), lambda out: out.float())
