"""Launches Triton kernels again without asking Triton which of its compiled kernels is meant.

``kernel[grid](...)`` looks at each argument, and takes longer for that than for the launch. What it finds out is kept here,
by all that it may depend on; where that can't be told, it is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.compiler import CompiledKernel

from attn_core.errors import CallRefused

if TYPE_CHECKING:
    from collections.abc import Sequence

KNOWN = (3, 3) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 10) and torch.version.hip is None
"""Whether compiled kernels of this Triton take all arguments, those known when compiled included, and addresses for tensors,
and are compiled anew for nothing else than ``launch`` knows but what somebody who looks for faults may set: ``debug``, a mode of
instrumentation, and hooks of stages or of a kernel. They are heeded where they are set before the first call. Seen in the
source of 3.3 to 3.6, of 3.8 and of 3.9."""
DIVISOR = 16
"""Triton compiles anew for an address or a whole number that it divides, and for a number of 1."""
HALF = 2**31
"""Triton counts in 64 bits from here, and below its negative."""
MOST = 4096
"""So many launches are kept by all that they are given, addresses left out; a key is 1 or 2 KB."""

_compiled: dict[tuple[Any, ...], Any] = {}
"""By what Triton compiles anew for."""
_repeated: dict[tuple[Any, ...], Any] = {}
"""By the arguments themselves, which is looked up sooner than what they are to Triton is found out."""
_RUNTIME = triton.knobs.runtime if hasattr(triton, "knobs") else CompiledKernel
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _: None)  # noqa: SLF001 - as Triton asks it


class Part:
    """What is in an allocation from some byte on, where a tensor would take as long to make as the allocation.

    Args:
        allocation: of bytes, one dimension.
        address: of the allocation.
        first: the byte.
        dtype: of what is there.
    """

    __slots__ = ("_address", "_allocation", "_first", "dtype")

    def __init__(self, allocation: torch.Tensor, address: int, first: int, dtype: torch.dtype) -> None:
        self._allocation = allocation
        self._address = address + first
        self._first = first
        self.dtype = dtype

    def data_ptr(self) -> int:
        """Where it is."""
        return self._address

    def tensor(self) -> torch.Tensor:
        """It and what follows."""
        return self._allocation[self._first :].view(self.dtype)


def launch(
    kernel: Any,
    device: int,
    grid: tuple[int, int, int],
    pointers: Sequence[torch.Tensor | Part | None],
    others: tuple[Any, ...],
    warps: int | None = None,
    stages: int | None = None,
) -> None:
    """Launch a kernel on the current device and its current stream.

    Args:
        kernel: of ``triton.jit``, of a module; its parameters are pointers and others, in this order. It is known by its
            identity, since its own hash is that of its source.
        device: the current one, which the pointers are of.
        grid: how many programs.
        pointers: tensors, parts of allocations, or None.
        others: all other arguments, the ``constexpr`` ones included.
        warps: of a program; None for what Triton takes.
        stages: how many loads are under way at once; so too.

    Raises:
        CallRefused: a CUDA graph is being captured, and the kernel would have to be compiled first.
    """
    addresses: list[int | None] = []
    dtypes: list[torch.dtype | None] = []
    bits = 0
    for pointer in pointers:
        if pointer is None:
            addresses.append(None)
            dtypes.append(None)
        else:
            address = pointer.data_ptr()
            bits |= address
            addresses.append(address)
            dtypes.append(pointer.dtype)
    addressed = (id(kernel), device, warps, stages, bits % DIVISOR and _divided(addresses), *dtypes)
    key = (addressed, others, *map(type, others))  # 1, 1.0 and True are equal, and not the same to Triton
    compiled = _repeated.get(key)
    if compiled is None:
        compiled = _found(kernel, key, grid, pointers, others, warps, stages)
        if compiled is None:
            return
    if _hooked():
        compiled[grid](*addresses, *others, stream=_stream(device))
        return
    run, stream = compiled.run, _stream(device)
    run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *others)


def _hooked() -> bool:
    """Whether anybody is to hear of launches; what tells them is made for each, and takes longer than a launch."""
    return bool(getattr(_RUNTIME.launch_enter_hook, "calls", True) or getattr(_RUNTIME.launch_exit_hook, "calls", True))


def _found(
    kernel: Any,
    key: tuple[Any, ...],
    grid: tuple[int, int, int],
    pointers: Sequence[torch.Tensor | Part | None],
    others: tuple[Any, ...],
    warps: int | None,
    stages: int | None,
) -> Any:
    """The compiled kernel; or None where Triton had to be asked, which has launched it."""
    if not KNOWN or not hasattr(kernel, "params"):
        _searched(kernel, grid, pointers, others, warps, stages)
        return None
    kind = (key[0], *map(_kind, kernel.params[len(pointers) :], others))
    if (compiled := _compiled.get(kind)) is None:
        if torch.cuda.is_current_stream_capturing():
            msg = (
                "attn-sage refused the call: a CUDA graph is being captured, and a kernel of Triton that calls of this length, "
                "layout and alignment need is not compiled yet. Next: make the same call once before the capture"
            )
            raise CallRefused(msg)
        compiled = _searched(kernel, grid, pointers, others, warps, stages)
        if isinstance(compiled, CompiledKernel):  # interpreted, there is none
            _compiled[kind] = compiled
        return None
    if len(_repeated) >= MOST:
        _repeated.clear()
    _repeated[key] = compiled
    return compiled


def _searched(
    kernel: Any,
    grid: tuple[int, int, int],
    pointers: Sequence[torch.Tensor | Part | None],
    others: tuple[Any, ...],
    warps: int | None,
    stages: int | None,
) -> Any:
    options = {} if warps is None else {"num_warps": warps}
    if stages is not None:
        options["num_stages"] = stages
    tensors = [pointer.tensor() if isinstance(pointer, Part) else pointer for pointer in pointers]
    return kernel[grid](*tensors, *others, **options)


def _divided(addresses: Sequence[int | None]) -> tuple[bool, ...]:
    return tuple(address is not None and address % DIVISOR == 0 for address in addresses)


def _kind(parameter: Any, value: Any) -> tuple[Any, ...]:
    """What Triton compiles anew for in an argument that is no pointer."""
    kind = type(value)
    if parameter.is_constexpr:
        return kind, value
    if kind is int:
        bits = 32 if -HALF <= value < HALF else 64 if value < 2 * HALF**2 else 65
        if parameter.do_not_specialize:
            return kind, bits
        return kind, bits, value == 1, value % DIVISOR == 0
    return (kind,) if value is None or kind in (bool, float) else (kind, value)
