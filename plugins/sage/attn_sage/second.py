"""sageattention 2: one function for each kernel, and its own choice among them.

Its convention: tensors as attn has them with ``tensor_layout="NHD"``; a scale that is given; causal only where there are
as many queries as keys; the log-sum-exp natural, (B, Hq, Sq), float32, of the smoothed scores and what smoothing took, which it
multiplies in query's dtype. So the keys are smoothed here, and what that took from the log-sum-exp is added in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import sageattention
import torch

from attn_sage.inputs import check_sizes, on_device, refuse_cold_capture, smooth, traced, unit_stride, warm

Forward = Callable[..., Any]
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def _on_blackwell(device: torch.device) -> bool:
    return device.type == "cuda" and _capability(device)[0] == 12


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _granularity(device: torch.device) -> dict[str, str]:
    """Where sageattention's Triton kernels, which quantise by thread, can't be used, its CUDA ones quantise by warp."""
    return {"qk_quant_gran": "per_warp"} if _on_blackwell(device) else {}


def _options_of_fp16_triton(_: torch.device) -> dict[str, Any]:
    return {"smooth_k": False}


def _options_of_cuda(device: torch.device) -> dict[str, Any]:
    return {"smooth_k": False, **_granularity(device)}


def _options_of_automatic(_: torch.device) -> dict[str, Any]:
    return {}  # it hands no option on; smoothing what is smooth changes nothing


def _adapted(name: str, kernel: Forward, options_of: Callable[[torch.device], dict[str, Any]]) -> Forward:
    """Make the adapter of one kernel, and its operator for traced code."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_sizes(name, query, key, value)
        kind = refuse_cold_capture(name, query, key, value, causal, return_lse)
        with on_device(query), torch.no_grad():
            smoothed, mean = smooth(query, key)
            found = kernel(
                unit_stride(query), unit_stride(smoothed), unit_stride(value), tensor_layout="NHD", is_causal=causal,
                sm_scale=scale, return_lse=return_lse, **options_of(query.device),
            )  # fmt: skip
            out, lse = found if return_lse else (found, query.new_empty(0, dtype=torch.float32))
            if return_lse:
                lse = lse + scale * _taken(query, mean)
        warm(kind)
        return out.contiguous(), lse

    operator = torch.library.custom_op(f"attn_sage::{name.removeprefix('sage_')}", attend, mutates_args=())

    @operator.register_fake
    def _(
        query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor, _scale: float, _causal: bool, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, heads, _ = query.shape
        lse_shape = (batch, heads, length) if return_lse else (0,)
        return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=torch.float32)

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        causal: bool = False,
        deterministic: bool = False,  # noqa: ARG001 - the kernels add in a fixed order
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        run = operator if traced(query, key, value) else attend
        out, lse = run(query, key, value, float(scale), causal, return_lse)
        return (out, lse) if return_lse else out

    return forward


def _taken(query: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """What smoothing took from the unscaled scores of each query, (B, Hq, Sq) in float32."""
    grouped = query.float().unflatten(2, (mean.shape[2], -1))
    return torch.einsum("bqhgd,bhd->bhgq", grouped, mean[:, 0].float()).flatten(1, 2)


automatic = _adapted("sage", sageattention.sageattn, _options_of_automatic)
fp16_triton = _adapted("sage_fp16_triton", sageattention.sageattn_qk_int8_pv_fp16_triton, _options_of_fp16_triton)
fp16_cuda = _adapted("sage_fp16_cuda", sageattention.sageattn_qk_int8_pv_fp16_cuda, _options_of_cuda)
fp8_cuda = _adapted("sage_fp8_cuda", sageattention.sageattn_qk_int8_pv_fp8_cuda, _options_of_cuda)
fp8_sm90 = _adapted("sage_fp8_sm90", sageattention.sageattn_qk_int8_pv_fp8_cuda_sm90, _options_of_cuda)
