"""sageattention 2: one adapter for each of its kernels, and one for its own choice among them."""

from __future__ import annotations

import sageattention

from attn_sage.adapting import Kernel, adapted

OPERATORS = "attn_sage"

automatic = adapted(
    Kernel("sage", sageattention.sageattn, 128, chooses_granularity=False, smooths=True, float8=True), OPERATORS
)
fp16_triton = adapted(
    Kernel("sage_fp16_triton", sageattention.sageattn_qk_int8_pv_fp16_triton, 1, chooses_granularity=False, cuda=False),
    OPERATORS,
)
fp16_cuda = adapted(Kernel("sage_fp16_cuda", sageattention.sageattn_qk_int8_pv_fp16_cuda, 64), OPERATORS)
fp8_cuda = adapted(Kernel("sage_fp8_cuda", sageattention.sageattn_qk_int8_pv_fp8_cuda, 64, float8=True), OPERATORS)
fp8_sm90 = adapted(
    Kernel("sage_fp8_sm90", sageattention.sageattn_qk_int8_pv_fp8_cuda_sm90, 128, float8=True), OPERATORS
)
