"""``sage``: the kernel that the installed sageattention chooses for the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sageattention

if TYPE_CHECKING:
    import torch

    from attn_core.masks import KeyPadding

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
    attn_mask: KeyPadding | None = None,
    causal: bool = False,
    deterministic: bool = False,  # noqa: ARG001 - the kernels add in a fixed order
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend as ``first.forward`` or ``second.automatic`` do, whichever is for the installed version.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, D).
        scale: of the scores.
        attn_mask: which keys are real, without causal.
        causal: with as many queries as keys.
        deterministic: always so.
        return_lse: also return the log-sum-exp (B, Hq, Sq); version 2 only.
    """
    if HAS_LSE:
        found: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = second.automatic(
            query, key, value, scale=scale, attn_mask=attn_mask, causal=causal, return_lse=return_lse
        )
        return found
    return first.forward(query, key, value, scale=scale, attn_mask=attn_mask, causal=causal)
