"""The facts of a drawn call, without making its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_core.facts import Facts
from attn_core.options import window_of
from attn_core.reading import device_facts, lengths_relation

if TYPE_CHECKING:
    from attn_core.testing.drawing import Case


def facts_of(case: Case, **changes: Any) -> Facts:
    """Say what constraints would see of the call, were it made.

    Args:
        case: a call that makes sense (``spoiled`` is None).
        changes: facts to replace, such as the platform and the compute capability of a device that is not here.

    Example:
        >>> from attn_core.testing.drawing import Case
        >>> facts_of(Case(heads=(4, 2), causal=True)).gqa
        True
    """
    keys = case.queries if case.keys is None else case.keys
    dtype = _effective(case.dtype, case.autocast)
    gradients = set(case.gradients if case.mode == "grad" else ())
    if case.mask != "float":
        gradients.discard("attn_mask")
    found = {
        **(device_facts(torch.device(case.device)) if "platform" not in changes else {}),
        "dtype": dtype,
        "head_dim": case.dim,
        "value_head_dim": case.dim if case.value_dim is None else case.value_dim,
        "heads": case.heads[0],
        "key_heads": case.heads[1],
        "lengths": lengths_relation(case.queries, keys),
        "causal": case.causal,
        "window_size": None if case.window_size is None else window_of(case.window_size, causal=case.causal),
        "softcap": case.softcap is not None,
        "deterministic": case.deterministic,
        "return_lse": case.return_lse,
        "backward": bool(gradients),
        **_mask_facts(case, keys, gradients),
    }
    return Facts(**{**found, **changes})


def _effective(dtype: str, autocast: str | None) -> str:
    return dtype if autocast is None or dtype == "float64" else autocast


def _mask_facts(case: Case, keys: int, gradients: set[str]) -> dict[str, Any]:
    if case.mask not in ("bool", "float"):
        return {"mask": case.mask}
    full = (case.batch, case.heads[0], case.queries, keys)
    broadcast = tuple(once or size == 1 for once, size in zip(case.mask_once, full, strict=True))
    if case.mask == "bool":
        return {"mask": "bool", "mask_broadcast": broadcast}
    own = case.dtype if case.mask_dtype == "same" else case.mask_dtype
    return {
        "mask": "float",
        "mask_broadcast": broadcast,
        "mask_dtype": _effective(own, case.autocast),
        "mask_gradient": "attn_mask" in gradients,
    }
