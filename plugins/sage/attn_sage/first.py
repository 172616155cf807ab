"""sageattention 1: one Triton kernel, which returns no log-sum-exp.

Three things of version 1.0.6 that are mended here (all of them seen in its source):

- it subtracts the mean from the caller's key in place; here it is given a smoothed copy and told not to smooth;
- without causal it reads keys in blocks of 64 and counts the missing ones of the last block with a score of 0, so that the
  results of other lengths are too small. What share of the probabilities is real is what the same call returns for values
  of 1, by which the result is divided. Since the mean of smoothed scores is 0, their exponentials add up to no less than
  their number (Jensen), and of long sequences the share is 1 but for a negligible error;
- NaN in query or key becomes 0; see ``inputs.smooth``.
"""

from __future__ import annotations

import torch
from sageattention import sageattn
from torch.nn.functional import pad

from attn_sage.inputs import check_sizes, on_device, refuse_cold_capture, smooth, traced, unit_stride, warm

NAME = "sage"
BLOCK = 64
NEGLIGIBLE = 1e-3
"""The share of missing keys that is left as it is; a twentieth of the error that int8 scores make."""


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    deterministic: bool = False,  # noqa: ARG001 - the kernel adds in a fixed order
) -> torch.Tensor:
    """Attend with int8 scores.

    Args:
        query: (B, Sq, Hq, D), D of 64, 96 or 128, float16, bfloat16 or float32.
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, D); computed in float16, so beyond its range the result is infinite.
        scale: of the scores.
        causal: with as many queries as keys.
        deterministic: always so.

    Returns:
        (B, Sq, Hq, D) in query's dtype.
    """
    return (_operator if traced(query, key, value) else _attend)(query, key, value, float(scale), causal)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    check_sizes(NAME, query, key, value)
    kind = refuse_cold_capture(NAME, query, key, value, causal)
    keys = key.shape[1]
    missing = 0 if causal else -keys % BLOCK
    with on_device(query), torch.no_grad():
        smoothed, _ = smooth(query, key)
        if missing:
            smoothed, value = pad(smoothed, (0, 0, 0, 0, 0, missing)), pad(value, (0, 0, 0, 0, 0, missing))
        query, smoothed, value = unit_stride(query), unit_stride(smoothed), unit_stride(value)
        out = _kernel(query, smoothed, value, scale, causal)
        if missing > NEGLIGIBLE * keys:
            ones = pad(value.new_ones(1, keys, 1, value.shape[3]), (0, 0, 0, 0, 0, missing))
            out /= _kernel(query, smoothed, ones.expand(value.shape), scale, causal)
    warm(kind)
    return out


def _kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    out: torch.Tensor = sageattn(
        query, key, value, tensor_layout="NHD", is_causal=causal, sm_scale=scale, smooth_k=False
    )
    return out


_operator = torch.library.custom_op("attn_sage::first", _attend, mutates_args=())


@_operator.register_fake
def _(query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor, _scale: float, _causal: bool) -> torch.Tensor:
    return query.new_empty(query.shape)
