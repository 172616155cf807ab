"""Launches Triton kernels again without asking Triton which of its compiled kernels is meant.

``kernel[grid](...)`` looks at each argument, and takes longer for that than for the launch. What it finds out is kept here,
by all that it may depend on; where that can't be told, it is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.compiler import CompiledKernel

if TYPE_CHECKING:
    from collections.abc import Sequence

KNOWN = (3, 3) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 10) and torch.version.hip is None
"""Whether compiled kernels of this Triton take all arguments, those known when compiled included, and addresses for tensors,
and are compiled anew for nothing else than ``launch`` knows. Seen in the source of 3.3 to 3.6 and of 3.9."""
DIVISOR = 16
"""Triton compiles anew for an address or a stride that it divides, and for a stride of 1."""
MOST = 2**31
"""Triton counts in 64 bits from here."""

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    programs: int,
    pointers: Sequence[torch.Tensor | None],
    strides: Sequence[int],
    numbers: Sequence[float],
    constants: Sequence[Any],
    warps: int,
) -> None:
    """Launch a kernel on the current device, which is that of the tensors.

    Args:
        kernel: of ``triton.jit``, of a module; its parameters are those that follow, in this order.
        programs: how many.
        pointers: tensors, or None.
        strides: whole numbers for which Triton may compile anew.
        numbers: those for which it does not; the kernel names them as ``do_not_specialize``.
        constants: the ``constexpr`` ones.
        warps: of a program.
    """
    addresses: list[int | None] = []
    kind: list[Any] = [id(kernel), warps]  # its own hash is that of its source
    bits = all_strides = 0
    for pointer in pointers:
        if pointer is None:
            addresses.append(None)
            kind.append(None)
        else:
            address = pointer.data_ptr()
            bits |= address
            addresses.append(address)
            kind.append(pointer.dtype)
    for stride in strides:
        all_strides |= stride
    if (bits | all_strides) % DIVISOR or not 0 <= all_strides < MOST:
        kernel[programs,](*pointers, *strides, *numbers, *constants, num_warps=warps)
        return
    device = pointers[0].get_device()  # type: ignore[union-attr] # the first one is always there
    key = (device, *kind, *constants)
    if (compiled := _compiled.get(key)) is not None:
        compiled[programs, 1, 1](*addresses, *strides, *numbers, *constants)
        return
    compiled = kernel[programs,](*pointers, *strides, *numbers, *constants, num_warps=warps)
    if KNOWN and isinstance(compiled, CompiledKernel):  # interpreted, there is none
        _compiled[key] = compiled
