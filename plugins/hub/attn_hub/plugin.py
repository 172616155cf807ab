"""Where attn-core finds the backends of this wheel. Imports neither torch nor ``kernels``, and looks at no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_core.plugin import hookimpl
from attn_hub.declarations import AITER, FLASH, FLASH_3, FLASH_4, SAGE_BLACKWELL, SAGE_HUB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attn_core.plugin import BackendSpec


@hookimpl
def attn_backends() -> Iterator[BackendSpec]:
    """Declare each backend of this wheel."""
    yield FLASH
    yield FLASH_3
    yield FLASH_4
    yield SAGE_HUB
    yield SAGE_BLACKWELL
    yield AITER
