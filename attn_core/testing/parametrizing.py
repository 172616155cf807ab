"""The kit under pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_core import registry
from attn_core.outcomes import EXCUSED, FAILED, NOT_CHECKED, WARNED
from attn_core.testing.checking import Check, checks_of
from attn_core.testing.kit import Excuses, run_check, wrong_excuses
from attn_core.testing.outcomes import NotChecked
from attn_core.testing.subject import Subject, subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class KitWarning(UserWarning):
    """A backend fails a check that is new in this release of the kit, and will fail it in the next."""


class BoundCheck:
    """A check of one backend, as a test calls it: without arguments."""

    def __init__(
        self,
        name: str,
        check: Check | None,
        problem: str,
        excuses: Excuses,
        settings: dict[str, Any],
        label: str = "excuses",
    ) -> None:
        self.name = name
        self.label = label
        self.check = check
        self.problem = problem
        self.excuses = excuses
        self.settings = settings

    @property
    def identifier(self) -> str:
        """Such as "acme-causal", as pytest shows it."""
        return f"{self.name}-{self.label if self.check is None else self.check.identifier}"

    def __call__(self) -> None:
        """Run it: returns where it passes, skips where it can't be tried here, xfails where excused, raises where it fails."""
        import pytest

        if self.check is None:
            pytest.fail(self.problem, pytrace=False)
        try:
            tested = _subject(self.name, **self.settings)
        except NotChecked as why:
            pytest.skip(f"not checked: {why}")
        outcome = run_check(self.check, tested, self.excuses)
        if outcome.status == NOT_CHECKED:
            pytest.skip(f"not checked: {outcome.detail}")
        if outcome.status == EXCUSED:
            pytest.xfail(outcome.detail)
        if outcome.status == WARNED:
            import warnings

            warnings.warn(f"{self.identifier}: {outcome.detail}", KitWarning, stacklevel=2)
        if outcome.status == FAILED:
            pytest.fail("\n".join(filter(None, (outcome.detail, outcome.snippet))), pytrace=False)


_subjects: dict[object, Subject] = {}


def _subject(name: str, **settings: Any) -> Subject:
    """Once for all checks of a backend, since what is drawn for it takes a while to find."""
    kind = (name, *sorted(settings.items()))
    if kind not in _subjects or _subjects[kind].row is not registry.meant(name):
        _subjects[kind] = subject(name, **settings)
    return _subjects[kind]


def parametrize_with_checks(
    *names: str,
    excuses: Excuses | None = None,
    device: str | None = None,
    seed: int = 0,
    quick: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a pytest test of each check that the declarations of these backends ask for.

    Args:
        names: backends; of installed wheels, since the checks come from the declarations.
        excuses: ``{check: reason}`` for failures that are known; strict: an unknown check, an excuse that is no longer needed, or
            one without a reason, fails.
        device: such as "cuda"; the fastest of this machine that a backend declares where not given.
        seed: where all choices come from.
        quick: fewer calls.

    Returns:
        A decorator of a function of ``check``, which calls it. A check that can't be tried on this machine is skipped with
        the reason.

    Raises:
        BackendNotUsable: nobody has a name, or several.

    Example:
        >>> @parametrize_with_checks("native_math", quick=True)
        ... def test_native_math(check):
        ...     check()
    """
    import pytest

    settings = {"device": device, "seed": seed, "quick": quick}
    bound = [item for name in names for item in _bound(name, excuses or {}, settings)]
    return pytest.mark.parametrize("check", bound, ids=[item.identifier for item in bound])


def _bound(name: str, excuses: Excuses, settings: dict[str, Any]) -> Iterator[BoundCheck]:
    row = registry.meant(name)
    if row.spec is None:
        yield BoundCheck(name, None, str(row), excuses, settings, "declaration")
        return
    for problem in wrong_excuses(row.name, row.spec, excuses):
        yield BoundCheck(name, None, f"{problem.check}: {problem.detail}", excuses, settings)
    for check in checks_of(row.spec):
        yield BoundCheck(name, check, "", excuses, settings)
