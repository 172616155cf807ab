"""Where attn-core finds the backends of this wheel. Imports neither torch nor sageattention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_core.plugin import hookimpl
from attn_sage.declarations import FP8_CUDA, FP8_SM90, FP16_CUDA, FP16_TRITON, SAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attn_core.plugin import BackendSpec


@hookimpl
def attn_backends() -> Iterator[BackendSpec]:
    """Declare each backend of this wheel."""
    yield SAGE
    yield FP16_TRITON
    yield FP16_CUDA
    yield FP8_CUDA
    yield FP8_SM90
