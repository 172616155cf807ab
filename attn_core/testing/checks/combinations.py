"""All options together: a covering set, in which each pair of admitted values meets in at least one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_core.testing.checking import check
from attn_core.testing.outcomes import NotChecked
from attn_core.testing.subject import PREFERRED, undrawn

if TYPE_CHECKING:
    from attn_core.declaration import BackendSpec
    from attn_core.testing.subject import Subject


def _dtypes(spec: BackendSpec) -> list[str]:
    declared = {name for item in spec.alternatives for name in item.dtypes or ()}
    return [*(name for name in PREFERRED if name in declared), *sorted(declared - set(PREFERRED))]


@check("combinations", each=_dtypes)
def combinations(subject: Subject, dtype: str) -> str:
    """Every two values of options, masks, sizes, strides and modes meet in a call, and each call is right."""
    if dtype not in PREFERRED:
        raise NotChecked(undrawn([dtype]))
    cases = [case for case in subject.combinations.cases if case.dtype == dtype]
    if not cases:
        msg = f"it does not declare {dtype} for {subject.device}"
        raise NotChecked(msg)
    return f"{subject.hold(cases)}, of {subject.combinations}"
