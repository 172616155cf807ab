"""Adapter of ``torch.nn.attention.flex_attention``, always compiled."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from attn_core.masks import KeyPadding, Packed
from attn_core.offset import without_offset
from attn_core.shaping import natural_lse
from attn_native.flex_compiled import eager
from attn_native.flex_forms import attend
from attn_native.flex_operands import Mask, kind_of, prepare, traced

_MOST_HEADS = 65535
"""Of all sequences of a call together: the driver refuses to start torch's kernel for more (seen on torch 2.11)."""


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: Mask = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    deterministic: bool = False,  # noqa: ARG001 (the kernels are; what is not is refused by a rule)
    return_lse: bool = False,
) -> Any:
    """Attention by compiled flex_attention; see ``attention`` for the meaning of the arguments.

    Inside code that torch.compile traces, a CPU call is one opaque operator: the CPU template can't be fused with what
    follows it ("Unsupported for `epilogue_nodes`"). On a GPU flex_attention becomes part of the graph.

    Raises:
        BackendNotUsable: torch.compile has no compiler, is switched off, gives up, or reached its limit.
    """
    left, right = window_size or (-1, -1)
    if causal:
        right = 0
    window_size = None if (left, right) == (-1, -1) else (left, right)
    near, offset = without_offset(attn_mask, query.shape[1], key.shape[1], window_size=window_size)
    if query.device.type == "cpu":
        if traced():
            return _opaque(query, key, value, near, scale, left, right, softcap)
        with torch.no_grad():
            return eager(
                query.detach(), key.detach(), value.detach(), near, scale, left, right, softcap, lse=return_lse
            )
    result = _on_gpu(query, key, value, near, scale, left, right, softcap, lse=return_lse)
    if not return_lse:
        return result
    out, lse = result
    lse = natural_lse(lse, out, -torch.inf)  # the kernel for few queries says of NaN alone what it says of nothing seen
    return out, lse if offset is None else lse + offset


def _on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Mask,
    scale: float, left: int, right: int, softcap: float | None, *, lse: bool,
) -> Any:  # fmt: skip
    if traced():
        form, operands = prepare(query, key, attn_mask, scale, left, right, softcap, lse=lse)
        return attend(form, query, key, value, operands)
    batch, _, heads, _ = query.shape
    if batch * heads > _MOST_HEADS and batch > 1:
        each = max(_MOST_HEADS // heads, 1)
        slices = (slice(start, start + each) for start in range(0, batch, each))
        parts = [
            _on_gpu(
                query[part], key[part], value[part], _sequences(attn_mask, part), scale, left, right, softcap, lse=lse
            )
            for part in slices
        ]
        return tuple(map(torch.cat, zip(*parts, strict=True))) if lse else torch.cat(parts)
    if torch.is_grad_enabled() and _requires_grad(query, key, value):
        result = eager(query, key, value, attn_mask, scale, left, right, softcap, lse=lse)
        _refuse_changes(result[0] if lse else result, query, key, value, attn_mask)
        return result
    with torch.no_grad():
        return eager(query, key, value, attn_mask, scale, left, right, softcap, lse=lse)


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    attn_mask: Mask = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of these keys' part in attention over a longer key sequence, whose result and lse are given.

    flex_attention has no backward that takes them, so the part is computed again, (o, l), and differentiated through the
    merge: with w = exp(l - lse) the result is the sum of w o over the parts, so that

        d result / d o = w        d result / d l = w (o - result)

    Returns:
        (dq, dk, dv), shaped as query, key and value.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    with torch.enable_grad():
        part, part_lse = forward(
            *inputs,
            scale=scale,
            attn_mask=attn_mask,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            return_lse=True,
        )
    weight = (part_lse.detach() - lse).exp().masked_fill(part_lse.detach() == -torch.inf, 0)
    grad_part = grad_out.float() * weight.transpose(1, 2)[..., None]
    grad_lse = (grad_part * (part.detach().float() - out.float())).sum(-1).transpose(1, 2)
    dq, dk, dv = torch.autograd.grad((part, part_lse), inputs, (grad_part.to(part.dtype), grad_lse))
    return dq, dk, dv


def _sequences(attn_mask: Mask, part: slice) -> Mask:
    """What of a mask is for some of the sequences."""
    if isinstance(attn_mask, KeyPadding):
        return KeyPadding(attn_mask.keep[part])
    if isinstance(attn_mask, torch.Tensor) and attn_mask.shape[0] > 1:
        return attn_mask[part]
    return attn_mask


def _refuse_changes(out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Mask) -> None:
    """Have the backward raise where what it reads was changed in place: compiled code does not look (seen on torch 2.11)."""
    of_mask = () if mask is None else (mask,) if isinstance(mask, torch.Tensor) else mask.tensors
    named = [("query", query), ("key", key), ("value", value), *(("attn_mask", tensor) for tensor in of_mask)]
    counts = [(name, tensor, tensor._version) for name, tensor in named if not tensor.is_inference()]

    def check(_: torch.Tensor) -> None:
        changed = dict.fromkeys(name for name, tensor, version in counts if tensor._version != version)
        if changed:
            msg = (
                f"flex: {' and '.join(changed)} was changed in place between the call and its backward, which needs what it was. "
                "Change a copy instead"
            )
            raise RuntimeError(msg)

    if out.requires_grad:
        out.register_hook(check)


def _requires_grad(*tensors: object) -> bool:
    return any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors)


