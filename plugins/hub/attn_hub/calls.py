"""Adapters of hub kernels that have the functions of flash-attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from attn_core.packed_calls import Mask, Options, Starts, attend, options_of
from attn_core.shaping import natural_lse

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import torch

    from attn_core.shaping import Tensors


class FlashKernel(NamedTuple):
    """A hub kernel with ``flash_attn_func`` and ``flash_attn_varlen_func``, and its convention.

    Attributes:
        module: the kernel.
        lse_option: the option that asks for the lse, which is then the second result.
        always_tuple: whether the lse is returned, maybe as None, where it is not asked for.
        knows_deterministic: whether it takes ``deterministic``.
    """

    module: ModuleType
    lse_option: str = "return_attn_probs"
    always_tuple: bool = False
    knows_deterministic: bool = True

    def widths(self, head_dim: int, value_head_dim: int, _: torch.device) -> tuple[int, int]:
        """One for all, in steps of 8."""
        width = max(head_dim, value_head_dim)
        width += -width % 8
        return width, width

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: Starts | None,
        options: Options,
        *,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Result with its graph, and lse."""
        given: dict[str, Any] = {"softmax_scale": options.scale, "causal": options.causal, self.lse_option: return_lse}
        if self.knows_deterministic:
            given["deterministic"] = options.deterministic
        if starts is None:
            found = self.module.flash_attn_func(query, key, value, **given)
        else:
            # one query per sequence at most would make flash-attn 2 take every sequence to have one
            longest_q = max(starts.max_seqlen_q, 2)
            bounds = starts.cu_seqlens_q, starts.cu_seqlens_k, longest_q, starts.max_seqlen_k
            found = self.module.flash_attn_varlen_func(query, key, value, *bounds, **given)
        if not return_lse:
            return found[0] if self.always_tuple else found, None
        return found[0], natural_lse(found[1], found[0])

    def backward(self, *_: Any) -> Tensors:
        """Not called: the functions bring their graph."""
        raise NotImplementedError


def flash(kernel: FlashKernel) -> Callable[..., Any]:
    """Make the adapter."""

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        attn_mask: Mask = None,
        causal: bool = False,
        deterministic: bool = False,
        return_lse: bool = False,
    ) -> Any:
        options = options_of(scale, causal, None, None, deterministic=deterministic)
        return attend(kernel, query, key, value, attn_mask, options, return_lse=return_lse)

    return forward
