"""``sage``: the kernel that the installed sageattention chooses for the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sageattention

if TYPE_CHECKING:
    import torch

HAS_LSE = hasattr(sageattention, "sageattn_qk_int8_pv_fp16_cuda")
"""Since version 2, which returns the log-sum-exp."""

if HAS_LSE:
    from attn_sage import second
else:
    from attn_sage import first


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    deterministic: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend as ``first.forward`` or ``second.automatic`` do, whichever is for the installed version.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, D).
        scale: of the scores.
        causal: with as many queries as keys.
        deterministic: always so.
        return_lse: also return the log-sum-exp (B, Hq, Sq); version 2 only.
    """
    if HAS_LSE:
        found: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = second.automatic(
            query, key, value, scale=scale, causal=causal, deterministic=deterministic, return_lse=return_lse
        )
        return found
    return first.forward(query, key, value, scale=scale, causal=causal, deterministic=deterministic)
