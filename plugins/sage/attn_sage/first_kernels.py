"""The three kernels of sageattention 1.0.6, launched as its own functions launch them, but for Triton's search.

``sageattn`` is what defines the result; this is for the CPU's sake, and only where its source is the one that was read.
"""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from attn_sage import launching
from attn_sage.launching import Part, launch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

QUERIES = 128
"""The rows of a query that share a scale, and that a program attends for."""
KEYS = 64
"""The rows of a key that share one."""
LOG2_E = 1.44269504
"""As the library writes it."""
MODULES = (
    "core",
    "quant_per_block",
    "quant_per_block_hd96",
    "attn_qk_int8_per_block",
    "attn_qk_int8_per_block_causal",
    "attn_qk_int8_per_block_h96",
    "attn_qk_int8_per_block_h96_causal",
)
SOURCE = "448df0de2f37593e938284e8efb69396a294ae17f394fc3459f827f41c252315"
"""SHA-256 of the files of these modules, one after another, in 1.0.6."""


class Kernels(NamedTuple):
    """What a call of some head dim is launched with.

    Attributes:
        quantise: rows to int8 and their scales.
        attend: with what is quantised.
        stage: a constant of ``attend``.
        warps: of it.
        stages: of it.
        flat: whether its grid has sequences and heads in one dimension, and its parameters their number before the lengths.
    """

    quantise: Any
    attend: Any
    stage: int
    warps: int
    stages: int
    flat: bool


def kernels(function: Any) -> dict[tuple[int, bool], Kernels] | None:
    """The kernels by head dim and whether causal; None where anything is not as it is known, and ``function`` is called.

    Args:
        function: the library's ``sageattn``.
    """
    if not launching.KNOWN:
        return None
    try:
        modules = [import_module(f"sageattention.{name}") for name in MODULES]
        source = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    except (ImportError, OSError):
        return None
    if hashlib.sha256(source).hexdigest() != SOURCE or function is not modules[0].sageattn:
        return None
    found = of_modules(modules[1:])
    compiled = all(
        isinstance(kernel, JITFunction) for each in found.values() for kernel in (each.quantise, each.attend)
    )
    return found if compiled else None  # else interpreted


def of_modules(modules: Sequence[ModuleType]) -> dict[tuple[int, bool], Kernels]:
    """The kernels that are in modules of the library, ``MODULES`` but for the first."""
    quantise, quantise_96 = (module.quant_per_block_int8_kernel for module in modules[:2])
    plain, causal, plain_96, causal_96 = (module._attn_fwd for module in modules[2:])  # noqa: SLF001
    return {
        (64, False): Kernels(quantise, plain, 1, 4, 3, flat=False),
        (64, True): Kernels(quantise, causal, 3, 4, 4, flat=False),
        (96, False): Kernels(quantise_96, plain_96, 1, 8, 4, flat=True),
        (96, True): Kernels(quantise_96, causal_96, 3, 8, 4, flat=True),
        (128, False): Kernels(quantise, plain, 1, 8, 4, flat=False),
        (128, True): Kernels(quantise, causal, 3, 8, 4, flat=False),
    }


def attend(kernels: Kernels, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """What ``sageattn(query, key, value, "NHD", is_causal, scale, smooth_k=False)`` returns, to the bit.

    Args:
        kernels: for this head dim, and for causal or not.
        query: (B, Sq, Hq, D), on the current device, the last dimension dense, of the dtypes that it takes.
        key: (B, Skv, Hkv, D), so too, with causal as long.
        value: (B, Skv, Hkv, D), so too.
        scale: of the scores.
    """
    batch, queries, heads, dim = query.shape
    _, keys, key_heads, _ = key.shape
    if value.dtype != torch.float16:
        value = value.to(torch.float16)
    device = query.get_device()
    blocks, key_blocks = -(-queries // QUERIES), -(-keys // KEYS)
    numbers, key_numbers = batch * queries * heads * dim, batch * keys * key_heads * dim
    scales = -(-batch * heads * blocks // 4) * 16  # bytes, so that what follows is where 16 divides too
    both = numbers + key_numbers
    held = torch.empty(both + scales + batch * key_heads * key_blocks * 4, dtype=torch.uint8, device=query.device)
    at = held.data_ptr()
    rounded, key_rounded = Part(held, at, 0, torch.int8), Part(held, at, numbers, torch.int8)
    steps, key_steps = Part(held, at, both, torch.float32), Part(held, at, both + scales, torch.float32)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)

    dense, key_dense = (queries * heads * dim, dim, heads * dim), (keys * key_heads * dim, dim, key_heads * dim)
    of_batch, of_row, of_head, _ = query.stride()
    launch(
        kernels.quantise, device, (blocks, heads, batch), (query, rounded, steps),
        (queries, of_batch, of_head, of_row, *dense, heads * blocks, blocks, scale * LOG2_E, dim, QUERIES),
    )  # fmt: skip
    of_batch, of_row, of_head, _ = key.stride()
    launch(
        kernels.quantise, device, (key_blocks, key_heads, batch), (key, key_rounded, key_steps),
        (keys, of_batch, of_head, of_row, *key_dense, key_heads * key_blocks, key_blocks, 1.0, dim, KEYS),
    )  # fmt: skip
    of_batch, of_row, of_head, _ = value.stride()
    groups = heads // key_heads
    launch(
        kernels.attend, device, (blocks, batch * heads, 1) if kernels.flat else (blocks, heads, batch),
        (rounded, key_rounded, value, steps, key_steps, out),
        (
            *dense, *key_dense, of_batch, of_head, of_row, *dense,
            *((heads, groups, queries, keys) if kernels.flat else (queries, keys, heads, groups)),
            dim, QUERIES, KEYS, kernels.stage,
        ),
        kernels.warps, kernels.stages,
    )  # fmt: skip
    return out
