"""The names an author of a backend wheel uses: the hook, the record, and what it is made of."""

from __future__ import annotations

from attn_core.declaration import (
    API,
    Approximate,
    BackendSpec,
    Backward,
    CapabilityRange,
    Constraints,
    ContextParallelSupport,
    DeclarationError,
    Exact,
    Needs,
    No,
    Rule,
)
from attn_core.facts import DTYPES, MASKS, PLATFORMS, Facts
from attn_core.hookspec import hookimpl

__all__ = [
    "API",
    "DTYPES",
    "MASKS",
    "PLATFORMS",
    "Approximate",
    "BackendSpec",
    "Backward",
    "CapabilityRange",
    "Constraints",
    "ContextParallelSupport",
    "DeclarationError",
    "Exact",
    "Facts",
    "Needs",
    "No",
    "Rule",
    "hookimpl",
]
