"""The call inside code that torch.compile is tracing: the same checks, made once, while tracing.

Nothing here is remembered between traces, and nothing that eager calls remember is read: Dynamo would guard on it and
compile again at each new kind of call. What was decided is guarded by the facts that the trace itself looks at.
"""

from __future__ import annotations

import itertools
import re
import sys
from types import ModuleType
from typing import Any

import torch

from attn_core import reading, selection
from attn_core.admission import admit
from attn_core.errors import AttnError, BackendNotUsable, CallRefused
from attn_core.facts import Facts
from attn_core.parallel import scope
from attn_core.running import empty_result, with_backward

# Dynamo takes functions from modules and guards each by its name, so the loaded adapters are put into one.
adapters = ModuleType("attn_core.loaded_adapters", "The adapters that compiled code uses, by backend.")
sys.modules[adapters.__name__] = adapters

_TRACES_GUARD_SCALAR = torch.__version__ >= "2.8"
"""Whether Dynamo knows torch's own way to make a number that varies a constant; torch 2.6 does not."""

ERRORS = {error.__name__: error for error in (CallRefused, BackendNotUsable, AttnError)}


over_ranks: Any = None
"""What makes a call over ranks part of the graph: ``attn_core.parallel`` sets it, without which there are no ranks."""


def traced_attention(query: Any, key: Any, value: Any, *, backend: Any, parallel: Any, **options: Any) -> Any:
    """Make one call of ``attention`` part of the graph, or raise as the eager call would."""
    identity = scope.traced_identity() if parallel is None else _identity(parallel)
    reading.check_tensors(query, key, value)
    attn_mask = options["attn_mask"]
    if identity is None:
        reading.check_mask(attn_mask, query, key)
    autocast = reading.autocast_dtype(query.device.type)
    if autocast is not None:
        query, key, value, attn_mask = (reading.cast(item, autocast) for item in (query, key, value, attn_mask))
    window = options["window_size"]
    if isinstance(window, (tuple, list)):  # an int that varies would be symbolic
        options["window_size"] = tuple(
            constant(side + 1) - 1 if isinstance(side, int) and side >= -1 else side for side in window
        )
    softcap, dropout_p = options["softcap"], options["dropout_p"]
    # what is refused is written out, as no symbolic number can be
    if isinstance(softcap, (int, float)) and not softcap > 0:
        options["softcap"] = plain(float(softcap))
    if isinstance(dropout_p, (int, float)) and not 0 <= dropout_p < 1:
        options["dropout_p"] = plain(float(dropout_p))
    checked = reading.checked_options(options)
    choice = selection.traced_choice() if backend is None else selection.normalized(backend)
    chosen_by = selection.FROM_ELSEWHERE if backend is None else "backend="
    if autocast is None:
        return _compute(identity, query, key, value, attn_mask, checked, choice, chosen_by)
    with torch.autocast(query.device.type, enabled=False):
        return _compute(identity, query, key, value, attn_mask, checked, choice, chosen_by)


def _compute(
    identity: Any, query: Any, key: Any, value: Any, attn_mask: Any, checked: Any, choice: Any, chosen_by: str
) -> Any:
    if identity is None:
        return attend(query, key, value, attn_mask, checked, choice)
    reading.check_dtypes((query.dtype, key.dtype, value.dtype), reading.mask_facts(attn_mask, None))
    return over_ranks(identity, query, key, value, attn_mask, checked, (choice, chosen_by))


def _identity(parallel: Any) -> Any:
    identity = getattr(parallel, "identity", None)
    if identity is None:
        msg = f"parallel: found {parallel!r}; accepted: a ContextParallel of attn_core.parallel, or None"
        raise CallRefused(msg)
    return identity


def attend(query: Any, key: Any, value: Any, attn_mask: Any, checked: dict[str, Any], choice: Any) -> Any:
    """The call on this rank, of tensors that autocast has no more to do with."""
    passed = reading.passed_options(checked, attn_mask, constant(query.shape[3]))
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
        raise ERRORS[outcome[1]](outcome[2])
    if query.shape[0] == 0 or query.shape[1] == 0 or key.shape[1] == 0:
        return empty_result(query, key, value, **passed)
    return _run(outcome[1], outcome[2], query, key, value, passed)


def _run(name: str, graph: str, query: Any, key: Any, value: Any, passed: dict[str, Any]) -> Any:
    adapter = getattr(adapters, name)
    if graph == "core":
        return with_backward(adapter, query, key, value, **passed)
    result = adapter.forward(query, key, value, **passed)
    return (result[0], result[1].detach()) if passed.get("return_lse") else result


def plain(option: Any) -> Any:
    """An option as a plain number, if it is a number that varies."""
    if not isinstance(option, float):
        return option
    if _TRACES_GUARD_SCALAR:
        return torch.fx.experimental.symbolic_shapes.guard_scalar(option)
    # Dynamo makes the key of a group a constant, and guards it
    return next(itertools.groupby((option,), key=_itself))[0]


def _itself(option: Any) -> Any:
    return option


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
        vmap, forward_mode = transforms()
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
            vmap=vmap,
            forward_mode=forward_mode,
            compiled=True,
        )
        admitted = admit(choice, facts, f"backend=, {selection.FROM_ELSEWHERE}")
    except AttnError as error:
        kind = type(error).__name__
        return ("refused", kind if kind in ERRORS else "AttnError", str(error))
    name = re.sub(
        r"\W", "_", f"{admitted.row.distribution}__{admitted.row.name}"
    )  # two wheels may have one of that name
    setattr(adapters, name, admitted.adapter)
    graph = "core" if backward and not admitted.own_graph else "own"
    return ("run", name, graph)


def transforms() -> tuple[bool, bool]:
    """Whether transforms of ``torch.func``, and forward-mode differentiation, reach what is traced."""
    return torch._C._are_functorch_transforms_active(), torch.autograd.forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result does, without importing Dynamo for everybody.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
