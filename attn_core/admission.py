"""Which backend runs a kind of call: the names in force, held against each declaration, every reason collected."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_core import loading, registry, requirements
from attn_core.errors import AttnError, BackendNotUsable, CallRefused
from attn_core.selection import VARIABLE, listed

if TYPE_CHECKING:
    from attn_core.declaration import BackendSpec
    from attn_core.facts import Facts
    from attn_core.loading import Adapter
    from attn_core.registry import Row
    from attn_core.selection import Choice

log = logging.getLogger("attn_core")


@dataclass(frozen=True)
class Admitted:
    """A backend that may run the call: its row in the list, and its loaded functions."""

    row: Row
    adapter: Adapter

    @property
    def own_graph(self) -> bool:
        """Whether the adapter's result carries its graph."""
        return self.spec.autograd == "own"

    @property
    def spec(self) -> BackendSpec:
        """The declaration."""
        return self.row.spec  # type: ignore[return-value]


def admit(choice: Choice | None, facts: Facts, chosen_by: str) -> Admitted:
    """Find the first of the names in force whose backend is usable and admits the call.

    Raises:
        BackendNotUsable: no named backend can be used here.
        CallRefused: those that can be used refuse the call; the message has every reason.
    """
    names = listed(choice)
    refused: dict[str, AttnError] = {}
    for name in names:
        try:
            return _admit_one(name, facts)
        except AttnError as error:
            if len(names) > 1 and isinstance(error, BackendNotUsable) and registry.mistyped(name):
                raise
            refused[name] = error
            log.info("%s passed over: %s", name, error)
    raise _refusal(refused, chosen_by)


def _admit_one(name: str, facts: Facts) -> Admitted:
    row = registry.find(name)
    reasons = refusals(row.spec, facts)  # type: ignore[arg-type]
    if reasons:
        others = admitting(facts, besides=row)
        step = (
            f"Accepted here by: {', '.join(others)}; choose one with backend= or use_backend"
            if others
            else ("No backend that is installed here accepts this call; attn_core.explain(...) has each one's reasons")
        )
        msg = f"{row.name} refused the call: {'; '.join(reasons)}. {step}"
        raise CallRefused(msg)
    return Admitted(row, loading.load(row.spec))  # type: ignore[arg-type]


def refusals(spec: BackendSpec, facts: Facts) -> list[str]:
    """Why a backend refuses a call with these facts, from the alternative that comes closest; empty if it admits it."""
    whole = spec.reasons(facts)
    if not whole and not any(item.libraries(facts) for item in spec.alternatives):
        return []
    if facts.compiled and spec.compile is not True:
        return whole
    found = []
    for alternative in spec.alternatives:
        libraries = map(requirements.library_reason, alternative.libraries(facts))
        found.append((alternative.reasons(facts), [reason for reason in libraries if reason]))
    return spec.closest(facts, found)


def admitting(facts: Facts, *, besides: Row) -> list[str]:
    """The exact backends, available here, whose declarations admit the call."""
    return [
        row.name
        for row in registry.rows()
        if row.status == registry.AVAILABLE
        and row.spec is not None
        and row != besides
        and not row.spec.numerics.approximate
        and not refusals(row.spec, facts)
    ]


def _refusal(refused: dict[str, AttnError], chosen_by: str) -> AttnError:
    names, errors = list(refused), list(refused.values())
    unusable = all(isinstance(error, BackendNotUsable) for error in errors)
    kind = BackendNotUsable if unusable else CallRefused
    if len(errors) == 1:
        prefix = f"{VARIABLE}={names[0]}: " if VARIABLE in chosen_by and unusable else ""
        return kind(f"{prefix}{errors[0]}")
    lines = "\n".join(f"  {name}: {error}" for name, error in refused.items())
    return kind(f"none of {', '.join(names)} (chosen by {chosen_by}) can run this call:\n{lines}")
