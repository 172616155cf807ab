"""The declarations of the kernels of other accelerators' torch: Ascend (torch_npu) and TPU (torch_xla)."""

from __future__ import annotations

from attn_core.plugin import BackendSpec, Constraints, ContextParallelSupport, Needs, No, Rule

_NO_RING = No("ring needs a backward of its own, which is not written for this kernel")

NPU = BackendSpec(
    api=1,
    name="native_npu",
    aliases={"_native_npu"},
    summary="torch_npu.npu_fusion_attention, for Ascend",
    forward="attn_native.npu:forward",
    needs=Needs(module="torch_npu", install="pip install torch-npu, of the version of torch, beside CANN"),
    constraints=Constraints(
        platforms={"npu"},
        dtypes={"float16", "bfloat16"},
        head_dims=range(16, 513, 16),
        masks={
            "none": True,
            "bool": True,
            "float": No(
                "the kernel multiplies a bias by the scale, and nothing is said of -inf in it; native_math takes it"
            ),
            "key_padding": No("the kernel takes it only as a mask of (Sq, Skv), which is not made of a description"),
            "packed": True,
        },
        causal=True,
        gqa=True,
        cross_lengths=True,
        value_head_dim=No("the kernel takes one head dim for query, key and value"),
        window_size=No("the kernel's band was not tried; native_math has windows"),
        softcap=No("the kernel has no softcap; native_math has"),
        dropout=No("the kernel draws with a generator of its own; native_math has dropout"),
        lse=True,
        deterministic=No("whether the kernel repeats its bits was not verified"),
        mask_gradient=No("the kernel takes no bias here; native_math has its gradient"),
        vmap=No("torch_npu has no batching rule; native_math has"),
        forward_mode=No("torch_npu has no forward-mode derivative; native_math has"),
        backward=True,
        double_backward=No("torch_npu has no derivative of its backward; native_math has"),
        rules=(
            Rule(
                "causal excludes more queries than keys: what the kernel returns for the queries that see nothing is not said",
                lambda facts: facts.causal and facts.lengths == "more queries",
            ),
            Rule(
                "more than 256 query heads are excluded: the kernel has so many at most, as its documentation says",
                lambda facts: facts.heads > 256,
            ),
            Rule(
                "causal excludes packed sequences: whether each has as many keys as queries is not known",
                lambda facts: facts.causal and facts.mask == "packed",
            ),
        ),
    ),
    context_parallel=ContextParallelSupport(ring=_NO_RING, ulysses=True),
    compile=True,
    unverified="no Ascend was at hand; written against torch_npu's documentation (7.0.0 and 6.0.0), and tried over a stand-in",
)

XLA = BackendSpec(
    api=1,
    name="native_xla",
    aliases={"_native_xla"},
    summary="torch_xla's flash attention (Pallas), for TPU",
    forward="attn_native.xla:forward",
    needs=Needs(module="torch_xla", install="pip install 'torch_xla[tpu]', of the version of torch"),
    constraints=Constraints(
        platforms={"xla"},
        dtypes={"bfloat16", "float32"},
        head_dims={64, 128, 256},
        masks={
            "none": True,
            "bool": No("the kernel takes no bool mask; native_math does"),
            "float": No("the kernel adds a bias before it scales; native_math takes it"),
            "key_padding": True,
            "packed": No("it was not tried of packed sequences; native_math takes them"),
        },
        causal=True,
        gqa=True,
        cross_lengths=True,
        value_head_dim=No("the kernel takes one head dim for query, key and value"),
        window_size=No("the kernel has no window; native_math has"),
        softcap=No("the kernel has no softcap; native_math has"),
        dropout=No("the kernel has no dropout; native_math has"),
        lse=No("torch_xla's function does not return the log-sum-exp; native_math does"),
        deterministic=No("whether the kernel repeats its bits was not verified"),
        mask_gradient=No("the kernel takes no bias here; native_math has its gradient"),
        vmap=No("torch_xla has no batching rule; native_math has"),
        forward_mode=No("torch_xla has no forward-mode derivative; native_math has"),
        backward=True,
        double_backward=No("torch_xla has no derivative of its backward; native_math has"),
        rules=(
            Rule(
                "causal needs as many queries as keys: the kernel counts the diagonal from the first key, attn from the last",
                lambda facts: facts.causal and facts.lengths != "equal",
            ),
            Rule(
                "causal excludes key padding: a query that sees nothing can't be told without its row of the mask",
                lambda facts: facts.causal and facts.mask == "key_padding",
            ),
        ),
    ),
    context_parallel=ContextParallelSupport(ring=_NO_RING, ulysses=True),
    compile=No(
        "torch_xla compiles by a backend of its own, and its function does not trace with segments, which most lengths need; "
        "native_math traces"
    ),
    unverified="no TPU was at hand; written against torch_xla 2.9.0, and tried over a stand-in",
)
