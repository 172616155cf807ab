"""The adapter of ``flash_4_hub``. Importing it loads the kernel, which has to be fetched before.

On Hopper its backward lays its sums out in steps of 16 of the head dim, and what reads them takes steps of 32: in between,
gradients of other rows come out. So it is given steps of 32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_hub.calls import Library, flash
from attn_hub.fetching import loaded

if TYPE_CHECKING:
    import torch

    from attn_core.packed_calls import Options, Starts
    from attn_core.shaping import Tensors


def _fronted(module: Any, query: Any, key: Any, value: Any, lengths: Any, given: dict[str, Any]) -> Any:
    return module.flash_attn_varlen_func(query, key, value, seqused_k=lengths, **given)


def _gradients(module: Any, *given: Any) -> Tensors:
    tensors: tuple[torch.Tensor, ...] = given[:6]
    starts: Starts | None = given[6]
    options: Options = given[7]
    lengths: torch.Tensor | None = given[8]
    grad_out, query, key, value, out, lse = tensors
    places: dict[str, Any] = {"seqused_k": lengths} if starts is None else starts.bounded(options)._asdict()
    dq, dk, dv = module.interface._flash_attn_bwd(  # noqa: SLF001 - what the library's graph calls
        query, key, value, out, grad_out, lse, softmax_scale=options.scale, causal=options.causal, **places
    )
    return dq, dk, dv


forward, backward = flash(
    Library(
        "flash_4_hub",
        loaded("flash_4_hub"),
        _gradients,
        _fronted,
        step=32,
        lse_option="return_lse",
        always_tuple=True,
        knows_deterministic=False,
        nothing=float("-inf"),
    )
)
