"""Where attn-core finds the backends of this wheel. Imports neither torch nor a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_core.plugin import BackendSpec, hookimpl
from attn_xformers.specs import CUTLASS, FLASH, SPLITK, XFORMERS

if TYPE_CHECKING:
    from collections.abc import Iterator


@hookimpl
def attn_backends() -> Iterator[BackendSpec]:
    """Declare each backend of this wheel."""
    yield XFORMERS
    yield CUTLASS
    yield FLASH
    yield SPLITK
