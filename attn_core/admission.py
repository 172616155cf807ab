"""Which backend runs a kind of call: the names in force, held against each declaration, every reason collected."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_core import loading, registry, requirements
from attn_core.errors import AttnError, BackendNotUsable, CallRefused
from attn_core.selection import VARIABLE, listed

if TYPE_CHECKING:
    from collections.abc import Iterable

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


class Refused(CallRefused):
    """The refusal of one backend, in its parts: several of them say only once who accepts the call."""

    def __init__(self, name: str, reasons: Iterable[str], accepting: Iterable[str]) -> None:
        self.reasons = "; ".join(reasons)
        others = ", ".join(accepting)
        self.step = (
            f"Accepted here by: {others}; choose one with backend= or use_backend"
            if others
            else "No backend that is installed here accepts this call; attn_core.explain(...) has each one's reasons"
        )
        super().__init__(f"{name} refused the call: {self.reasons}. {self.step}")


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
                raise refusal({name: error}, chosen_by, "") from error
            refused[name] = error
            log.info("%s passed over: %s", name, error)
    raise refusal(refused, chosen_by, "can run this call")


def _admit_one(name: str, facts: Facts) -> Admitted:
    row = registry.find(name)
    reasons = refusals(row.spec, facts)  # type: ignore[arg-type]
    if reasons:
        raise Refused(row.name, reasons, admitting(facts, besides=row))
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


def refusal(refused: dict[str, AttnError], chosen_by: str, what: str) -> AttnError:
    """One error of those of each name, none of which could do ``what``."""
    if len(refused) > 1:
        return _together(refused, f"(chosen by {chosen_by}) {what}")
    (error,) = refused.values()
    if not isinstance(error, BackendNotUsable):
        return CallRefused(str(error))
    return BackendNotUsable(f"{chosen_by}: {error}" if VARIABLE in chosen_by else str(error))


def _together(refused: dict[str, AttnError], what: str) -> AttnError:
    errors = refused.values()
    kind = BackendNotUsable if all(isinstance(error, BackendNotUsable) for error in errors) else CallRefused
    shown = {name: error.reasons if isinstance(error, Refused) else error for name, error in refused.items()}
    steps = dict.fromkeys(error.step for error in errors if isinstance(error, Refused))
    lines = [f"  {name}: {reasons}" for name, reasons in shown.items()]
    return kind("\n".join([f"none of {', '.join(refused)} {what}:", *lines, *steps]))
