"""The adapter of ``flash_3_hub``. Importing it loads the kernel, which has to be fetched before.

A dense forward knows how many keys are real, by the function for caches. A backward leaves that unread where it is not told where
sequences start. So it is told it of the keys, with more zeros between them than a tile reads on; queries are dense in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_hub.calls import Library, flash
from attn_hub.fetching import loaded

if TYPE_CHECKING:
    from attn_core.packed_calls import Options, Starts
    from attn_core.shaping import Tensors


_ROOM = 128
"""What its backward reads of keys at once, at most."""


def _fronted(module: Any, query: Any, key: Any, value: Any, lengths: Any, given: dict[str, Any]) -> Any:
    found = module.flash_attn_with_kvcache(
        query,
        key,
        value,
        cache_seqlens=lengths,
        softmax_scale=given["softmax_scale"],
        causal=given["causal"],
        num_splits=1,
        return_softmax_lse=given["return_attn_probs"],
    )
    return found[:2] if given["return_attn_probs"] else found


def _gradients(module: Any, *given: Any) -> Tensors:
    tensors: tuple[torch.Tensor, ...] = given[:6]
    starts: Starts | None = given[6]
    options: Options = given[7]
    lengths: torch.Tensor | None = given[8]
    grad_out, query, key, value, out, lse = tensors
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = (None,) * 4 if starts is None else starts.bounded(options)
    batch, width = key.shape[:2]
    if lengths is not None:
        cu_seqlens_k = torch.arange(0, batch * width + 1, width, dtype=torch.int32, device=key.device)
        longest_k, key, value = width, key.flatten(0, 1), value.flatten(0, 1)
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    places = (cu_seqlens_q, cu_seqlens_k, None, lengths, longest_q, longest_k)
    rest = (options.scale, options.causal, -1, -1, 0.0, options.deterministic)
    backward_of_module = module.flash_attn_interface._flash_attn_backward  # noqa: SLF001 - the library's graph calls it
    backward_of_module(grad_out, query, key, value, out, lse, *places, dq, dk, dv, *rest)
    if lengths is not None:
        dk, dv = dk.unflatten(0, (batch, width)), dv.unflatten(0, (batch, width))
    return dq, dk, dv


forward, backward = flash(
    Library("flash_3_hub", loaded("flash_3_hub"), _gradients, _fronted, room=_ROOM, nothing=float("-inf"))
)
