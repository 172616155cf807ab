"""The declarations of torch's own kernels, one each: flash, memory-efficient, cuDNN."""

from __future__ import annotations

from dataclasses import replace

from attn_core.plugin import BackendSpec, Backward, CapabilityRange, Constraints, ContextParallelSupport, No, Rule

_NO_SOFTCAP = No("torch's kernel has no softcap; native_math and flex do")
_NO_TRANSFORMS = No("torch has no rule for its attention ops under vmap")
_NO_FORWARD_MODE = No("torch has no forward-mode derivative of its attention ops; native_math does")
_NO_DOUBLE_BACKWARD = No("torch has no derivative of its attention ops' backward; native_math does")
_ATOMIC = No("its backward adds with atomics, in no fixed order; native_math has a fixed one")

_FLOAT_MASK_DTYPE = Rule(
    "a float mask of another dtype than query's would be rounded to it; give it in query's dtype, or use native_math",
    lambda facts: facts.mask == "float" and facts.mask_dtype not in (None, facts.dtype),
)
_ALL_PARALLEL = ContextParallelSupport(ring=True, ulysses=True, hybrid=True)

# --- flash --------------------------------------------------------------------------------------------------------------

_FLASH_ON_CPU = Constraints(
    platforms={"cpu"},
    library="torch>=2.13",
    dtypes={"float16", "bfloat16", "float32", "float64"},
    masks={
        "none": True,
        "bool": True,
        "float": True,
        "key_padding": True,
        "packed": No("the CPU kernel knows no packed sequences; native and native_math take them"),
    },
    causal=True,
    gqa=True,
    cross_lengths=True,
    value_head_dim=True,
    window_size=No("the CPU kernel has no window; native builds a mask for it"),
    softcap=_NO_SOFTCAP,
    dropout=No("the CPU kernel draws nothing; native_math does"),
    lse=True,
    deterministic=True,
    mask_gradient=No("the CPU kernel has no gradient of its mask; native_math and native do"),
    vmap=_NO_TRANSFORMS,
    forward_mode=_NO_FORWARD_MODE,
    backward=True,
    double_backward=_NO_DOUBLE_BACKWARD,
)

_FLASH_ON_CPU_BEFORE = replace(
    _FLASH_ON_CPU,
    library="torch<2.13",
    rules=(
        Rule(
            "return_lse with float64 inside torch.compile: before torch 2.13 compiled code takes that lse for float32; "
            "use native_math",
            lambda facts: facts.compiled and facts.return_lse and facts.dtype == "float64",
        ),
    ),
)

_FLASH_ON_CUDA = Constraints(
    platforms={"cuda"},
    compute_capability=CapabilityRange((8, 0)),
    dtypes={"float16", "bfloat16"},
    head_dims=range(1, 257),
    masks={
        "none": True,
        "bool": No("FlashAttention-2 takes no mask; native_efficient and native do"),
        "float": No("FlashAttention-2 takes no mask; native_efficient and native do"),
        "key_padding": No("FlashAttention-2 takes no mask; native_efficient, native and flex do"),
        "packed": True,
    },
    causal=True,
    gqa=True,
    cross_lengths=True,
    value_head_dim=True,
    window_size=True,
    softcap=No("torch builds FlashAttention-2 without softcap; native_math and flex have it"),
    dropout=True,
    lse=True,
    deterministic=True,
    mask_gradient=No("FlashAttention-2 takes no mask"),
    vmap=_NO_TRANSFORMS,
    forward_mode=_NO_FORWARD_MODE,
    backward=Backward(
        deterministic=_ATOMIC,
        rules=(
            Rule(
                "the backward of head dims above 192 needs compute capability 8.0, 9.0 or 10.0 (shared memory)",
                lambda facts: (
                    max(facts.head_dim, facts.value_head_dim) > 192
                    and facts.compute_capability is not None
                    and (facts.compute_capability[0] == 12 or facts.compute_capability in ((8, 6), (8, 7), (8, 9)))
                ),
            ),
        ),
    ),
    double_backward=_NO_DOUBLE_BACKWARD,
    rules=(
        Rule(
            "a window whose right side is not 0 excludes more queries than keys: the kernel replaces a long or unlimited "
            "right side by the key length, which is too short there",
            lambda facts: (
                facts.mask != "packed"
                and facts.window_size is not None
                and facts.window_size[1] != 0
                and facts.lengths == "more queries"
            ),
        ),
    ),
)

