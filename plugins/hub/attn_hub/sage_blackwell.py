"""The adapter of ``sage_blackwell_hub``, sageattention 3. Importing it loads the kernel, which has to be fetched before.

It takes (B, H, S, D), and has the scale 1/sqrt(D) and no other: a scale is put into the query. What is mended here, all of it
seen in its source:

- it writes to the key (before August 2026), which so is a copy;
- its Triton kernel launches on the current device, which has to be that of the tensors;
- a group of 16 float4 numbers has a factor in float8, which is 0 or saturates where they are all small or large: keys and
  values are divided by their size, a power of 2 for each head, and queries and results multiplied by it;
- float4 has no NaN and no infinity. What is not finite makes NaN of the whole head in query and key, and of its channel in value.
"""

from __future__ import annotations

import torch

from attn_core.masks import traced
from attn_hub.fetching import loaded
from attn_sage.inputs import check_sizes, on_device

NAME = "sage_blackwell_hub"

_sageattn = loaded(NAME).sageattn3_blackwell


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
    run = _operator if traced(query, key, value) else _attend
    out: torch.Tensor = run(query, key, value, float(scale), causal)
    return out


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    check_sizes(NAME, query, key, value)
    with on_device(query), torch.no_grad():
        nothing = _nothing(query).sum(-1, keepdim=True) + _nothing(key).sum(-1, keepdim=True) + _nothing(value)
        keys, values = _size(key), _size(value)
        out: torch.Tensor = _sageattn(
            _laid_out(query, keys * (scale * query.shape[3] ** 0.5)),
            _laid_out(key, 1.0 / keys),
            _laid_out(value, 1.0 / values),
            is_causal=causal,
        )
        return (out.transpose(1, 2) * values + nothing).to(query.dtype).contiguous()


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    """0 where a channel of a head is finite, else NaN: (B, 1, H, D)."""
    return (tensor * 0.0).sum(1, keepdim=True)


def _size(tensor: torch.Tensor) -> torch.Tensor:
    """A power of 2 for each head that no finite number of it exceeds: (B, 1, H, 1), float32."""
    largest = tensor.abs().nan_to_num(0.0, 0.0).amax((1, 3), keepdim=True)
    return largest.float().clamp(min=1e-30).log2().ceil().exp2()


def _laid_out(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A copy times a factor, as (B, H, S, D)."""
    return (tensor * factor).to(tensor.dtype).transpose(1, 2).contiguous()


_operator = torch.library.custom_op(f"attn_hub::{NAME}", _attend, mutates_args=())


@_operator.register_fake
def _(query: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(query.shape)
