"""The declaration of native_math."""

from __future__ import annotations

from attn_core.plugin import MASKS, BackendSpec, Constraints, ContextParallelSupport, Exact, No

_ABILITIES = {
    "dtypes": ("float16", "bfloat16", "float32", "float64"),
    "masks": MASKS,
    "causal": True,
    "gqa": True,
    "cross_lengths": True,
    "value_head_dim": True,
    "window_size": True,
    "softcap": True,
    "dropout": True,
    "lse": True,
    "mask_gradient": True,
    "vmap": True,
    "forward_mode": True,
    "backward": True,
    "double_backward": True,
}

MATH = BackendSpec(
    api=1,
    name="native_math",
    summary="Plain torch operations with the scores written out: any device, any dtype, every option",
    aliases=("_native_math",),
    forward="attn_native.math:forward",
    backward="attn_native.math:backward",
    autograd="own",
    numerics=Exact(),
    compile=True,
    constraints=[
        Constraints(platforms={"cpu", "cuda"}, deterministic=True, **_ABILITIES),  # type: ignore[arg-type]
        Constraints(
            platforms={"rocm", "mps", "npu", "xla"},
            deterministic=No("whether torch's matrix products repeat their bits was not verified on this device"),
            **_ABILITIES,  # type: ignore[arg-type]
        ),
    ],
    context_parallel=ContextParallelSupport(ring=True, ulysses=True, hybrid=True),
)
