"""What attn is compared with: each library called by hand, and the attention dispatcher of diffusers."""

from __future__ import annotations

from functools import partial

import torch

SEED = {
    "native": "native",
    "native_flash": "_native_flash",
    "native_efficient": "_native_efficient",
    "native_cudnn": "_native_cudnn",
    "flash": "flash",
    "xformers": "xformers",
    "sage": "sage",
}
"""The names of diffusers for the same kernels."""


def bare(name, device):
    """The library's own call for a backend: a function of (B, S, H, D) query, key, value and ``causal``.

    Raises:
        LookupError: there is none that it could be compared with.
        ImportError: the library is not there.
    """
    if name.startswith("native"):
        return _torch(name, device)
    if name.startswith("xformers"):
        return _xformers(name.removeprefix("xformers").removeprefix("_"))
    if name == "flash":
        from flash_attn import flash_attn_func

        return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)
    if name == "flash_3":
        from flash_attn_interface import flash_attn_func

        return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)
    if name == "flash_4":
        from flash_attn.cute import flash_attn_func

        return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)[0]
    if name == "sage":
        from sageattention import sageattn

        return lambda q, k, v, causal: sageattn(q, k, v, tensor_layout="NHD", is_causal=causal)
    msg = f"no bare call to compare {name} with"
    raise LookupError(msg)


def _torch(name, device):
    """An operator of torch, transposes included."""
    aten = torch.ops.aten
    if name == "native":
        return partial(_heads_first, _sdpa)
    if name == "native_flash" and device.type == "cpu":
        return partial(
            _heads_first,
            lambda q, k, v, causal: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)[0],
        )
    if name == "native_flash":
        return partial(
            _heads_first, lambda q, k, v, causal: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]
        )
    kernels = {
        "native_efficient": aten._scaled_dot_product_efficient_attention,
        "native_cudnn": aten._scaled_dot_product_cudnn_attention,
    }
    if name not in kernels:
        msg = f"no bare call to compare {name} with"
        raise LookupError(msg)
    kernel = kernels[name]

    def call(q, k, v, causal):
        return kernel(q, k, v, None, torch.is_grad_enabled() and q.requires_grad, 0.0, causal)[0]

    return partial(_heads_first, call)


def _sdpa(q, k, v, causal):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _heads_first(function, q, k, v, causal):
    return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal).transpose(1, 2)


def _xformers(which):
    from xformers.ops import fmha

    def bias(causal):
        return fmha.attn_bias.LowerTriangularFromBottomRightMask() if causal else None

    if which == "splitk":
        forward = fmha.memory_efficient_attention_forward

        def split(q, k, v, causal):
            if q.shape[1:].numel() * 64 >= 2**31:
                msg = "it reads beyond its memory, see docs/known-issues.md"
                raise ValueError(msg)
            return forward(q, k, v, attn_bias=bias(causal), op=fmha.triton_splitk.FwOp)

        return split
    operators = {
        "": None,
        "cutlass": (fmha.cutlass.FwOp, fmha.cutlass.BwOp),
        "flash": (fmha.flash.FwOp, fmha.flash.BwOp),
    }
    if which not in operators:
        msg = f"no bare call to compare xformers_{which} with"
        raise LookupError(msg)
    operator = operators[which]
    return lambda q, k, v, causal: fmha.memory_efficient_attention(q, k, v, attn_bias=bias(causal), op=operator)


def seed(name):
    """The same kernel through the dispatcher of diffusers.

    Raises:
        LookupError: it has no such backend.
        ImportError: diffusers is not there.
    """
    if name not in SEED:
        msg = f"diffusers has no backend for {name}"
        raise LookupError(msg)
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    backend = AttentionBackendName(SEED[name])
    return lambda q, k, v, causal: dispatch_attention_fn(q, k, v, is_causal=causal, backend=backend)


def masked(name, keep):
    """SDPA with key padding as a dense mask, on one of torch's kernels; ``keep`` is bool (B, Skv)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = {
        "native_efficient": SDPBackend.EFFICIENT_ATTENTION,
        "native_cudnn": SDPBackend.CUDNN_ATTENTION,
        "native_flash": SDPBackend.FLASH_ATTENTION,
        "native_math": SDPBackend.MATH,
    }[name]
    mask = keep[:, None, None, :]

    def call(q, k, v):
        with sdpa_kernel(kernel):
            return torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
            ).transpose(1, 2)

    return call
