"""Attention as the flash libraries define it, written plainly: bottom-right, packed or dense, with its backward by the lse."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn.functional import pad


def visible(queries, keys, causal, left, right, device="cpu"):
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    key = torch.arange(keys, device=device)[None, :]
    if causal:
        right = 0
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left is not None and left >= 0:
        seen &= key >= position - left
    if right is not None and right >= 0:
        seen &= key <= position + right
    return seen


def scores(query, key, scale, softcap):
    groups = query.shape[1] // key.shape[1]
    found = torch.einsum("ihd,jhd->hij", query.float(), key.float().repeat_interleave(groups, 1)) * scale
    return found if not softcap else softcap * torch.tanh(found / softcap)


def forward(query, key, value, seen, scale, softcap, kept=None):
    """One sequence: (S, H, D) to result (Sq, H, Dv) and natural lse (H, Sq), -inf where a query sees nothing."""
    found = scores(query, key, scale, softcap).masked_fill(~seen, -torch.inf)
    lse = found.logsumexp(-1)
    weights = (found - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    if kept is not None:
        weights = weights * kept
    groups = query.shape[1] // key.shape[1]
    out = torch.einsum("hij,jhd->ihd", weights, value.float().repeat_interleave(groups, 1))
    return out.to(query.dtype), lse


def backward(grad_out, query, key, value, out, lse, seen, scale, softcap, kept=None):
    """Gradients of one sequence, from a result and an lse that may be those of a longer one. -inf and +inf weigh nothing."""
    groups, key_heads = query.shape[1] // key.shape[1], key.shape[1]
    keys, values = (item.float().repeat_interleave(groups, 1) for item in (key, value))
    found = scores(query, key, scale, softcap)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    weights = (found.masked_fill(~seen, -torch.inf) - lse[..., None]).exp()
    grad = grad_out.float()
    dropped = weights if kept is None else weights * kept
    grad_values = torch.einsum("hij,ihd->jhd", dropped, grad)
    grad_weights = torch.einsum("ihd,jhd->hij", grad, values)
    if kept is not None:
        grad_weights = grad_weights * kept
    delta = (grad * out.float()).sum(-1).T
    grad_scores = weights * (grad_weights - delta[..., None])
    if softcap:
        grad_scores = grad_scores * (1 - (found / softcap) ** 2)
    grad_query = torch.einsum("hij,jhd->ihd", grad_scores, keys) * scale
    grad_keys = torch.einsum("hij,ihd->jhd", grad_scores, query.float()) * scale
    return (
        grad_query.to(query.dtype),
        grad_keys.unflatten(1, (key_heads, groups)).sum(2).to(key.dtype),
        grad_values.unflatten(1, (key_heads, groups)).sum(2).to(value.dtype),
    )


def sequences(tensor, starts):
    """The slice of each sequence: of a dense tensor (B, S, H, D) its batch laid end to end."""
    if starts is None:
        batch, length = tensor.shape[:2]
        return [slice(item * length, (item + 1) * length) for item in range(batch)]
    return [slice(first, last) for first, last in pairwise(starts.tolist())]


def flat(tensor):
    return tensor.flatten(0, 1) if tensor.ndim == 4 else tensor


def read(place, rows, tile, end):
    """What a kernel reads for a sequence of so many rows: whole tiles where it has such, one at least, up to the end."""
    return slice(place.start, min(place.start + max(-(-rows // tile), 1) * tile, end)) if tile else place


def parts(query, key, cu_seqlens_q, cu_seqlens_k, used, tile):
    """Of each sequence: its rows and columns, and those that are read."""
    end_q, end_k = flat(query).shape[0], flat(key).shape[0]
    places = zip(sequences(query, cu_seqlens_q), sequences(key, cu_seqlens_k), strict=True)
    for number, (rows, whole) in enumerate(places):
        columns = whole if used is None else slice(whole.start, whole.start + int(used[number]))
        high = read(rows, length(rows), tile, rows.stop if cu_seqlens_q is None else end_q)
        yield (rows, columns), (high, read(whole, length(columns), tile, whole.stop if cu_seqlens_k is None else end_k))


def beyond(seen, rows, columns, *, fill):
    """What is read beyond a sequence is hidden: its keys everywhere, its queries where the caller says."""
    wide = seen.new_zeros(rows.stop - rows.start, columns.stop - columns.start)
    wide[: seen.shape[0], : seen.shape[1]] = seen
    wide[seen.shape[0] :, : seen.shape[1]] = fill
    return wide


def length(place):
    return place.stop - place.start


def whole_forward(
    query, key, value, cu_seqlens_q, cu_seqlens_k, causal, left, right, scale, softcap, draw=None, used=None, tile=0
):
    """A call of either kind: result shaped as query, and lse (B, H, S) or (H, N).

    ``used`` says how many keys of each sequence are real. With a ``tile`` keys are read in tiles, which go on into what
    comes after; what is read there has a probability of 0, which is multiplied with its value.
    """
    queries, keys, values = flat(query), flat(key), flat(value)
    out = queries.new_full((*queries.shape[:2], values.shape[2]), torch.nan)
    lse = torch.full((queries.shape[1], queries.shape[0]), torch.nan, dtype=torch.float32, device="cpu")
    places = parts(query, key, cu_seqlens_q, cu_seqlens_k, used, tile)
    for number, ((rows, columns), (_, wide)) in enumerate(places):
        seen = visible(length(rows), length(columns), causal, left, right)
        kept = None if draw is None else draw(number, (queries.shape[1], *seen.shape))
        seen = beyond(seen, rows, wide, fill=False)
        out[rows], lse[:, rows] = forward(queries[rows], keys[wide], values[wide], seen, scale, softcap, kept)
    if cu_seqlens_q is None:
        shape = query.shape[0], query.shape[1]
        return out.unflatten(0, shape).contiguous(), lse.unflatten(1, shape).transpose(0, 1).contiguous()
    return out, lse


def whole_backward(
    grad_out, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, causal, left, right, scale, softcap, draw=None,
    used=None, tile=0,
):  # fmt: skip
    """Gradients of a call of either kind. What no sequence holds stays unwritten, as by the kernels."""
    if cu_seqlens_q is None:
        lse = lse.transpose(0, 1).flatten(1)
    tensors = [flat(item) for item in (grad_out, query, key, value, out)]
    grads = [torch.full(item.shape, torch.nan, dtype=item.dtype, device="cpu") for item in tensors[1:4]]
    places = parts(query, key, cu_seqlens_q, cu_seqlens_k, used, tile)
    for number, ((rows, columns), (high, wide)) in enumerate(places):
        seen = visible(length(rows), length(columns), causal, left, right)
        kept = None if draw is None else draw(number, (tensors[1].shape[1], *seen.shape))
        more = length(high) - length(rows)
        own_out = pad(tensors[4][rows], (0, 0, 0, 0, 0, more))  # these two are kept sequence by sequence
        own_lse = pad(lse[:, rows], (0, more), value=torch.inf)
        dq, dk, dv = backward(
            tensors[0][high], tensors[1][high], tensors[2][wide], tensors[3][wide], own_out, own_lse,
            beyond(seen, high, wide, fill=True), scale, softcap, kept,
        )  # fmt: skip
        grads[0][rows], grads[1][columns], grads[2][columns] = (
            dq[: length(rows)], dk[: length(columns)], dv[: length(columns)]
        )  # fmt: skip
    return tuple(grad.view(item.shape) for grad, item in zip(grads, (query, key, value), strict=True))
