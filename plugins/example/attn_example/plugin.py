"""Where attn-core finds the backend of this wheel. Imports neither torch nor the kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from attn_core.plugin import MASKS, BackendSpec, Constraints, ContextParallelSupport, No, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator

_VERIFIED = Constraints(
    platforms={"cpu", "cuda"},
    dtypes={"float16", "bfloat16", "float32", "float64"},
    masks=MASKS,
    causal=True,
    gqa=True,
    cross_lengths=True,
    value_head_dim=True,
    window_size=True,
    softcap=True,
    lse=True,
    deterministic=True,
    backward=True,
    dropout=No("a draw would have to be kept for every pair of a query and a key; native_math has dropout"),
    mask_gradient=No("it has as many numbers as the scores, which are never written out here; native_math has it"),
    vmap=No("the core's graph has no rule for torch.func; native_math has one"),
    forward_mode=No("the core's graph has no forward mode; native_math has it"),
    double_backward=No("the backward is not differentiable; native_math has one that is"),
)
_ELSEWHERE = replace(
    _VERIFIED,
    platforms={"rocm", "mps", "npu", "xla"},
    deterministic=No("whether torch's matrix products repeat their bits was not verified on this device"),
)


@hookimpl
def attn_backends() -> Iterator[BackendSpec]:
    """Declare the backend."""
    yield BackendSpec(
        api=1,
        name="chunked",
        summary="Exact attention in chunks with an online softmax, in plain torch: long sequences in little memory",
        forward="attn_example.adapter:forward",
        backward="attn_example.adapter:backward",
        constraints=(_VERIFIED, _ELSEWHERE),
        context_parallel=ContextParallelSupport(ring=True, ulysses=True, hybrid=True),
        compile=True,
    )