# --- one opaque operator for traced code on CPU -------------------------------------------------------------------------


def _opaque(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Mask,
    scale: float, left: int, right: int, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    tensors: list[torch.Tensor] = []
    if isinstance(attn_mask, KeyPadding):
        tensors = [attn_mask.keep]
    elif isinstance(attn_mask, Packed):
        tensors = [attn_mask.cu_seqlens_q, attn_mask.cu_seqlens_k]
    elif isinstance(attn_mask, torch.Tensor):
        tensors = [attn_mask]
    result: torch.Tensor = _flex_cpu(query, key, value, tensors, kind_of(attn_mask), scale, left, right, softcap)
    return result


_SCHEMA = (  # written out, since torch 2.6 can't read list[Tensor] from a signature, not even to import this
    "(Tensor query, Tensor key, Tensor value, Tensor[] mask, str kind, float scale, int left, int right, float? softcap)"
    " -> Tensor"
)


def _dispatch_keys() -> tuple[Any, Any]:
    return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


with ThreadPoolExecutor(1) as _fresh:
    _ORDINARY_KEYS = _fresh.submit(_dispatch_keys).result()
"""What a thread dispatches by when nothing has changed it. Inside an operator keys are switched off, and Dynamo, compiling
there, fails or fixes lengths that it does not guard (seen on torch 2.13)."""


@torch.library.custom_op("attn_native::flex_cpu", mutates_args=(), schema=_SCHEMA)
def _flex_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: list[torch.Tensor],
    kind: str,
    scale: float,
    left: int,
    right: int,
    softcap: float | None,
) -> torch.Tensor:
    attn_mask: Mask = mask[0] if mask else None
    if kind == "key_padding":
        attn_mask = KeyPadding(mask[0])
    elif kind == "packed":
        attn_mask = Packed(mask[0], mask[1])
    with torch._C._ForceDispatchKeyGuard(*_ORDINARY_KEYS):
        out: torch.Tensor = eager(query, key, value, attn_mask, scale, left, right, softcap, lse=False)
    return out.contiguous()


@_flex_cpu.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: list[torch.Tensor],  # noqa: ARG001
    kind: str, scale: float, left: int, right: int, softcap: float | None,  # noqa: ARG001
) -> torch.Tensor:  # fmt: skip
    return query.new_empty((*query.shape[:3], value.shape[3]))
