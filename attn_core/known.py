"""What the project knows of wheels that bring backends, installed or not: data, so that no code names a backend."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@cache
def known_wheels() -> Mapping[str, tuple[str, ...]]:
    """Names of backends by the wheel that brings them; the wheel to begin with comes first.

    >>> "native" in known_wheels()["attn-native"]
    True
    """
    from importlib.resources import files
    from json import loads

    found = loads(files("attn_core").joinpath("known_wheels.json").read_text("utf-8"))
    return {wheel: tuple(data["backends"]) for wheel, data in found.items()}


def first_wheel() -> str:
    """The wheel for somebody who has none yet."""
    return next(iter(known_wheels()))
