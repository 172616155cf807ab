"""Kinds of call: what a kernel that compiles at the first call of a kind may tell apart, and those that are tried of it.

Compiling takes seconds, and a call of a kind that is compiled already takes none. So few kinds are tried, and many calls of
each: other numbers, masks, scales, caps and windows.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from attn_core.testing.drawing import Case

_GIVEN = ("query", "key", "value")
_LSE = {"return_lse": True}
_BACKWARD = {"gradients": _GIVEN}
ESSENTIAL: tuple[Mapping[str, Any], ...] = (
    {},
    {"queries": 300, **_LSE, **_BACKWARD},
    {"scale": -0.5, **_BACKWARD},
    {"queries": 5, "keys": 17},
    {"queries": 1, "keys": 70, "batch": 1},
    {"causal": True},
    {"causal": True, "queries": 300, "dtype": "bfloat16"},
    {"causal": True, "queries": 5, "keys": 17, **_LSE},
    {"causal": True, "queries": 33, "keys": 5, **_BACKWARD},
    {"window_size": (2, 1)},
    {"window_size": (5, -1), "queries": 300, **_LSE},
    {"window_size": (-1, 2), "queries": 5, "keys": 17, **_BACKWARD},
    {"softcap": 2.0, "queries": 300, **_LSE, **_BACKWARD},
    {"heads": (4, 1), "queries": 1, "keys": 1030},
    {"heads": (6, 2), "causal": True, "queries": 300, "dtype": "float16", **_LSE},
    {"mask": "key_padding"},
    {"mask": "key_padding", "causal": True, "queries": 300, "dtype": "bfloat16", **_LSE, **_BACKWARD},
    {"mask": "packed"},
    {"mask": "packed", "causal": True, "queries": 300, **_LSE, **_BACKWARD},
    {"mask": "bool"},
    {"mask": "bool", "mask_once": (False, True, False, False), "queries": 300, **_LSE, **_BACKWARD},
    {"mask": "float"},
    {"mask": "float", "mask_once": (True, False, False, False), "queries": 5, "keys": 17, **_LSE, **_BACKWARD},
    {"queries": 12, "keys": 4500, "batch": 1, "heads": (1, 1)},
    {"layouts": ("transposed",) * 3},
    {"layouts": ("sliced",) * 3, "grad_layout": "transposed", **_BACKWARD},
    {"autocast": "bfloat16", "dtype": "float32"},
    {"mode": "inference", "gradients": ("query", "value")},
)
"""What is asked for beside a plain call: each meaning by itself, and those together that kernels get wrong together."""
_WISHES = ("gradients", "return_lse", "dtype")


def wished(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """These fields; then without gradients, lse or dtype, which they have only where they are admitted.

    >>> list(wished({"causal": True, "return_lse": True}))
    [{'causal': True, 'return_lse': True}, {'causal': True}]
    """
    wishes = [name for name in _WISHES if name in fields]
    for count in range(len(wishes) + 1):
        for dropped in combinations(wishes, count):
            yield {name: value for name, value in fields.items() if name not in dropped}


def kind_of(case: Case) -> Case:
    """The plainest call that needs no other code than this one, as far as one can tell from outside.

    >>> from attn_core.testing import Case
    >>> kind_of(Case(scale=0.3, seed=4)) == kind_of(Case(scale=-2.0)) != kind_of(Case())
    True
    """
    window = case.window_size
    return replace(
        case,
        scale=None if case.scale is None else 1.0,
        softcap=None if case.softcap is None else 1.0,
        window_size=None if window is None else (max(min(window[0], 0), -1), max(min(window[1], 1), -1)),
        mask_hides="some",
        amplitude=1.0,
        seed=0,
    )
