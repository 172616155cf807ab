"""``torch.nn.functional.scaled_dot_product_attention`` as it is, with torch's own choice of kernel.

SDPA has (B, H, S, D) tensors, a causal diagonal from the top left, and masks that are written out; here it gets the
mask that says what the call means. What it is known to get wrong is kept away from it:

- the kernel for CPU takes the maximum of fewer than 16 scores without NaN, and with no mask answers 0 to a query whose
  scores are all NaN (seen on torch 2.6 to 2.13): so few keys come with a mask of 0, but not in an exported program, which
  is made for any length;
- kernels hide a key by a score of -inf that they scale afterwards, and seek the largest score before scaling (CPU's causal
  gives NaN at scale 0): a scale of 0 or below moves into the query;
- their log-sum-exp, which the backward needs, loses everything where a row of a float mask is far from 0: that is taken out;
- what a query that sees nothing gets depends on the kernel, and on whether it is NaN: off the CPU it is made to see, and its
  result cleared;
- in half precision on CPU a score of +inf gives 0 at some lengths, not NaN: such a result is computed again in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from attn_core.masks import Description, Packed, visible_mask
from attn_core.offset import asks, without_offset
from attn_core.shaping import aligned, in_graph, needs_graph, positive_scale
from attn_native import aten, aten_cpu
from attn_native.math import blind_queries, narrowed
from attn_native.math import forward as math_forward

if TYPE_CHECKING:
    from collections.abc import Callable

_sdpa = torch.nn.functional.scaled_dot_product_attention
_FEW_KEYS = 16  # float32 lanes of the widest vector
_HALF = (torch.float16, torch.bfloat16)

FLASH, EFFICIENT, CUDNN = 1, 2, 3  # torch.nn.attention.SDPBackend, as the choice is told
_FUSED: dict[int, Callable[..., Any]] = {
    FLASH: aten.flash_forward,
    EFFICIENT: aten.efficient_forward,
    CUDNN: aten.cudnn_forward,
}


def forward(  # noqa: C901 - a further function on the way of the plain call would cost what it saves
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: torch.Tensor | Description | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,  # noqa: ARG001 - declared where it holds of every kernel
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute attention with SDPA.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        scale: of the scores.
        attn_mask: bool or float, 4-D, or described.
        causal: bottom-right.
        window_size: (left, right) in keys, -1 unlimited.
        dropout_p: probability to drop.
        deterministic: asked for where the declaration has it.
        return_lse: also return the log-sum-exp, from the operator behind the kernel that SDPA would choose.

    Returns:
        (B, Sq, Hq, Dv) in query's dtype, and the log-sum-exp (B, Hq, Sq) where asked.

    Example:
        >>> import torch
        >>> q = torch.zeros(1, 2, 1, 4)
        >>> v = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
        >>> forward(q, q, v, scale=0.5, causal=True)[..., 0].flatten().tolist()
        [1.0, 2.0]
    """
    if query.is_cuda and (
        torch.compiler.is_dynamo_compiling()
        or query.storage_offset() % 8
        or key.storage_offset() % 8
        or value.storage_offset() % 8
        or not (query.is_contiguous() and key.is_contiguous() and value.is_contiguous())
    ):
        query, key, value = readable(query), readable(key), readable(value)
    if (
        attn_mask is None
        and window_size is None
        and not return_lse
        and scale > 0.0
        and query.shape[2] == key.shape[2]
        and (not causal or query.shape[1] == key.shape[1])
        and (not query.is_cpu or _enough_keys(key))
    ):  # the plain call, first and at no cost
        out = _sdpa(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, dropout_p, causal, scale=scale
        ).transpose(1, 2)
        if query.is_cuda:
            return _with_readable_gradient(out) if out.requires_grad else out
        if query.dtype in _HALF:
            return _with_infinity(out, query, key, value, None, None, causal=causal, scale=scale, dropout_p=dropout_p)
        return out
    if not torch.compiler.is_dynamo_compiling() and type(key.shape[1]) is int:  # it would bind the graph to the lengths
        causal, window_size = narrowed(query.shape[1], key.shape[1], causal=causal, window_size=window_size)
    if return_lse and query.is_cpu:
        return _on_cpu(
            query, key, value, attn_mask, causal=causal, window_size=window_size, scale=scale, dropout_p=dropout_p
        )
    if scale <= 0.0:
        query, scale = positive_scale(query, scale)
    mask, blind = _mask(query, key, attn_mask, causal=causal, window_size=window_size)
    causal = causal and mask is None
    query, blind = _without_blind(query, key, value, blind)
    offset = None
    if isinstance(attn_mask, torch.Tensor):
        mask, offset = without_offset(mask, query.shape[1], key.shape[1])
    if mask is not None and query.is_cuda:
        mask = _readable_mask(mask, key.shape[1])
    if return_lse:
        out, lse = _with_lse(query, key, value, mask, blind, causal=causal, scale=scale, dropout_p=dropout_p)
        return _with_readable_gradient(out), lse if offset is None else lse + offset
    out = _general(query, key, value, mask, causal=causal, scale=scale, dropout_p=dropout_p)
    out = _with_infinity(out, query, key, value, mask, blind, causal=causal, scale=scale, dropout_p=dropout_p)
    return _with_readable_gradient(out if blind is None else out.masked_fill(blind.transpose(1, 2), 0.0))


