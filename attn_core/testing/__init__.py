"""What backends are held to: the float64 reference, the tolerances stated against it, and calls drawn at random."""

from __future__ import annotations

from attn_core.testing.comparing import compare
from attn_core.testing.drawing import Case, draw
from attn_core.testing.reference import reference
from attn_core.testing.tolerances import Bounds, assert_close, bounds, tolerance

__all__ = ["Bounds", "Case", "assert_close", "bounds", "compare", "draw", "reference", "tolerance"]
