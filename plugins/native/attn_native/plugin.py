"""Where attn-core finds the backends of this wheel. Imports neither torch nor a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_core.plugin import BackendSpec, hookimpl
from attn_native.specs.accelerators import NPU, XLA
from attn_native.specs.aten import CUDNN, EFFICIENT, FLASH
from attn_native.specs.flex import FLEX
from attn_native.specs.math import MATH
from attn_native.specs.sdpa import NATIVE

if TYPE_CHECKING:
    from collections.abc import Iterator


@hookimpl
def attn_backends() -> Iterator[BackendSpec]:
    """Declare each backend of this wheel."""
    yield NATIVE
    yield FLASH
    yield EFFICIENT
    yield CUDNN
    yield MATH
    yield FLEX
    yield NPU
    yield XLA
