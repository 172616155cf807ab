"""The adapter of ``flash_3_hub``. Importing it loads the kernel, which has to be fetched before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_hub.calls import Library, flash
from attn_hub.fetching import loaded

if TYPE_CHECKING:
    from attn_core.packed_calls import Options, Starts
    from attn_core.shaping import Tensors


def _gradients(module: Any, *given: Any) -> Tensors:
    tensors: tuple[torch.Tensor, ...] = given[:6]
    starts: Starts | None = given[6]
    options: Options = given[7]
    grads = (torch.empty_like(tensors[1]), torch.empty_like(tensors[2]), torch.empty_like(tensors[3]))
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = (None,) * 4 if starts is None else starts.bounded(options)
    places = (cu_seqlens_q, cu_seqlens_k, None, None, longest_q, longest_k)
    rest = (options.scale, options.causal, -1, -1, 0.0, options.deterministic)
    module.flash_attn_interface._flash_attn_backward(*tensors, *places, *grads, *rest)  # noqa: SLF001 - the library's graph does
    return grads


forward, backward = flash(Library("flash_3_hub", loaded("flash_3_hub"), _gradients, nothing=float("-inf")))
