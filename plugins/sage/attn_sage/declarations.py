"""The declarations: one backend for sageattention's own choice, and one for each kernel of version 2. None imports torch.

Written against sageattention 1.0.6 (its wheel on PyPI) and 2.2.0 at commit d1a57a546c3d395b1ffcbeecc66d81db76f3b4b5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attn_core.plugin import (
    Approximate,
    BackendSpec,
    Constraints,
    ContextParallelSupport,
    Needs,
    No,
    Rule,
)

FIRST = "sageattention>=1.0.6,<2"
SECOND = "sageattention>=2.2,<3"

_SOURCE = "git+https://github.com/thu-ml/SageAttention@d1a57a546c3d395b1ffcbeecc66d81db76f3b4b5"
_BUILT = f"pip install --no-build-isolation {_SOURCE} (builds with nvcc; TORCH_CUDA_ARCH_LIST says for which GPUs)"

_SQUARE = Rule(
    "causal needs as many queries as keys: sageattention counts the diagonal from the first key, attn from the last",
    lambda facts: facts.causal and facts.lengths != "equal",
)
_NO_PADDED_DIAGONAL = Rule(
    "key padding excludes causal: padding is taken out by a share of the probabilities, which is sound where each query sees "
    "all keys that are kept",
    lambda facts: facts.causal and facts.mask == "key_padding",
)
_NO_MASK = No("the kernel takes no mask; native, flex and xformers do")
_NO_PACKED = No(
    "sageattention's packed kernel returns no lse and smooths keys across sequences; flash takes packed ones"
)

_COMMON: dict[str, Any] = {
    "platforms": {"cuda"},
    "masks": {"none": True, "bool": _NO_MASK, "float": _NO_MASK, "key_padding": True, "packed": _NO_PACKED},
    "causal": True,
    "gqa": True,
    "cross_lengths": True,
    "value_head_dim": No("its kernels take one head dim for query, key and value"),
    "window_size": No("its kernels have no window"),
    "softcap": No("its kernels have no softcap"),
    "dropout": No("its kernels are for inference, without dropout"),
    "deterministic": True,
    "mask_gradient": _NO_MASK,
    "vmap": No("sageattention has no batching rule"),
    "forward_mode": No("sageattention has no derivative"),
    "backward": No("sageattention has no backward: it is for inference"),
    "double_backward": No("sageattention has no backward: it is for inference"),
    "rules": (_SQUARE, _NO_PADDED_DIAGONAL),
}

_FIRST = Constraints(
    library=FIRST,
    compute_capability={(8, 0), (8, 6), (8, 9), (9, 0)},
    dtypes={"float16", "bfloat16", "float32"},
    head_dims={64, 96, 128},
    lse=No("sageattention 1 does not return the log-sum-exp; version 2 does"),
    **_COMMON,
)


_TRITON = Constraints(
    library=SECOND,
    compute_capability={(8, 0), (8, 6), (8, 9), (9, 0)},
    dtypes={"float16", "bfloat16"},
    head_dims=range(1, 129),
    lse=True,
    **_COMMON,
)


def _cuda(capabilities: set[tuple[int, int]]) -> Constraints:
    return replace(
        _TRITON,
        compute_capability=capabilities,
        causal=No(
            "sageattention's CUDA kernels hide later keys by -5000000 quantisation steps, which is next to nothing where "
            "queries or keys are small; sage_fp16_triton and flash hide them for certain"
        ),
        rules=(),
    )


_FP16 = Approximate(0.02, scores=1.5)
_FP8 = Approximate(0.06, scores=1.5)
_PARALLEL = ContextParallelSupport(ring=True, ulysses=True, hybrid=True)

SAGE = BackendSpec(
    api=1,
    name="sage",
    aliases={"sage_varlen"},
    summary="SageAttention, the kernel that it chooses for the GPU: int8 scores, approximate, forward only",
    forward="attn_sage.automatic:forward",
    needs=Needs(extra="sage"),
    constraints=(
        _FIRST,
        replace(_TRITON, compute_capability={(8, 6)}),
        _cuda({(8, 0), (8, 9), (9, 0), (12, 0), (12, 1)}),
    ),
    context_parallel=_PARALLEL,
    numerics=_FP8,
    compile=True,
    first_call_compiles=True,
)


def _kernel(
    name: str, summary: str, alias: str, extension: str, constraints: Constraints, numerics: Approximate
) -> BackendSpec:
    return BackendSpec(
        api=1,
        name=name,
        aliases={alias},
        summary=summary,
        forward=f"attn_sage.second:{name.removeprefix('sage_')}",
        needs=Needs(module=extension, install=_BUILT),
        constraints=constraints,
        context_parallel=_PARALLEL,
        numerics=numerics,
        compile=True,
        first_call_compiles=True,
    )


FP16_TRITON = _kernel(
    "sage_fp16_triton",
    "SageAttention 2 in Triton: int8 scores, float16 values",
    "_sage_qk_int8_pv_fp16_triton",
    "sageattention.triton.attn_qk_int8_per_block",
    _TRITON,
    _FP16,
)
FP16_CUDA = _kernel(
    "sage_fp16_cuda",
    "SageAttention 2 in CUDA: int8 scores, float16 values, summed in float32",
    "_sage_qk_int8_pv_fp16_cuda",
    "sageattention._qattn_sm80",
    _cuda({(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)}),
    _FP16,
)
FP8_CUDA = _kernel(
    "sage_fp8_cuda",
    "SageAttention 2 in CUDA: int8 scores, float8 values",
    "_sage_qk_int8_pv_fp8_cuda",
    "sageattention._qattn_sm89",
    _cuda({(8, 9), (9, 0), (10, 0), (12, 0), (12, 1)}),
    _FP8,
)
FP8_SM90 = _kernel(
    "sage_fp8_sm90",
    "SageAttention 2 in CUDA for Hopper: int8 scores, float8 values",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "sageattention._qattn_sm90",
    _cuda({(9, 0)}),
    _FP8,
)
