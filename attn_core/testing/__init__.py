"""What backends are held to: the float64 reference, the tolerances stated against it, and the checks of the kit."""

from __future__ import annotations

from attn_core.outcomes import Outcome
from attn_core.testing.checking import KIT, Check, checks_of
from attn_core.testing.comparing import compare
from attn_core.testing.drawing import Case, draw
from attn_core.testing.kit import check_backend
from attn_core.testing.outcomes import CheckFailed, NotChecked
from attn_core.testing.parametrizing import KitWarning, parametrize_with_checks
from attn_core.testing.rechecking import recheck
from attn_core.testing.reference import reference
from attn_core.testing.subject import Subject, subject
from attn_core.testing.tolerances import Bounds, assert_close, bounds, tolerance

__all__ = [
    "KIT",
    "Bounds",
    "Case",
    "Check",
    "CheckFailed",
    "KitWarning",
    "NotChecked",
    "Outcome",
    "Subject",
    "assert_close",
    "bounds",
    "check_backend",
    "checks_of",
    "compare",
    "draw",
    "parametrize_with_checks",
    "recheck",
    "reference",
    "subject",
    "tolerance",
]
