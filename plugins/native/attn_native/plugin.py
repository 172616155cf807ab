"""Where attn-core finds the backends of this wheel. Imports neither torch nor a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_core.plugin import BackendSpec, hookimpl
from attn_native.specs import aten, flex, math, sdpa

if TYPE_CHECKING:
    from collections.abc import Iterator


@hookimpl
def attn_backends() -> Iterator[BackendSpec]:
    """Declare each backend of this wheel."""
    yield sdpa.NATIVE
    yield aten.FLASH
    yield aten.EFFICIENT
    yield aten.CUDNN
    yield math.MATH
    yield flex.FLEX
