"""Adapters of the functions of sageattention 2, wherever they come from.

Its convention: tensors as attn has them with ``tensor_layout="NHD"``; a scale that is given; the causal diagonal from the first
key; the log-sum-exp natural, (B, Hq, Sq), float32. What is mended here, all of it seen in the source of 2.2.0:

- its CUDA kernels hide a key by a score of -5,000,000 steps of the quantisation. Where queries or keys are small, so is
  that: hidden keys are seen. So they get no causal call, and lengths that blocks divide; a missing key then has a
  score of 0 for certain, and is taken out again as in ``first``;
- its CUDA kernels look for the largest score before they multiply by the scale, and so need a positive one;
- its Triton kernel with causal reads the scale of a block that is not there, as ``first`` has it;
- its CUDA kernels launch on the default stream, whichever is current; see ``inputs.on_default_stream``;
- its float8 kernels divide by the largest number of a channel of the values, and make NaN of a channel of zeros;
- what smoothing the keys took from the log-sum-exp it adds in query's dtype, which is off by a share of a number that may be
  large; here the keys are smoothed beforehand, and it is added in float32;
- NaN in query or key becomes 0; see ``inputs.smooth``.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_core.masks import traced
from attn_sage.inputs import (
    check_sizes,
    counts_others,
    missing_keys,
    of_real_keys,
    on_default_stream,
    on_device,
    prepared,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from attn_core.masks import KeyPadding


SILENT = 1e-35
"""A channel of values up to here counts as zero: float8's scale can't be the largest number over it."""


class Kernel(NamedTuple):
    """One function of sageattention.

    Attributes:
        name: of the backend.
        run: the function.
        block: to a multiple of which keys are padded; 1 where the kernel hides what is missing.
        chooses_granularity: whether it takes ``qk_quant_gran``.
        smooths: whether it smooths keys by itself whatever it is told; of smooth ones that takes nothing.
        cuda: whether it launches CUDA kernels of its own, not Triton's.
        float8: whether values become float8.
    """

    name: str
    run: Callable[..., Any]
    block: int
    chooses_granularity: bool = True
    smooths: bool = False
    cuda: bool = True
    float8: bool = False

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run it on tensors that are laid out for it; without return_lse, the log-sum-exp is empty."""
        options: dict[str, Any] = {} if self.smooths else {"smooth_k": False}
        if self.chooses_granularity and query.is_cuda and _capability(query.device)[0] == 12:
            options["qk_quant_gran"] = "per_warp"  # its Triton kernels, which quantise by thread, can't be used there
        found = self.run(
            query, key, value, tensor_layout="NHD", is_causal=causal, sm_scale=scale, return_lse=return_lse, **options
        )
        out, lse = found if return_lse else (found, query.new_empty(0, dtype=torch.float32))
        out, lse = out.contiguous(), lse.contiguous()  # of a padded head dim it returns a slice
        if self.float8:
            silent = torch.linalg.vector_norm(value, float("inf"), dim=1) <= SILENT
            out.unflatten(2, (key.shape[2], -1)).masked_fill_(silent[:, None, :, None], 0.0)
        return out, lse


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _attend(
    kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, ...]:
    check_sizes(kernel.name, query, key, value)
    with on_device(query), torch.no_grad():
        compute = partial(_computed, kernel, query, key, value, *others)
        return on_default_stream(kernel.name, query, compute) if kernel.cuda else compute()


def _computed(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
    causal: bool,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    keys = key.shape[1]
    missing = missing_keys(kernel.block, keys, causal=causal)
    divided = not causal and counts_others(keys, keep, missing)
    inputs = prepared(query, key, value, keep, missing, causal=causal, divided=divided, wanted=True)
    taken = _taken(query, inputs.mean) * scale if return_lse and inputs.mean is not None else None
    if scale < 0:
        inputs, scale = inputs._replace(query=-inputs.query), -scale
    out, lse = kernel(inputs.query, inputs.key, inputs.value, scale, causal, return_lse)
    if causal:
        out, lse = out[:, : query.shape[1]].contiguous(), lse[..., : query.shape[1]].contiguous()
    if divided:
        others = (keep, keys, scale, lambda ones: kernel(inputs.query, inputs.key, ones, scale, causal, False)[0])
        out, found = of_real_keys(out, lse if return_lse else None, inputs, *others)
        lse = lse if found is None else found
    if (kernel.smooths or kernel.float8) and inputs.nothing is not None:  # it hides what ``smooth`` put there
        out.unflatten(2, (key.shape[2], -1)).add_(inputs.nothing.sum(-1)[:, None, :, None, None])
    if taken is not None:
        lse = lse + taken
    return out, lse


def _taken(query: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """What smoothing took from the unscaled scores of each query, (B, Hq, Sq) in float32."""
    grouped = query.float().unflatten(2, (mean.shape[2], -1))
    return torch.einsum("bqhgd,bhd->bhgq", grouped, mean[:, 0].float()).flatten(1, 2)


def adapted(kernel: Kernel, operators: str) -> Callable[..., Any]:
    """Make the adapter of one kernel, and its operator for traced code, in a namespace of operators."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keep: torch.Tensor | None,
        scale: float,
        causal: bool,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _attend(kernel, query, key, value, keep, scale, causal, return_lse)
        return out, lse

    operator = torch.library.custom_op(f"{operators}::{kernel.name}", attend, mutates_args=())

    @operator.register_fake
    def _(query: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, heads, _ = query.shape
        lse_shape = (batch, heads, length) if others[-1] else (0,)
        return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=torch.float32)

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
        run = operator if traced(query, key, value) else attend
        keep = None if attn_mask is None else attn_mask.keep
        out, lse = run(query, key, value, keep, float(scale), causal, return_lse)
        return (out, lse) if return_lse else out

    return forward
