"""The declaration of native."""

from __future__ import annotations

from attn_core.plugin import MASKS, BackendSpec, Backward, Constraints, ContextParallelSupport, Exact, Facts, No, Rule

_HALF = ("float16", "bfloat16")


def _narrow_call_wide_mask(facts: Facts) -> bool:
    return facts.mask_dtype == "float32" and facts.dtype in _HALF


_WIDE_MASK = Rule(
    "a float32 mask on a half-precision query: off the CPU, SDPA's kernels take a mask in query's dtype only; "
    "cast the mask (and accept its rounding), or use native_math",
    _narrow_call_wide_mask,
)
_TRACED_LSE = Rule(
    "return_lse in compiled code: which kernel SDPA would choose can't be asked while tracing; "
    "name native_flash, native_efficient, native_cudnn or native_math, or call outside of torch.compile",
    lambda facts: facts.return_lse and facts.compiled,
)
_NONE_DETERMINISTIC = No(
    "SDPA's fused backward adds up with atomics in an order of chance on this device; native_math is deterministic"
)
_TRANSFORMS = No("SDPA's fused kernels have no rule for it, on some devices a slow one; native_math has it")

_ABILITIES = {
    "dtypes": ("float16", "bfloat16", "float32", "float64"),
    "masks": MASKS,
    "causal": True,
    "gqa": True,
    "cross_lengths": True,
    "value_head_dim": True,
    "window_size": True,
    "softcap": No("SDPA has no softcap; native_math and flex have it"),
    "dropout": True,
    "mask_gradient": True,
    "vmap": _TRANSFORMS,
    "forward_mode": _TRANSFORMS,
    "double_backward": No("SDPA's fused kernels have no second derivative; native_math has it"),
}

NATIVE = BackendSpec(
    api=1,
    name="native",
    summary="torch's scaled_dot_product_attention with its own choice of kernel",
    forward="attn_native.sdpa:forward",
    backward="attn_native.sdpa_backward:backward",
    autograd="own",
    numerics=Exact(),
    compile=True,
    constraints=[
        Constraints(platforms={"cpu"}, lse=True, deterministic=True, backward=True, **_ABILITIES),  # type: ignore[arg-type]
        Constraints(
            platforms={"cuda"},
            lse=True,
            deterministic=True,
            backward=Backward(deterministic=_NONE_DETERMINISTIC),
            rules=(_WIDE_MASK, _TRACED_LSE),
            **_ABILITIES,  # type: ignore[arg-type]
        ),
        Constraints(
            platforms={"rocm", "mps", "npu", "xla"},
            lse=No("the operator behind SDPA's choice is not known here; native_math returns it"),
            deterministic=No("whether SDPA's kernels repeat their bits was not verified on this device"),
            backward=True,
            rules=(_WIDE_MASK,),
            **_ABILITIES,  # type: ignore[arg-type]
        ),
    ],
    context_parallel=ContextParallelSupport(ring=True, ulysses=True, hybrid=True),
)
