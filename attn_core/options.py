"""The options of a call, checked: numbers that are numbers, switches that are switches."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any

from attn_core.errors import CallRefused

UNLIMITED = -1
_LONGEST = 2**31 - 1  # a window beyond this limits nothing, and kernels count in 32 bits


def number(label: str, value: Any, accepted: str) -> float:
    """A finite Python float from an int, a float or a numpy scalar.

    >>> number("scale", 2, "a finite number")
    2.0
    """
    try:
        found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else inf
    except OverflowError:  # an int of hundreds of digits
        found = inf
    if -inf < found < inf:
        return found
    msg = f"{label}: found {_shown(value)}; accepted: {accepted}"
    raise CallRefused(msg)


def scale_of(value: Any) -> float:
    """The scale as given; 0 and negative numbers included."""
    return number("scale", value, "a finite number, or None for 1/sqrt(head_dim)")


def softcap_of(value: Any) -> float:
    """The softcap c of ``c * tanh(scores / c)``, above 0."""
    cap = number("softcap", value, "a finite number above 0, or None for no softcap")
    if cap > 0:
        return cap
    msg = f"softcap: found {value!r}; accepted: a finite number above 0, or None for no softcap"
    raise CallRefused(msg)


def dropout_of(value: Any) -> float:
    """The probability to drop, in [0, 1)."""
    accepted = "a probability from 0 up to, but not, 1"
    probability = number("dropout_p", value, accepted)
    if 0 <= probability < 1:
        return probability
    msg = f"dropout_p: found {value!r}; accepted: {accepted}"
    raise CallRefused(msg)


def switch(label: str, value: Any) -> bool:
    """True or False; 1 and 0, which compare equal to them, count as such.

    >>> switch("causal", 1)
    True
    """
    if (
        isinstance(value, bool)
        or (isinstance(value, Real) and value in (0, 1))
        or type(value).__name__ in ("bool_", "bool")
    ):
        return bool(value)
    msg = f"{label}: found {_shown(value)}; accepted: True or False"
    raise CallRefused(msg)


def window_of(value: Any, *, causal: bool) -> tuple[int, int] | None:
    """The window as (left, right), -1 unlimited; None when it limits nothing. Under causal the right side is 0.

    >>> window_of((4, -1), causal=True), window_of((-1, 3), causal=True)
    ((4, 0), None)
    """
    accepted = "None, or (left, right) in whole keys from 0 up, -1 for unlimited"
    sides = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sides) != 2 or not all(_is_window_side(side) for side in sides):
        msg = f"window_size: found {_shown(value)}; accepted: {accepted}"
        raise CallRefused(msg)
    left, right = (int(side) if side <= _LONGEST else UNLIMITED for side in sides)
    if causal:
        return None if left == UNLIMITED else (left, 0)
    return None if left == right == UNLIMITED else (left, right)


def _is_window_side(side: Any) -> bool:
    if isinstance(side, bool) or not isinstance(side, Real):
        return False
    return bool(side >= UNLIMITED and side < inf and side == int(side))  # type: ignore[operator, call-overload]


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    return f"{value!r} ({type(value).__name__})"
