"""The declaration of ``flex``: ``torch.nn.attention.flex_attention``, compiled."""

from __future__ import annotations

from attn_core.plugin import BackendSpec, CapabilityRange, Constraints, ContextParallelSupport, No, Rule

_MASKS = {"none", "bool", "float", "key_padding", "packed"}
_DTYPES = {"float16", "bfloat16", "float32"}
_DROPOUT = No("flex_attention has no dropout; native_math has")
_VMAP = No("compiled flex_attention has no batching rule")
_FORWARD_MODE = No("flex_attention has no forward-mode derivative")

_CPU = Constraints(
    platforms={"cpu"},
    # With several threads the C++ that torch 2.7 and 2.8 generate lacks braces; 2.6 fails where both functions read tensors.
    library="torch>=2.9",
    dtypes=_DTYPES,
    masks=_MASKS,
    causal=True,
    gqa=True,
    cross_lengths=True,
    value_head_dim=True,
    window_size=True,
    softcap=True,
    deterministic=True,
    dropout=_DROPOUT,
    lse=No("torch's flex_attention for CPU does not return the log-sum-exp"),
    backward=No("torch's flex_attention for CPU has no backward"),
    mask_gradient=No("torch's flex_attention for CPU has no backward"),
    double_backward=No("torch's flex_attention for CPU has no backward"),
    vmap=_VMAP,
    forward_mode=_FORWARD_MODE,
)

_CUDA = Constraints(
    platforms={"cuda"},
    library="torch>=2.8",  # before, flex_attention takes head dims that are powers of two only
    compute_capability=CapabilityRange((8, 0)),
    dtypes=_DTYPES,
    head_dims=range(16, 257),  # below 16 the Triton kernel refuses (tl.dot)
    masks=_MASKS,
    causal=True,
    gqa=True,
    cross_lengths=True,
    value_head_dim=True,
    window_size=True,
    softcap=True,
    lse=True,
    deterministic=True,
    mask_gradient=No(
        "the kernel of the mask's gradient asks for more shared memory than the GPU has at common shapes "
        "(seen on an H200, torch 2.11), and torch loses that gradient inside torch.compile (pytorch issue 162228); "
        "native and native_math have it"
    ),
    backward=True,
    dropout=_DROPOUT,
    double_backward=No("the backward of flex_attention can't be differentiated"),
    vmap=_VMAP,
    forward_mode=_FORWARD_MODE,
    rules=[
        Rule(
            "float32 with a head dim above 128: the Triton kernel asks for more shared memory than the GPU has "
            "(seen on an H200, torch 2.11); use a 16-bit dtype, or native_efficient",
            lambda facts: facts.dtype == "float32" and max(facts.head_dim, facts.value_head_dim) > 128,
        ),
        Rule(
            "a described mask inside torch.compile on a GPU: torch reads its indices out of bounds there, or can't generate "
            "the code (seen on torch 2.11); call it outside compiled code, or use native",
            lambda facts: facts.compiled and facts.mask in {"key_padding", "packed"},
        ),
    ],
)

FLEX = BackendSpec(
    api=1,
    name="flex",
    summary="torch.nn.attention.flex_attention: any mask without a dense one, compiled at the first call of a kind",
    forward="attn_native.flex:forward",
    backward="attn_native.flex:backward",
    autograd="own",
    constraints=(_CPU, _CUDA),
    context_parallel=ContextParallelSupport(ring=True, ulysses=True, hybrid=True),
    compile=True,
    first_call_compiles=True,
)
