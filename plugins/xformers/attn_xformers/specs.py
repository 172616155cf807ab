"""The declarations of this wheel. Imports no torch."""

from __future__ import annotations

from typing import Any

from attn_core.plugin import (
    BackendSpec,
    Backward,
    CapabilityRange,
    Constraints,
    ContextParallelSupport,
    Needs,
    No,
    Rule,
)

_ALL_PARALLEL = ContextParallelSupport(ring=True, ulysses=True, hybrid=True)
_NEEDS = Needs(
    extra="xformers",
    install="pip install --no-deps 'xformers>=0.0.35,<0.0.36' (beside a CUDA 13 torch also nvidia-cuda-runtime-cu12)",
)
_HALF = {"float16", "bfloat16"}
_WRITTEN_OUT = No("FlashAttention-2 takes no mask that is written out; xformers and xformers_cutlass do")

_COMMON: dict[str, Any] = {
    "platforms": {"cuda"},
    "gqa": True,
    "cross_lengths": True,
    "value_head_dim": True,
    "softcap": No("xformers has no softcap; flex, native_math and flash have"),
    "dropout": No("xformers' functions that hand over the lse take no dropout; native_efficient and flash have it"),
    "lse": True,
    "deterministic": True,
    "mask_gradient": No("xformers' backward by the lse returns no gradient of a mask; native_efficient has it"),
    "vmap": No("xformers has no rule under vmap; native_math has"),
    "forward_mode": No("xformers has no forward-mode derivative; native_math has"),
    "double_backward": No("xformers has no derivative of its backward; native_math has"),
}
_BACKWARD = Backward(
    deterministic=No("its backward adds with atomics, in no fixed order; native_math and flash have one")
)

_FLASH_RULES = (
    Rule(
        "a window whose right side is not 0 excludes packed sequences and key padding: xformers has no such bias with a "
        "backward; flash and flex take them",
        lambda facts: (
            facts.mask in {"packed", "key_padding"} and facts.window_size is not None and facts.window_size[1] != 0
        ),
    ),
    Rule(
        "a window whose right side is not 0 excludes more queries than keys: the kernel replaces a long or unlimited "
        "right side by the key length, which is too short there",
        lambda facts: facts.window_size is not None and facts.window_size[1] != 0 and facts.lengths == "more queries",
    ),
    Rule(
        "head dims above 248 exclude key padding together with causal or a window: padding is hidden there by 8 further "
        "columns, and the kernel takes 256; use native_efficient or flex",
        lambda facts: (
            facts.head_dim > 248 and facts.mask == "key_padding" and (facts.causal or facts.window_size is not None)
        ),
    ),
)
_ONE_MASK = Rule(
    "causal excludes a mask of its own: xformers has no bias for both with a backward; native_efficient and native take them",
    lambda facts: facts.causal and facts.mask != "none",
)
_FLOAT_MASK_DTYPE = Rule(
    "a float mask of another dtype than query's would be rounded to it; give it in query's dtype, or use native_math",
    lambda facts: facts.mask == "float" and facts.mask_dtype not in (None, facts.dtype),
)


_BY_FLASH = Constraints(
    **_COMMON,
    compute_capability=CapabilityRange((8, 0)),
    dtypes=_HALF,
    head_dims=range(1, 257),
    masks={"none": True, "bool": _WRITTEN_OUT, "float": _WRITTEN_OUT, "key_padding": True, "packed": True},
    causal=True,
    window_size=True,
    backward=_BACKWARD,
    rules=_FLASH_RULES,
)


def _by_cutlass(capability: CapabilityRange, dtypes: set[str]) -> Constraints:
    return Constraints(
        **_COMMON,
        compute_capability=capability,
        dtypes=dtypes,
        masks={
            "none": True,
            "bool": True,
            "float": True,
            "key_padding": True,
            "packed": No(
                "this kernel is right only where each sequence has as many queries as keys; xformers_flash takes all"
            ),
        },
        causal=True,
        window_size=No(
            "the backward of this kernel's windows is not finite, as xformers says; xformers_flash has windows"
        ),
        backward=_BACKWARD,
        rules=(_ONE_MASK, _FLOAT_MASK_DTYPE),
    )


_BY_CUTLASS = (
    _by_cutlass(CapabilityRange((8, 0), (9, 0)), {*_HALF, "float32"}),
    _by_cutlass(CapabilityRange((7, 0), (7, 5)), {"float16", "float32"}),
)


def _spec(name: str, which: str, summary: str, constraints: Any, **others: Any) -> BackendSpec:
    return BackendSpec(
        **{
            "api": 1,
            "name": name,
            "summary": summary,
            "forward": f"attn_xformers.adapters:{which}_forward",
            "backward": f"attn_xformers.adapters:{which}_backward",
            "autograd": "core",
            "needs": _NEEDS,
            "constraints": constraints,
            "context_parallel": _ALL_PARALLEL,
            "compile": True,
            **others,
        }
    )


XFORMERS = _spec(
    "xformers",
    "auto",
    "xformers' memory_efficient_attention, with its own choice of operator",
    (_BY_FLASH, *_BY_CUTLASS),
)
CUTLASS = _spec(
    "xformers_cutlass", "cutlass", "xformers' CUTLASS operator: any head dim, float32, added masks", _BY_CUTLASS
)
FLASH = _spec("xformers_flash", "flash", "xformers' FlashAttention-2 operator: windows, packed, key padding", _BY_FLASH)
SPLITK = _spec(
    "xformers_splitk",
    "splitk",
    "xformers' Triton operator that splits the keys: few queries on many keys, without a backward",
    Constraints(
        **_COMMON,
        compute_capability=CapabilityRange((8, 0)),
        dtypes=_HALF,
        head_dims=range(1, 513),
        masks={"none"},
        causal=No("this kernel's causal bias takes up to 16 queries, of padded key caches; xformers_flash is causal"),
        window_size=No("this kernel's windows take up to 16 queries, of padded key caches; xformers_flash has windows"),
        backward=No("xformers' split-K operator has no backward"),
    ),
    backward=None,
    autograd="own",
    first_call_compiles=True,
)
