"""sageattention 1: one Triton kernel, which returns no log-sum-exp.

Four things of version 1.0.6 that are mended here (all of them seen in its source):

- it subtracts the mean from the caller's key in place; here it is given a smoothed copy and told not to smooth;
- without causal it reads keys in blocks of 64 and counts the missing ones of the last block with a score of 0, so that the
  results of other lengths are too small. They are divided by the share of the real ones, see ``inputs.of_real_keys``. Key
  padding comes from the same: hidden keys are made 0, and taken out again;
- with causal it reads the scale of a block of keys that is not there, where the last 128 keys are 64 or fewer: NaN, if what
  lies there is not finite. So queries and keys are added, see ``inputs.missing_keys``;
- NaN in query or key becomes 0; see ``inputs.smooth``.

Its kernels are launched by ``first_kernels`` where they are those of 1.0.6, on a GPU; elsewhere ``sageattn`` is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sageattention import sageattn

from attn_core.masks import traced
from attn_sage.inputs import check_sizes, counts_others, missing_keys, of_real_keys, on_device, prepared

if TYPE_CHECKING:
    from attn_core.masks import KeyPadding
    from attn_sage.first_kernels import Kernels

NAME = "sage"
BLOCK = 64

try:
    from attn_sage.first_kernels import attend, kernels
except ImportError:  # a stand-in needs no Triton
    _KERNELS = None
else:
    _KERNELS = kernels(sageattn)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    attn_mask: KeyPadding | None = None,
    causal: bool = False,
    deterministic: bool = False,  # noqa: ARG001 - the kernel adds in a fixed order
) -> torch.Tensor:
    """Attend with int8 scores.

    Args:
        query: (B, Sq, Hq, D), D of 64, 96 or 128, float16, bfloat16 or float32.
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, D); computed in float16, so beyond its range the result is infinite.
        scale: of the scores.
        attn_mask: which keys are real, without causal.
        causal: with as many queries as keys.
        deterministic: always so.

    Returns:
        (B, Sq, Hq, D) in query's dtype.
    """
    keep = None if attn_mask is None else attn_mask.keep
    return (_operator if traced(query, key, value) else _attend)(query, key, value, keep, float(scale), causal)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor | None, scale: float, causal: bool
) -> torch.Tensor:
    check_sizes(NAME, query, key, value)
    keys = key.shape[1]
    missing = missing_keys(BLOCK, keys, causal=causal)
    divided = not causal and counts_others(keys, keep, missing)
    found = _KERNELS.get((query.shape[3], causal)) if _KERNELS is not None and query.is_cuda else None
    with on_device(query):
        inputs = prepared(query, key, value, keep, missing, causal=causal, divided=divided, half=found is not None)
        out = _kernel(found, inputs.query, inputs.key, inputs.value, scale, causal)
        if divided:
            others = (keep, keys, scale, lambda ones: _kernel(found, inputs.query, inputs.key, ones, scale, causal))
            out, _ = of_real_keys(out, None, inputs, *others)
    return out[:, : query.shape[1]].contiguous() if causal and missing else out


def _kernel(
    found: Kernels | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    if found is not None:
        return attend(found, query, key, value, scale)
    out: torch.Tensor = sageattn(
        query, key, value, tensor_layout="NHD", is_causal=causal, sm_scale=scale, smooth_k=False
    )
    return out


_operator = torch.library.custom_op("attn_sage::first", _attend, mutates_args=())


@_operator.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape)
