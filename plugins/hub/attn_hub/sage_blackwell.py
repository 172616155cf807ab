"""The adapter of ``sage_blackwell_hub``, sageattention 3. Importing it loads the kernel, which has to be fetched before.

It takes (B, H, S, D), writes to the key, and has the scale 1/sqrt(D) and no other: a scale is put into the query.
"""

from __future__ import annotations

import torch

from attn_hub.fetching import loaded

_sageattn = loaded("sage_blackwell_hub").sageattn3_blackwell


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, causal: bool = False
) -> torch.Tensor:
    """Attend with float4 scores and values.

    Args:
        query: (B, Sq, H, D), D of 64 or 128, float16 or bfloat16.
        key: (B, Skv, H, D).
        value: (B, Skv, H, D).
        scale: of the scores.
        causal: with as many queries as keys.
    """
    with torch.no_grad():
        query = query * (scale * query.shape[3] ** 0.5)
        query, key, value = (
            tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format) for tensor in (query, key, value)
        )
        out: torch.Tensor = _sageattn(query, key, value, is_causal=causal)
        return out.transpose(1, 2).contiguous()