def _without_blind(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blind: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Without what is in queries that see nothing, where a NaN of theirs would come into results or gradients of others."""
    if blind is None or (query.is_cpu and asks(blind) and not bool(blind.any())):
        return query, None
    if query.is_cpu or needs_graph(query, key, value):
        query = query.masked_fill(blind.transpose(1, 2), 0.0)
    return query, blind


def _with_infinity(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    blind: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """The same result; computed in float32 where torch's kernel for CPU has, in half precision, 0 for a score of +inf."""
    if (
        query.dtype not in _HALF or options["dropout_p"] or not (query.is_cpu and asks(out))
    ):  # dropout has another kernel
        return out
    nothing = (out.detach() == 0.0).all(-1)
    if blind is not None:
        nothing = nothing & ~blind[..., 0].transpose(1, 2)
    if not bool(nothing.any()) or _are_finite(query, key, mask, options["scale"]):
        return out
    if mask is not None and mask.dtype == query.dtype:
        mask = mask.float()
    return _general(query.float(), key.float(), value.float(), mask, **options).to(query.dtype)


def _are_finite(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> bool:
    """Whether no score can be infinite or NaN, by the largest numbers of query and key; values may well be 0."""
    if mask is not None and mask.dtype != torch.bool and not bool(mask.detach().amax() < float("inf")):
        return False
    reach = query.detach().abs().amax().double() * key.detach().abs().amax().double()
    return bool(reach * (query.shape[3] * max(abs(scale), 1.0)) < torch.finfo(torch.float32).max)


def _with_readable_gradient(out: torch.Tensor) -> torch.Tensor:
    """The same result, whose gradient SDPA's kernels for a GPU can read: they do not look, as with query and key."""
    if out.is_cuda and out.requires_grad:
        out.register_hook(aligned)
    return out


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """Copy what does not begin on 16 bytes, or is expanded: SDPA does not look.

    A misaligned read ends the process, and cuDNN refuses a result of an expanded query's strides.
    """
    if torch.compiler.is_dynamo_compiling():
        return _readable_in_graph(tensor)
    if tensor.storage_offset() % 8 == 0 and 0 not in tensor.stride():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


_readable_in_graph = in_graph(readable)


def _readable_mask(mask: torch.Tensor, keys: int) -> torch.Tensor:
    """Lay a mask out as SDPA's kernels for CUDA read it: keys side by side, and each row on 16 bytes, which nobody checks."""
    return aligned(mask if mask.shape[3] == keys else mask.expand(-1, -1, -1, keys))


def _enough_keys(key: torch.Tensor) -> bool:
    """Whether the kernel for CPU can be left alone; a symbolic length of an exported program is not compared."""
    length = key.shape[1]
    return type(length) is not int or length >= _FEW_KEYS


def _general(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    if _wants_gradient_of_mask_alone(query, key, value, mask):
        return cast(
            "torch.Tensor", aten.efficient_forward(query, key, value, scale=scale, attn_mask=mask, dropout_p=dropout_p)
        )
    if query.shape[2] == key.shape[2]:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _sdpa(q, k, v, mask, dropout_p, causal, scale=scale).transpose(1, 2)
    if _groups_heads(query, value, mask):
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _sdpa(q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=True).transpose(1, 2)
    key, value = _for_each_query_head(key, query), _for_each_query_head(value, query)
    return _general(query, key, value, mask, causal=causal, scale=scale, dropout_p=dropout_p)


def _wants_gradient_of_mask_alone(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    """Whether SDPA's kernel for CUDA would keep no log-sum-exp for the backward: it asks query, key and value alone.

    The backward then reads beyond its memory (seen on torch 2.11).
    """
    if mask is None or not mask.requires_grad or not query.is_cuda or query.dtype == torch.float64:
        return False
    return not (query.requires_grad or key.requires_grad or value.requires_grad)


def _groups_heads(query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a fused kernel takes fewer key heads; the others would leave the call to one that writes the scores out."""
    if query.is_cpu:
        return True
    return query.is_cuda and mask is None and query.dtype in _HALF and query.shape[3] == value.shape[3]


def _for_each_query_head(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(query.shape[2] // tensor.shape[2], 2)


def _mask(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | Description | None,
    *,
    causal: bool,
    window_size: tuple[int, int] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Build the mask that SDPA needs, and which queries see nothing (None: none does)."""
    if attn_mask is None and window_size is None and (not causal or query.shape[1] == key.shape[1]):
        if not query.is_cpu or _enough_keys(key):
            return None, None
        if not causal:
            return query.new_zeros(1, 1, 1, 1), None
    mask = written_out(query, key, attn_mask, causal=causal, window_size=window_size)
    if attn_mask is None and query.shape[1] <= key.shape[1]:
        return mask, None
    blind = blind_queries(mask if mask.dtype == torch.bool else mask.detach() != float("-inf"))
    if query.is_cpu:
        return mask, blind
    return (mask | blind if mask.dtype == torch.bool else mask.masked_fill(blind, 0.0)), blind


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | Description | None,
    *,
    causal: bool,
    window_size: tuple[int, int] | None,
) -> torch.Tensor:
    """One mask for everything that hides keys: bool, or float where the call's own is."""
    visible = visible_mask(query, key, attn_mask=attn_mask, causal=causal, window_size=window_size)
    if not isinstance(attn_mask, torch.Tensor) or attn_mask.dtype == torch.bool:
        return cast("torch.Tensor", visible)
    mask = attn_mask.double() if query.dtype == torch.float64 else attn_mask
    return mask if visible is None else mask.masked_fill(~visible, float("-inf"))


# --- with the log-sum-exp -----------------------------------------------------------------------------------------------


def _with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    blind: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _elsewhere(query, key, value, mask, causal=causal, scale=scale, dropout_p=dropout_p)
    lse = lse.detach()
    if blind is None:
        return out, lse
    return out.masked_fill(blind.transpose(1, 2), 0.0), lse.masked_fill(blind[..., 0], float("-inf"))


def _on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | Description | None,
    *,
    causal: bool,
    window_size: tuple[int, int] | None,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    bias = attn_mask if isinstance(attn_mask, torch.Tensor) else None
    options: dict[str, Any] = {"attn_mask": attn_mask, "causal": causal, "scale": scale, "return_lse": True}
    if not _takes_flash(q, k, v, bias, dropout_p=dropout_p):
        result = math_forward(query, key, value, window_size=window_size, dropout_p=dropout_p, **options)
        return cast("tuple[torch.Tensor, torch.Tensor]", result)
    traced = torch.compiler.is_dynamo_compiling()  # where flash's two calls would bind the graph to the lengths
    corner = causal and traced and query.shape[1] != key.shape[1]
    if window_size is not None or isinstance(attn_mask, Packed) or corner:
        options["attn_mask"] = written_out(query, key, attn_mask, causal=causal, window_size=window_size)
        options["causal"] = False
    out, lse = aten_cpu.forward(query, key, value, **options)
    return out, lse.detach().clone() if out.requires_grad else lse


def _takes_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *, dropout_p: float
) -> bool:
    """Whether SDPA would choose the fused kernel for CPU, the only one there; its own answer can't be traced."""
    if torch.compiler.is_dynamo_compiling():
        fits = dropout_p == 0.0 and q.shape[3] == v.shape[3] and not (mask is not None and mask.requires_grad)
        return fits and q.stride(3) == 1 and k.stride(3) == 1 and v.stride(3) == 1
    return choice_of(q, k, v, mask, causal=False, scale=1.0, dropout_p=dropout_p) == FLASH


def choice_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> int:
    """Which kernel SDPA would choose for (B, H, S, D) tensors, as the number of a ``torch.nn.attention.SDPBackend``."""
    grouped = q.shape[1] != k.shape[1]
    return torch._fused_sdp_choice(q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=grouped)


def _elsewhere(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    if query.shape[2] != key.shape[2] and not _groups_heads(query, value, mask):
        key, value = _for_each_query_head(key, query), _for_each_query_head(value, query)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    choice = choice_of(q, k, v, mask, causal=causal, scale=scale, dropout_p=dropout_p)
    compute = _FUSED.get(choice, math_forward)
    if mask is not None and compute is aten.cudnn_forward:  # its operator takes no mask; SDPA writes a bias out for it
        compute = aten.efficient_forward
    options: dict[str, Any] = {"causal": causal, "dropout_p": dropout_p}
    given = {name: option for name, option in options.items() if option}  # a kernel takes what it is declared for
    if mask is not None:
        given["attn_mask"] = mask
    result = compute(query, key, value, scale=scale, return_lse=True, **given)
    return cast("tuple[torch.Tensor, torch.Tensor]", result)
