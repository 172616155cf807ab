"""The declarations of this wheel. None imports torch.

What each was written against is in ``repositories``.
"""

from __future__ import annotations

from typing import Any

from attn_core.plugin import Approximate, BackendSpec, Backward, Constraints, ContextParallelSupport, Needs, No, Rule
from attn_hub.repositories import REPOSITORIES

_NEEDS = Needs(extra="hub")
_UNTRIED = "written against {}; loaded from the hub it was never tried{}; tried over a stand-in in the hub's format"
_NO_MASK = No("flash-attention takes no mask; native, native_efficient and flex do")
_NOT_YET = No("not tried of a hub build; flash has it")
_SQUARE_ONLY = Rule(
    "causal needs as many queries as keys: sageattention counts the diagonal from the first key, attn from the last",
    lambda facts: facts.causal and facts.lengths != "equal",
)


def _no_room(widest: int) -> Rule:
    return Rule(
        f"head dims above {widest - 8} exclude key padding together with causal: padding is hidden there by 8 further columns, "
        f"and the kernel takes {widest}; use native, native_efficient or flex",
        lambda facts: facts.head_dim > widest - 8 and facts.causal and facts.mask == "key_padding",
    )


_FLASH: dict[str, Any] = {
    "platforms": {"cuda"},
    "dtypes": {"float16", "bfloat16"},
    "head_dims": range(1, 257),
    "masks": {"none": True, "bool": _NO_MASK, "float": _NO_MASK, "key_padding": True, "packed": True},
    "causal": True,
    "gqa": True,
    "cross_lengths": True,
    "value_head_dim": True,
    "window_size": _NOT_YET,
    "softcap": _NOT_YET,
    "dropout": _NOT_YET,
    "lse": True,
    "deterministic": True,
    "mask_gradient": _NO_MASK,
    "vmap": No("flash-attention has no rule under vmap; native_math has"),
    "forward_mode": No("flash-attention has no forward-mode derivative; native_math has"),
    "backward": True,
    "double_backward": No("flash-attention has no derivative of its backward; native_math has"),
    "rules": (_no_room(256),),
}
_ALL_PARALLEL = ContextParallelSupport(ring=True, ulysses=True, hybrid=True)
_ULYSSES = ContextParallelSupport(ring=No("ring needs the lse; flash_hub returns it"), ulysses=True)


def _hub(name: str, summary: str, module: str, constraints: Any, **others: Any) -> BackendSpec:
    return BackendSpec(
        api=1,
        name=name,
        summary=f"{summary}, of {REPOSITORIES[name].name}",
        forward=f"attn_hub.{module}:forward",
        needs=_NEEDS,
        constraints=constraints,
        unverified=_UNTRIED.format(
            REPOSITORIES[name].source,
            ", at its pinned commit neither" if REPOSITORIES[name].revision else ", and the user pins it",
        ),
        compile=True,
        **others,
    )


FLASH = _hub(
    "flash_hub",
    "flash-attn 2",
    "flash_2",
    Constraints(compute_capability={(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}, **_FLASH),
    aliases={"flash_varlen_hub"},
    backward="attn_hub.flash_2:backward",
    autograd="core",
    context_parallel=_ALL_PARALLEL,
)
FLASH_3 = _hub(
    "flash_3_hub",
    "flash-attn 3",
    "flash_3",
    Constraints(
        compute_capability={(8, 0), (9, 0)},
        **{
            **_FLASH,
            "backward": Backward(
                rules=(
                    Rule(
                        "deterministic excludes head dims above 192 with gradients: the deterministic backward ends there",
                        lambda facts: facts.deterministic and max(facts.head_dim, facts.value_head_dim) > 192,
                    ),
                )
            ),
        },
    ),
    aliases={"_flash_3_hub", "_flash_3_varlen_hub"},
    backward="attn_hub.flash_3:backward",
    autograd="core",
    context_parallel=_ALL_PARALLEL,
)
FLASH_4 = _hub(
    "flash_4_hub",
    "flash-attn 4",
    "flash_4",
    Constraints(
        compute_capability={(9, 0), (10, 0)},
        **{**_FLASH, "head_dims": range(1, 129), "deterministic": _NOT_YET, "rules": (_no_room(128),)},
    ),
    backward="attn_hub.flash_4:backward",
    autograd="core",
    context_parallel=_ALL_PARALLEL,
    first_call_compiles=True,
)
AITER = _hub(
    "aiter_hub",
    "AITER's flash-attention for AMD",
    "aiter",
    Constraints(
        **{
            **_FLASH,
            "platforms": {"rocm"},
            "compute_capability": {(9, 4), (9, 5)},  # gfx942 and gfx950
            "dtypes": {"bfloat16"},
            "head_dims": range(1, 129),
            "rules": (_no_room(128),),
            "lse": No("which form the lse has in this build was not found out; native_math returns it"),
            "deterministic": _NOT_YET,
            "backward": No("the hub build has the forward alone"),
            "double_backward": No("the hub build has the forward alone"),
        }
    ),
    aliases={"aiter_fa2_hub"},
    context_parallel=_ULYSSES,
)
_SAGE: dict[str, Any] = {
    "platforms": {"cuda"},
    "dtypes": {"float16", "bfloat16"},
    "value_head_dim": No("its kernels take one head dim for query, key and value"),
    "window_size": No("its kernels have no window"),
    "softcap": No("its kernels have no softcap"),
    "dropout": No("its kernels are for inference, without dropout"),
    "backward": No("sageattention has no backward: it is for inference"),
    "cross_lengths": True,
}
_NO_MASK_IN_SAGE = No("the kernel takes no mask; native, flex and xformers do")

SAGE_HUB = _hub(
    "sage_hub",
    "SageAttention 2, approximate",
    "sage",
    Constraints(
        compute_capability={(8, 0), (8, 9), (9, 0)},  # 12.0 would be given kernels that are built for 8.9 alone
        head_dims=range(1, 129),
        masks={
            "none": True,
            "bool": _NO_MASK_IN_SAGE,
            "float": _NO_MASK_IN_SAGE,
            "key_padding": True,
            "packed": No("sageattention's packed kernel smooths keys across sequences, and returns no lse"),
        },
        causal=No("its CUDA kernels hide later keys too weakly where queries or keys are small; flash hides them"),
        gqa=True,
        lse=True,
        deterministic=True,
        **_SAGE,
    ),
    numerics=Approximate(0.06, scores=1.5),
    first_call_compiles=True,
    context_parallel=_ALL_PARALLEL,
)
SAGE_BLACKWELL = _hub(
    "sage_blackwell_hub",
    "SageAttention 3 in float4, approximate",
    "sage_blackwell",
    Constraints(
        compute_capability={(12, 0)},
        head_dims={64, 128},
        masks={"none"},
        causal=True,
        gqa=No("its kernels smooth queries and keys head by head; sage_hub takes grouped queries"),
        lse=No("the function returns the result alone"),
        deterministic=_NOT_YET,
        rules=(_SQUARE_ONLY,),
        **_SAGE,
    ),
    numerics=Approximate(0.2, scores=1.5),
    first_call_compiles=True,
    context_parallel=_ULYSSES,
)
