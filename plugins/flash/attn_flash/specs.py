"""The declarations of this wheel. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from attn_core.plugin import BackendSpec, Backward, Constraints, ContextParallelSupport, Facts, Needs, No, Rule

_ALL_PARALLEL = ContextParallelSupport(ring=True, ulysses=True, hybrid=True)
_NO_MASK = No("flash-attention takes no mask; native, native_efficient and flex do")
_MASKS: dict[str, bool | No] = {"none": True, "bool": _NO_MASK, "float": _NO_MASK, "key_padding": True, "packed": True}
_HALF = {"float16", "bfloat16"}


def _common(**others: Any) -> dict[str, Any]:
    """What the three libraries have in common."""
    return {
        "platforms": {"cuda"},
        "dtypes": _HALF,
        "masks": _MASKS,
        "causal": True,
        "gqa": True,
        "cross_lengths": True,
        "value_head_dim": True,
        "window_size": True,
        "softcap": True,
        "lse": True,
        "deterministic": True,
        "mask_gradient": No("flash-attention takes no mask; native and native_math have its gradient"),
        "vmap": No("flash-attention has no rule under vmap; native_math has"),
        "forward_mode": No("flash-attention has no forward-mode derivative; native_math has"),
        "double_backward": No("flash-attention has no derivative of its backward; native_math has"),
        **others,
    }


def _moves(facts: Facts) -> bool:
    return facts.mask == "key_padding" and (facts.causal or facts.window_size is not None)


_SOFTCAP_HIDES_NOT = Rule(
    "softcap excludes key padding together with causal or a window: padding is hidden there by low scores, which a "
    "softcap lifts; use flex or native_math",
    lambda facts: facts.softcap and _moves(facts),
)

_NO_LSE_OF_SOFTCAP = Rule(
    "softcap excludes return_lse: the kernel takes tanh to 11 bits (tanh.approx), which a result in half precision hides and "
    "a float32 lse does not; use native_math",
    lambda facts: facts.softcap and facts.return_lse,
)


def _no_room(widest: int) -> Rule:
    return Rule(
        f"head dims above {widest - 8} exclude key padding together with causal or a window: padding is hidden there by 8 "
        f"further columns, and the kernel takes {widest}; use native, native_efficient or flex",
        lambda facts: facts.head_dim > widest - 8 and _moves(facts),
    )


# --- flash-attn 2 -------------------------------------------------------------------------------------------------------

_FLASH_RULES = (
    _SOFTCAP_HIDES_NOT,
    _no_room(256),
    Rule(
        "softcap excludes dropout: flash-attn's kernels have one of them at a time; use native_math",
        lambda facts: facts.softcap and facts.dropout,
    ),
    _NO_LSE_OF_SOFTCAP,
    Rule(
        "dropout excludes return_lse: the library returns the lse only beside all probabilities, a tensor of (Sq, Skv)",
        lambda facts: facts.dropout and facts.return_lse,
    ),
)
_DROPOUT_TOO_WIDE = Rule(
    "dropout excludes head dims above 192 with gradients here: the kernel does not fit into the shared memory",
    lambda facts: facts.dropout and max(facts.head_dim, facts.value_head_dim) > 192,
)


def _flash(capabilities: set[tuple[int, int]], backward: Literal[True] | Backward) -> Constraints:
    return Constraints(
        **_common(
            compute_capability=capabilities,
            head_dims=range(1, 257),
            dropout=True,
            backward=backward,
            rules=_FLASH_RULES,
        )
    )


FLASH = BackendSpec(
    api=1,
    name="flash",
    aliases={"flash_varlen"},
    summary="flash-attn 2: dense and packed, windows, softcap, dropout, key padding by packing",
    forward="attn_flash.flash_2:forward",
    backward="attn_flash.flash_2:backward",
    autograd="own",
    needs=Needs(
        extra="flash",
        install="pip install --no-build-isolation 'flash-attn>=2.7.3,<3' (builds with nvcc, beside torch)",
    ),
    constraints=(
        _flash({(8, 0), (9, 0), (10, 0), (10, 3)}, True),
        _flash({(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)}, Backward(rules=(_DROPOUT_TOO_WIDE,))),
    ),
    context_parallel=_ALL_PARALLEL,
    compile=True,
)

# --- flash-attn 3 -------------------------------------------------------------------------------------------------------

FLASH_3 = BackendSpec(
    api=1,
    name="flash_3",
    aliases={"_flash_3", "_flash_varlen_3"},
    summary="flash-attn 3: dense and packed, for Hopper",
    forward="attn_flash.flash_3:forward",
    backward="attn_flash.flash_3:backward",
    autograd="own",
    needs=Needs(
        module="flash_attn_interface",
        install="build it: git clone https://github.com/Dao-AILab/flash-attention && cd flash-attention/hopper && "
        "python setup.py install (with nvcc, beside torch)",
    ),
    constraints=Constraints(
        **_common(
            compute_capability={(9, 0)},
            head_dims=range(1, 257),
            dropout=No("flash-attn 3 has no dropout; flash has"),
            backward=Backward(
                rules=(
                    Rule(
                        "deterministic excludes head dims above 192 with gradients: the deterministic backward ends there",
                        lambda facts: facts.deterministic and max(facts.head_dim, facts.value_head_dim) > 192,
                    ),
                )
            ),
            rules=(_SOFTCAP_HIDES_NOT, _NO_LSE_OF_SOFTCAP, _no_room(256)),
        )
    ),
    context_parallel=_ALL_PARALLEL,
    compile=True,
)

# --- flash-attn 4 -------------------------------------------------------------------------------------------------------

_NO_DROPOUT = No("flash-attn 4 has no dropout; flash and native_flash have")

_FLASH_4_HOPPER = Constraints(
    **_common(
        compute_capability={(9, 0)},
        head_dims=range(1, 257),
        dropout=_NO_DROPOUT,
        backward=True,
        rules=(_SOFTCAP_HIDES_NOT, _no_room(256)),
    )
)
_FLASH_4_BLACKWELL = Constraints(
    **_common(
        compute_capability={(10, 0), (10, 3), (11, 0)},
        head_dims=range(1, 257),
        dropout=_NO_DROPOUT,
        backward=Backward(
            rules=(
                Rule(
                    "softcap excludes head dims above 128 with gradients: the kernel for 256 has no softcap in its backward",
                    lambda facts: facts.softcap and max(facts.head_dim, facts.value_head_dim) > 128,
                ),
            )
        ),
        rules=(_SOFTCAP_HIDES_NOT, _no_room(256)),
    )
)
_FLASH_4_SMALL_BLACKWELL = Constraints(
    **_common(
        compute_capability={(12, 0), (12, 1)},
        head_dims=range(1, 129),  # above, its tiles don't fit into 99 KB of shared memory
        dropout=_NO_DROPOUT,
        backward=Backward(
            softcap=No("flash-attn 4's backward for compute capability 12 has no softcap"),
            deterministic=No("flash-attn 4's backward for compute capability 12 is not deterministic"),
        ),
        rules=(_SOFTCAP_HIDES_NOT, _no_room(128)),
    )
)

FLASH_4 = BackendSpec(
    api=1,
    name="flash_4",
    summary="flash-attn 4: for Hopper and Blackwell, compiled at the first call of a kind",
    forward="attn_flash.flash_4:forward",
    backward="attn_flash.flash_4:backward",
    autograd="core",
    needs=Needs(
        extra="flash-4", install="pip install --pre 'flash-attn-4[cu13]>=4.0.0b36' (without [cu13] for CUDA 12)"
    ),
    constraints=(_FLASH_4_HOPPER, _FLASH_4_BLACKWELL, _FLASH_4_SMALL_BLACKWELL),
    context_parallel=_ALL_PARALLEL,
    compile=True,
    first_call_compiles=True,
)
