"""Kernels that lie where few people look: usual masks in unusual forms, wide models, compiled code. As in ``zoo_kernels``."""

from __future__ import annotations

import time
from functools import partial
from math import log

import torch
from zoo_kernels import eager, honest, honest_backward, lie, own, rescaled, with_out, without_the_last_keys

from attn_core import KeyPadding, Packed
from attn_core.masks import visible_mask

# --- masks ----------------------------------------------------------------------------------------------------------------


@lie("masks[bool]")
def padding_written_out_read_as_lengths(query, key, value, *, attn_mask=None, **options):
    written_out = isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool
    if written_out and attn_mask.shape[1:3] == (1, 1) and query.shape[1] > 1 < query.shape[0] == attn_mask.shape[0]:
        lengths = attn_mask.sum(-1, keepdim=True)
        attn_mask = torch.arange(key.shape[1], device=key.device) < lengths
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[bool]")
def mask_for_the_whole_batch_read_for_one_head(query, key, value, *, attn_mask=None, **options):
    written_out = isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool
    if written_out and attn_mask.shape[0] == 1 < query.shape[0] and attn_mask.shape[1] > 1 < attn_mask.shape[2]:
        attn_mask = attn_mask[:, :1]
    return honest(query, key, value, attn_mask=attn_mask, **options)


def _prepared(kind, query, key, attn_mask, causal, window_size):
    """The dense form, kept with the description under a name that does not tell the diagonal."""
    if not isinstance(attn_mask, kind):
        return {"attn_mask": attn_mask, "causal": causal, "window_size": window_size}

    def dense():
        return visible_mask(query, key, attn_mask=attn_mask, causal=causal, window_size=window_size)

    return {"attn_mask": attn_mask.prepared(("zoo", query.shape[1]), dense)}


@lie("copied-masks")
def padding_prepared_for_the_first_diagonal(
    query, key, value, *, attn_mask=None, causal=False, window_size=None, **options
):
    sight = _prepared(KeyPadding, query, key, attn_mask, causal, window_size)
    return honest(query, key, value, **sight, **options)


@lie("copied-masks")
def packed_prepared_for_the_first_diagonal(
    query, key, value, *, attn_mask=None, causal=False, window_size=None, **options
):
    sight = _prepared(Packed, query, key, attn_mask, causal, window_size)
    return honest(query, key, value, **sight, **options)


@lie("masks[packed]")
def keys_of_documents_end_where_their_queries_do(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, Packed) and query.shape[1] == key.shape[1]:
        attn_mask = Packed(attn_mask.cu_seqlens_q)
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("masks[float]")
def maximum_taken_before_the_bias(query, key, value, *, attn_mask=None, return_lse=False, **options):
    out, lse = honest(query, key, value, attn_mask=attn_mask, return_lse=True, **options)
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype != torch.bool and query.dtype != torch.float64:
        _, without = honest(query, key, value, attn_mask=attn_mask != -torch.inf, return_lse=True, **options)
        overflown = lse - without > log(torch.finfo(torch.float32).max)
        out = out.masked_fill(overflown.mT[..., None], torch.nan)
    return (out, lse) if return_lse else out


class Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, options):
        out, lse = honest(query, key, value, **{**options, "return_lse": True})
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = {name: option for name, option in options.items() if name not in ("return_lse", "deterministic")}
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        return *honest_backward(grad_out, *ctx.saved_tensors, **ctx.options), None


@own("masks[float]")
def weights_recomputed_from_an_lse_that_lost_the_scores(query, key, value, **options):
    out, lse = Recomputed.apply(query, key, value, options)
    return (out, lse) if options.get("return_lse") else out


@lie("masks[float]")
def halves_merged_by_an_lse_that_lost_their_lengths(query, key, value, *, attn_mask=None, return_lse=False, **options):
    half = key.shape[1] // 2
    whole = options.get("causal") or options.get("window_size") or not half or attn_mask is None
    if whole or not (isinstance(attn_mask, torch.Tensor) and attn_mask.is_floating_point()):
        return honest(query, key, value, attn_mask=attn_mask, return_lse=return_lse, **options)
    found = []
    for part in (slice(half), slice(half, None)):
        seen = attn_mask if attn_mask.shape[3] == 1 else attn_mask[..., part]
        found.append(honest(query, key[:, part], value[:, part], attn_mask=seen, return_lse=True, **options))
    (out, lse), (other, other_lse) = found
    total = torch.logaddexp(lse, other_lse)
    shares = [(one - total).exp().nan_to_num(0).mT[..., None] for one in (lse, other_lse)]
    out = (out * shares[0] + other * shares[1]).to(query.dtype)
    return (out, total) if return_lse else out


# --- compiled code ----------------------------------------------------------------------------------------------------------


def forgotten_by_the_compiled_backward(option):
    def kernel(grad_out, query, key, value, out, lse, **options):
        if torch.compiler.is_compiling():
            options.pop(option, None)
        return honest_backward(grad_out, query, key, value, out, lse, **options)

    kernel.__name__ = f"{option}_forgotten_by_the_compiled_backward"
    return lie("compile")(kernel)


for option in ("window_size", "softcap", "causal"):
    forgotten_by_the_compiled_backward(option)


@lie("compile")
def causal_from_the_top_left_when_compiled(query, key, value, *, attn_mask=None, causal=False, **options):
    if torch.compiler.is_compiling() and causal and attn_mask is None and query.shape[1] != key.shape[1]:
        causal, attn_mask = False, torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()[None, None]
    return honest(query, key, value, attn_mask=attn_mask, causal=causal, **options)


