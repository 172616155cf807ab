"""The adapter of ``flash_hub``. Importing it loads the kernel, which has to be fetched before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_core.shaping import infinite_lse
from attn_hub.calls import Library, flash
from attn_hub.fetching import loaded

if TYPE_CHECKING:
    from attn_core.packed_calls import Options, Starts
    from attn_core.shaping import Tensors


def _gradients(module: Any, *given: Any) -> Tensors:
    tensors: tuple[torch.Tensor, ...] = given[:6]
    starts: Starts | None = given[6]
    options: Options = given[7]
    grad_out, query, key, value, out, lse = tensors
    tensors = grad_out, query, key, value, out, infinite_lse(lse)
    grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    rest = (0.0, options.scale, options.causal, -1, -1, 0.0, None, options.deterministic)
    functions = module.flash_attn_interface
    if starts is None:
        functions._flash_attn_backward(*tensors, *grads, *rest)  # noqa: SLF001 - what the library's graph calls
    else:
        functions._flash_attn_varlen_backward(*tensors, *grads, *starts.bounded(options), *rest)  # noqa: SLF001
    return grads


forward, backward = flash(Library("flash_hub", loaded("flash_hub"), _gradients))
