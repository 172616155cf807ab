"""Runs the checks of backends, and gives what came out as data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from attn_core import registry
from attn_core.guard import Raised, attempt, plain
from attn_core.loading import refuses_itself
from attn_core.outcomes import EXCUSED, FAILED, NOT_CHECKED, PASSED, WARNED, Outcome
from attn_core.testing import rechecking
from attn_core.testing.checking import Check, checks_of
from attn_core.testing.outcomes import CheckFailed, NotChecked, snippet
from attn_core.testing.subject import Subject, subject
from attn_core.testing.surroundings import USUAL, unusual

if TYPE_CHECKING:
    from attn_core.declaration import BackendSpec

Excuses = Mapping[str, str]
"""For a check's identifier, why its failure is known and accepted."""


def run_check(check: Check, tested: Subject, excuses: Excuses | None = None) -> Outcome:
    """Run one check; what it raises becomes its outcome."""
    if not tested.alive():
        detail = "an earlier check left the device unusable for this process"
        return Outcome(backend=tested.row.name, check=check.identifier, status=NOT_CHECKED, detail=detail)
    tested.drawn.clear()
    start = time.perf_counter()
    with unusual(tested.device, USUAL):  # what a check leaves behind is nothing that the next one starts from
        outcome = attempt(partial(check, tested))
    seconds = time.perf_counter() - start
    told = partial(Outcome, backend=tested.row.name, check=check.identifier, seconds=seconds)
    reason = (excuses or {}).get(check.identifier)
    if not isinstance(outcome, Raised):
        if reason is None:
            return told(status=PASSED, detail=outcome.value or "")
        return told(status=FAILED, detail=f"the excuse is no longer needed, the check passes; remove it: {reason}")
    if isinstance(outcome.error, NotChecked) or refuses_itself(outcome.error):
        return told(status=NOT_CHECKED, detail=str(outcome.error))
    detail = str(outcome.error) if isinstance(outcome.error, AssertionError) else f"raises {outcome}"
    if reason is not None:
        return told(status=EXCUSED, detail=f"{reason} ({plain(detail)})")
    code = _shown(check, tested, outcome.error)
    return told(status=WARNED if check.definition.new else FAILED, detail=detail, snippet=code)


def _shown(check: Check, tested: Subject, error: BaseException) -> str:
    """Code that shows a failure: the call, or where that alone does not show it, the check on that call; "" without one."""
    name = tested.row.qualified_name
    if isinstance(error, CheckFailed) and error.case is not None:
        return snippet(error.case, name)
    with unusual(tested.device, USUAL):
        case = rechecking.smallest(check, tested, tuple(tested.drawn), error)
    return "" if case is None else rechecking.snippet(check.identifier, case, name)


def check_backend(
    name: str,
    *,
    device: str | None = None,
    seed: int = 0,
    quick: bool = False,
    excuses: Excuses | None = None,
    only: Callable[[str], bool] | None = None,
) -> Iterator[Outcome]:
    """Hold a backend to everything that it declares; outcomes come as they are had.

    Args:
        name: a name, an alias or ``distribution:name``.
        device: such as "cuda"; the fastest of this machine that it declares where not given.
        seed: where all choices come from.
        quick: fewer calls.
        excuses: ``{check: reason}``, strict: an unknown check, an excuse that is no longer needed, or one without a reason,
            fails.
        only: which identifiers to run.

    Raises:
        BackendNotUsable: nobody has that name, or several.

    Example:
        >>> {outcome.status for outcome in check_backend("native_math", quick=True, only="causal".__eq__)}
        {'passed'}
    """
    row = registry.meant(name)
    excuses = excuses or {}
    if row.spec is not None:
        yield from wrong_excuses(row.name, row.spec, excuses)
    try:
        tested = subject(name, device=device, seed=seed, quick=quick)
    except NotChecked as why:
        if row.status == registry.BROKEN:  # its declaration raises, which is nothing of this machine
            yield Outcome(backend=row.name, check="declaration", status=FAILED, detail=str(why))
            return
        yield Outcome(backend=row.name, check="", status=NOT_CHECKED, detail=str(why))
        return
    loads = attempt(lambda: tested.adapter)
    for check in checks_of(tested.spec):
        if only is not None and not only(check.identifier):
            continue
        if isinstance(loads, Raised) and check.identifier != "loads":
            yield Outcome(backend=row.name, check=check.identifier, status=NOT_CHECKED, detail="it does not load")
            continue
        yield run_check(check, tested, excuses)


def wrong_excuses(name: str, spec: BackendSpec, excuses: Excuses) -> list[Outcome]:
    """A failure for each excuse that is for no check of this declaration, or that gives no reason."""
    known = {check.identifier for check in checks_of(spec)}
    found = {identifier: f"an excuse for no check that there is: {reason}" for identifier, reason in excuses.items()}
    unexplained = {
        identifier: "an excuse without a reason" for identifier, reason in excuses.items() if not reason.strip()
    }
    wrong = {**{identifier: detail for identifier, detail in found.items() if identifier not in known}, **unexplained}
    return [
        Outcome(backend=name, check=identifier, status=FAILED, detail=detail) for identifier, detail in wrong.items()
    ]
