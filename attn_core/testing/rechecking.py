"""Shows the failure of a check that changes tensors, or calls several times, by the one call that it starts from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from attn_core.guard import Raised, attempt
from attn_core.testing.checking import checks_of
from attn_core.testing.outcomes import NotChecked
from attn_core.testing.shrinking import shrink
from attn_core.testing.subject import Subject, subject

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attn_core.testing.checking import Check
    from attn_core.testing.drawing import Case

SECONDS = 3.0
"""How long a smaller call is looked for: each try runs the check again."""


@dataclass(frozen=True)
class _Given(Subject):
    """A subject for which one call is drawn, whatever a check asks for."""

    case_given: Any = None

    def draw(self, *_: Any, where: Callable[[Case], bool] | None = None, **__: Any) -> list[Case]:
        """The call, where it is what the check wants."""
        if not self.admits(self.case_given) or not (where is None or where(self.case_given)):
            msg = f"the check makes no such call: {self.case_given!r}"
            raise NotChecked(msg)
        return [self.case_given]


def _run(check: Check, tested: Subject, case: Case) -> str | None:
    given = _Given(tested.row, tested.device, tested.seed, quick=False, case_given=case)
    known = {name: value for name, value in vars(tested).items() if name not in vars(given)}
    vars(given).update(known)  # what was found out about the backend, which takes a while
    return check(given)


def recheck(check: str, case: Case, backend: str) -> str | None:
    """Run a check on one call instead of those that it draws.

    Args:
        check: its identifier.
        case: the call.
        backend: a name, an alias or ``distribution:name``.

    Returns:
        What was tried, in a line.

    Raises:
        AssertionError: the backend fails it.
        NotChecked: the backend has no such check, or the check makes no such call.

    Example:
        >>> from attn_core.testing import Case
        >>> recheck("nan-and-inf", Case(queries=3), "native_math")
        '5 calls'
    """
    tested = subject(backend, device=case.device)
    found = next((item for item in checks_of(tested.spec) if item.identifier == check), None)
    if found is None:
        msg = f"{backend} declares nothing that the check {check!r} is for"
        raise NotChecked(msg)
    return _run(found, tested, case)


def smallest(check: Check, tested: Subject, drawn: Sequence[Case], error: BaseException) -> Case | None:
    """The smallest call found, among those drawn and smaller ones, on which a check fails with such an error; or None."""
    end = time.monotonic() + SECONDS

    def fails(case: Case) -> bool:
        if time.monotonic() > end or not tested.alive():
            return False
        found = attempt(partial(_run, check, tested, case))
        return isinstance(found, Raised) and type(found.error) is type(error)

    case = next(filter(fails, drawn), None)
    return None if case is None else shrink(case, lambda smaller: tested.admits(smaller) and fails(smaller))


def snippet(check: str, case: Case, backend: str) -> str:
    """Code that shows it, to be pasted into Python.

    >>> from attn_core.testing import Case
    >>> print(snippet("nan-and-inf", Case(queries=3), "acme"))
    from attn_core.testing import Case, recheck
    recheck('nan-and-inf', Case(queries=3), 'acme')
    """
    return f"from attn_core.testing import Case, recheck\nrecheck({check!r}, {case!r}, {backend!r})"