FLASH = BackendSpec(
    api=1,
    name="native_flash",
    aliases={"_native_flash"},
    summary="torch's flash kernel: FlashAttention-2 on CUDA, its own on CPU",
    forward="attn_native.aten:flash_forward",
    backward="attn_native.aten:flash_backward",
    autograd="own",
    constraints=(_FLASH_ON_CPU, _FLASH_ON_CPU_BEFORE, _FLASH_ON_CUDA),
    context_parallel=_ALL_PARALLEL,
    compile=True,
)

# --- memory-efficient ---------------------------------------------------------------------------------------------------

EFFICIENT = BackendSpec(
    api=1,
    name="native_efficient",
    aliases={"_native_efficient"},
    summary="torch's memory-efficient CUDA kernel: any head dim, float32 too, masks with a gradient",
    forward="attn_native.aten:efficient_forward",
    backward="attn_native.aten:efficient_backward",
    autograd="own",
    constraints=Constraints(
        platforms={"cuda"},
        compute_capability=CapabilityRange((5, 0)),
        dtypes={"float16", "bfloat16", "float32"},
        masks={
            "none": True,
            "bool": True,
            "float": True,
            "key_padding": True,
            "packed": No("native_flash takes packed sequences, at every length; this kernel only where lengths agree"),
        },
        causal=True,
        gqa=True,
        cross_lengths=True,
        value_head_dim=True,
        window_size=No("torch's derivative of this kernel forgets the window; native_flash and flex have windows"),
        softcap=_NO_SOFTCAP,
        dropout=True,
        lse=True,
        deterministic=True,
        mask_gradient=True,
        vmap=_NO_TRANSFORMS,
        forward_mode=_NO_FORWARD_MODE,
        backward=Backward(deterministic=_ATOMIC),
        double_backward=_NO_DOUBLE_BACKWARD,
        rules=(
            _FLOAT_MASK_DTYPE,
            Rule(
                "bfloat16 needs compute capability 8.0 and up",
                lambda facts: facts.dtype == "bfloat16" and (facts.compute_capability or (8, 0)) < (8, 0),
            ),
        ),
    ),
    context_parallel=_ALL_PARALLEL,
    compile=True,
)

# --- cuDNN --------------------------------------------------------------------------------------------------------------


def _cudnn(capability: CapabilityRange | set[tuple[int, int]], head_dims: range, library: str) -> Constraints:
    return Constraints(
        platforms={"cuda"},
        compute_capability=capability,
        dtypes={"float16", "bfloat16"},
        head_dims=head_dims,
        library=library,
        masks={
            "none": True,
            "bool": No("torch hands cuDNN only a written-out bias, without its gradient; native_efficient takes masks"),
            "float": No(
                "torch hands cuDNN only a written-out bias, without its gradient; native_efficient takes masks"
            ),
            "key_padding": No("torch hands cuDNN only a written-out bias; native_efficient takes key padding"),
            "packed": No("torch's packed path of cuDNN is experimental; native_flash takes packed sequences"),
        },
        causal=True,
        gqa=True,
        cross_lengths=True,
        value_head_dim=True,
        window_size=No("torch's cuDNN op has no window; native_flash does"),
        softcap=_NO_SOFTCAP,
        dropout=True,
        lse=True,
        deterministic=True,
        mask_gradient=No("torch's cuDNN op has no gradient of a mask; native_efficient does"),
        vmap=_NO_TRANSFORMS,
        forward_mode=_NO_FORWARD_MODE,
        backward=Backward(deterministic=No("torch knows cuDNN's backward as not deterministic; native_math is")),
        double_backward=_NO_DOUBLE_BACKWARD,
        rules=(
            Rule(
                "dropout excludes causal with unequal lengths: the parts that cuDNN is given there would draw separately",
                lambda facts: facts.dropout and facts.causal and facts.lengths != "equal",
            ),
        ),
    )


CUDNN = BackendSpec(
    api=1,
    name="native_cudnn",
    aliases={"_native_cudnn"},
    summary="cuDNN's attention through torch: the fastest at many shapes on Hopper",
    forward="attn_native.aten:cudnn_forward",
    backward="attn_native.aten:cudnn_backward",
    autograd="own",
    constraints=(
        _cudnn(CapabilityRange((8, 0)), range(1, 129), "torch>=2.6"),
        _cudnn({(9, 0)}, range(1, 257), "torch>=2.8"),
    ),
    context_parallel=_ALL_PARALLEL,
    compile=True,
)
