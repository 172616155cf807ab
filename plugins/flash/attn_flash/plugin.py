"""Where attn-core finds the backends of this wheel. Imports neither torch nor a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_core.plugin import BackendSpec, hookimpl
from attn_flash.specs import FLASH, FLASH_3, FLASH_4

if TYPE_CHECKING:
    from collections.abc import Iterator


@hookimpl
def attn_backends() -> Iterator[BackendSpec]:
    """Declare each backend of this wheel."""
    yield FLASH
    yield FLASH_3
    yield FLASH_4
