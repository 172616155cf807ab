"""How a check ends other than well."""

from __future__ import annotations

from textwrap import dedent
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_core.testing.drawing import Case


class CheckFailed(AssertionError):  # noqa: N818 (it reads as what happened)
    """A backend does not do what it declares.

    Attributes:
        case: the smallest call that shows it, where it is one that ``compare`` can show.
    """

    def __init__(self, message: str, case: Case | None = None) -> None:
        super().__init__(message)
        self.case = case


class NotChecked(Exception):  # noqa: N818 (the same)
    """A check, or a backend as a whole, can't be tried on this machine; says why."""


def snippet(case: Case, backend: str) -> str:
    """Code that shows a failing call, to be pasted into Python.

    >>> from attn_core.testing import Case
    >>> print(snippet(Case(causal=True), "acme"))
    from functools import partial
    from attn_core import attention
    from attn_core.testing import Case, compare
    compare(Case(causal=True), partial(attention, backend='acme'))
    """
    return dedent(
        f"""\
        from functools import partial
        from attn_core import attention
        from attn_core.testing import Case, compare
        compare({case!r}, partial(attention, backend={backend!r}))"""
    )