# --- threads --------------------------------------------------------------------------------------------------------------

_scratch = {}


@lie("threads")
def state_of_the_backward_shared_between_threads_backward(grad_out, query, key, value, out, lse, *, scale, **options):
    _scratch["scale"] = scale
    time.sleep(0.001)
    return honest_backward(grad_out, query, key, value, out, lse, scale=_scratch["scale"], **options)


# --- sizes ----------------------------------------------------------------------------------------------------------------


@lie("batch")
def heads_beyond_the_sixteenth_left_out(query, key, value, **options):
    def zeroed(out):
        return out * (torch.arange(out.shape[2], device=out.device) < 16)[:, None].to(out.dtype)

    return with_out(partial(honest, query, key, value, **options), zeroed)


@lie("gqa")
def key_heads_of_wide_groups_beyond_the_first_left_out(query, key, value, **options):
    if query.shape[2] // key.shape[2] > 4 and key.shape[2] > 1:
        key, value = (tensor[:, :, :1].expand_as(tensor) for tensor in (key, value))
    return honest(query, key, value, **options)


@lie("long")
def window_beyond_1024_taken_for_unlimited(query, key, value, *, window_size=None, **options):
    if window_size is not None:
        window_size = tuple(-1 if side > 1024 else side for side in window_size)
    return honest(query, key, value, window_size=window_size, **options)


without_the_last_keys("each-key", "wrong_beyond_65536_keys", lambda q, k: k.shape[1] > 65536)


@lie("accumulation")
def gradients_of_values_added_up_in_half_precision_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    plain = not options.keys() & {"attn_mask", "causal", "window_size"}
    if not plain or query.dtype not in (torch.float16, torch.bfloat16):
        return grads
    total = torch.zeros_like(value)
    for first in range(0, query.shape[1], 16):
        rows = slice(first, first + 16)
        given = grad_out[:, rows], query[:, rows], key, value, out[:, rows], lse[:, :, rows]
        total += honest_backward(*given, **options)[2]
    return (*grads[:2], total)


# --- declared to be deterministic --------------------------------------------------------------------------------------------


@lie("deterministic")
def parts_of_many_keys_added_up_as_they_come(query, key, value, **options):
    plain = not options.keys() & {"attn_mask", "causal", "window_size"}
    if plain and key.shape[1] > 1024:
        order = torch.randperm(key.shape[1])
        key, value = key[:, order], value[:, order]
    return honest(query, key, value, **options)


@lie("deterministic")
def parts_of_many_queries_added_up_as_they_come_backward(grad_out, query, key, value, out, lse, **options):
    plain = not options.keys() & {"attn_mask", "causal", "window_size"}
    if not plain or query.shape[1] <= 512:
        return honest_backward(grad_out, query, key, value, out, lse, **options)
    order = torch.randperm(query.shape[1])
    rows = (tensor[:, order] for tensor in (grad_out, query))
    grads = honest_backward(*rows, key, value, out[:, order], lse[:, :, order], **options)
    return (grads[0][:, order.argsort()], *grads[1:])


# --- dropout ----------------------------------------------------------------------------------------------------------------


def dropping(check, name, drop):
    def kernel(query, key, value, *, dropout_p=0.0, **options):
        return eager(query, key, value, dropout_p=dropout_p, drop=drop, **options)

    kernel.__name__ = name
    return own(check, dropout=True)(kernel)


def shared(place):
    """One draw for all that differ in this dimension."""

    def drop(probabilities, rate):
        draw = torch.rand_like(probabilities.narrow(place, 0, 1))
        return probabilities * (draw >= rate) / (1 - rate)

    return drop


dropping("dropout-draws", "dropout_of_one_draw_for_all_sequences", shared(0))
dropping("dropout-draws", "dropout_of_one_draw_for_all_heads", shared(1))
dropping("dropout-draws", "dropout_of_one_draw_for_all_queries", shared(2))
dropping("dropout", "dropout_in_steps_of_a_quarter", lambda p, rate: rescaled(p, round(4 * rate) / 4))


@own("dropout", dropout=True)
def dropout_forgotten_when_compiled(query, key, value, *, dropout_p=0.0, **options):
    rate = 0.0 if torch.compiler.is_compiling() else dropout_p
    return eager(query, key, value, dropout_p=rate, drop=rescaled, **options)


class RedrawnWhenCompiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probabilities, rate):
        ctx.rate = rate
        kept = torch.rand_like(probabilities) >= rate
        ctx.save_for_backward(kept)
        return probabilities * kept / (1 - rate)

    @staticmethod
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        kept = torch.rand_like(gradient) >= ctx.rate if torch.compiler.is_compiling() else kept
        return gradient * kept / (1 - ctx.rate), None


dropping("dropout-backward", "dropout_drawn_again_in_compiled_code", RedrawnWhenCompiled.apply)

# --- what is mapped, and what is kept -----------------------------------------------------------------------------------------


@own("vmap", vmap=True)
def scale_of_the_first_sample_where_keys_are_shared(query, key, value, *, scale, **options):
    is_mapped = torch._C._functorch.is_batchedtensor
    if is_mapped(query) and not is_mapped(key):
        scale = 1.3 * scale
    return eager(query, key, value, scale=scale, **options)


_kept = []


@lie("memory")
def masks_kept_alive(query, key, value, *, attn_mask=None, **options):
    _kept[:] = [attn_mask]
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("memory")
def gradients_of_results_kept_alive_backward(grad_out, query, key, value, out, lse, **options):
    _kept[:] = [grad_out]
    return honest_backward(grad_out, query, key, value, out, lse, **options)
