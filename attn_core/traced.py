"""The call inside code that torch.compile is tracing: the same checks, made once, while tracing.

Nothing here is remembered between traces, and nothing that eager calls remember is read: Dynamo would guard on it and
compile again at each new kind of call. What was decided is guarded by the facts that the trace itself looks at.
"""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import torch

from attn_core import reading, selection
from attn_core.admission import admit
from attn_core.errors import AttnError, BackendNotUsable, CallRefused
from attn_core.facts import Facts
from attn_core.running import empty_result, with_backward

# Dynamo takes functions from modules and guards each by its name, so the loaded adapters are put into one.
adapters = ModuleType("attn_core.loaded_adapters", "The adapters that compiled code uses, by backend.")
sys.modules[adapters.__name__] = adapters

_ERRORS = {error.__name__: error for error in (CallRefused, BackendNotUsable, AttnError)}


def traced_attention(query: Any, key: Any, value: Any, *, backend: Any, **options: Any) -> Any:
    """Make one call of ``attention`` part of the graph, or raise as the eager call would."""
    reading.check_tensors(query, key, value)
    attn_mask = options["attn_mask"]
    reading.check_mask(attn_mask, query, key)
    autocast = reading.autocast_dtype(query.device.type)
    if autocast is not None:
        query, key, value, attn_mask = (reading.cast(item, autocast) for item in (query, key, value, attn_mask))
    window = options["window_size"]
    if isinstance(window, (tuple, list)):  # an int that varies would be symbolic
        options["window_size"] = tuple(
            constant(side + 1) - 1 if isinstance(side, int) and side >= -1 else side for side in window
        )
    checked = reading.checked_options(options)
    passed = reading.passed_options(checked, attn_mask, constant(query.shape[3]))
    choice = selection.traced_choice() if backend is None else selection.normalized(backend)
    outcome = _resolve(
        choice,
        (query.dtype, key.dtype, value.dtype),
        query.device,
        (constant(query.shape[2]), constant(key.shape[2]), constant(query.shape[3]), constant(value.shape[3])),
        reading.lengths_relation(query.shape[1], key.shape[1]),
        reading.mask_facts(attn_mask, None),
        checked["window_size"],
        {name: option for name, option in checked.items() if name in ("causal", "deterministic", "return_lse")},
        ("softcap" in passed, "dropout_p" in passed, reading.needs_graph(query, key, value, attn_mask)),
    )
    if outcome[0] == "refused":
        raise _ERRORS[outcome[1]](outcome[2])
    if query.shape[0] == 0 or query.shape[1] == 0 or key.shape[1] == 0:
        return empty_result(query, key, value, **passed)
    if autocast is None:
        return _run(outcome[1], outcome[2], query, key, value, passed)
    with torch.autocast(query.device.type, enabled=False):
        return _run(outcome[1], outcome[2], query, key, value, passed)


def _run(name: str, graph: str, query: Any, key: Any, value: Any, passed: dict[str, Any]) -> Any:
    adapter = getattr(adapters, name)
    if graph == "core":
        return with_backward(adapter, query, key, value, **passed)
    result = adapter.forward(query, key, value, **passed)
    return (result[0], result[1].detach()) if passed.get("return_lse") else result


def _plain(side: Any) -> Any:
    return constant(side + 1) - 1 if isinstance(side, int) and side >= -1 else side


def constant(size: Any) -> int:
    """The size as a plain number, which makes the graph specific to it."""
    return len(range(size))


def _resolve(
    choice: Any,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    sizes: tuple[int, int, int, int],
    lengths: str,
    mask: dict[str, Any],
    window_size: Any,
    switches: dict[str, Any],
    presence: tuple[bool, bool, bool],
) -> tuple[str, str, str]:
    """Find the backend while tracing: ("run", where it is, whose graph) or ("refused", which error, why)."""
    heads, key_heads, head_dim, value_head_dim = sizes
    softcap, dropout, backward = presence
    try:
        reading.check_dtypes(dtypes, mask)
        facts = Facts(
            **reading.device_facts(device),
            **mask,
            **switches,
            dtype=reading.dtype_name(dtypes[0]),
            heads=heads,
            key_heads=key_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            lengths=lengths,
            window_size=window_size,
            softcap=softcap,
            dropout=dropout,
            backward=backward,
            vmap=torch._C._are_functorch_transforms_active(),
            forward_mode=torch.autograd.forward_ad._current_level >= 0,
            compiled=True,
        )
        admitted = admit(choice, facts, "backend=, a scope, the process or the environment")
    except AttnError as error:
        kind = type(error).__name__
        return ("refused", kind if kind in _ERRORS else "AttnError", str(error))
    name = re.sub(
        r"\W", "_", f"{admitted.row.distribution}__{admitted.row.name}"
    )  # two wheels may have one of that name
    setattr(adapters, name, admitted.adapter)
    graph = "core" if backward and not admitted.own_graph else "own"
    return ("run", name, graph)


# What torch.compiler.assume_constant_result does, without importing Dynamo for everybody.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
