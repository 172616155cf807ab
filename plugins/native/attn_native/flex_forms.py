"""What flex_attention computes for one form of call: its score and mask functions, and the call itself.

A form holds what is written into generated code; what may change from call to call without new code (lengths, window,
softcap, an unusual scale) travels in ``Operands`` as tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.attention import flex_attention as torch_flex

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 128
"""Queries and keys to a block of the block mask, flex_attention's own default."""

# torch 2.9 brought AuxRequest and deprecated return_lse.
_AUX: dict[str, Any] = (
    {"return_aux": torch_flex.AuxRequest(lse=True)} if hasattr(torch_flex, "AuxRequest") else {"return_lse": True}
)


class Form(NamedTuple):
    """What is compiled in.

    Attributes:
        scale: the factor of the scores, or None where ``Operands.factor`` has it.
        mask: kind of ``attn_mask``, one of ``attn_core.facts.MASKS``.
        indexed: which of (B, Hq, Sq, Skv) a dense mask is indexed by; the others are given once for all.
        low: whether keys before ``position + Operands.low`` are hidden.
        high: whether keys after ``position + Operands.high`` are hidden.
        diagonal: whether keys after ``position`` are hidden.
        softcap: whether ``Operands.softcap`` caps the scores.
        gqa: whether query heads share key heads.
        forced: whether the kernel for short queries must be avoided, which wants a power of two of heads to a group and all
            queries of a group in one block.
        lse: whether the log-sum-exp is returned too.
    """

    scale: float | None
    mask: str
    indexed: tuple[bool, ...]
    low: bool
    high: bool
    diagonal: bool
    softcap: bool
    gqa: bool
    forced: bool
    lse: bool

    @property
    def hides(self) -> bool:
        """Whether the mask function has anything to do."""
        return self.low or self.high or self.diagonal or self.mask not in ("none", "float")

    @property
    def scores(self) -> bool:
        """Whether the score function has anything to do."""
        return self.scale is None or self.softcap or self.mask == "float"


class Blocks(NamedTuple):
    """Which blocks of keys a block of queries visits, and the other way round: (b, h, rows) and (b, h, rows, columns)."""

    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_num_blocks: torch.Tensor
    full_kv_indices: torch.Tensor
    q_num_blocks: torch.Tensor
    q_indices: torch.Tensor
    full_q_num_blocks: torch.Tensor
    full_q_indices: torch.Tensor


class Operands(NamedTuple):
    """The tensors that the score and mask functions read. What a form has no use for is None.

    Attributes:
        dense: a bool or float mask without the dimensions that are given once for all, or KeyPadding's keep.
        position: (Sq,) int32, the key that a packed query sits on.
        owner_q: (Sq,) int32, the sequence that a packed query belongs to.
        owner_k: (Skv,) int32, the same for keys.
        low: int32 scalar, the first visible key relative to the query's position.
        high: int32 scalar, the last.
        factor: float32 scalar, the scale.
        softcap: float32 scalar.
        blocks: the block mask.
    """

    dense: torch.Tensor | None = None
    position: torch.Tensor | None = None
    owner_q: torch.Tensor | None = None
    owner_k: torch.Tensor | None = None
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    softcap: torch.Tensor | None = None
    blocks: Blocks | None = None


INDEXED = ("dense", "position", "owner_q", "owner_k")
"""The operands that are indexed by queries or keys."""


def roomy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same tensor with its last two sizes rounded up: to a power of two, above 1024 to a multiple of it.

    Sizes that vary can't be read by the functions on CPU: where code is generated for them, the C++ template replaces
    the names of its own sizes as text, in "ks16" too when one is "ks1", and the code does not compile (seen on torch
    2.13). With sizes that are fixed in the code there are few to compile for.

    >>> roomy(torch.zeros(3, 5, 1500)).shape
    torch.Size([3, 8, 2048])
    """
    if tensor is None:
        return None
    missing = [_rounded(size) - size for size in tensor.shape[-2:]]
    padding = [side for size in reversed(missing) for side in (0, size)]
    return torch.nn.functional.pad(tensor, padding) if any(padding) else tensor


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length() if size <= 1024 else (size + 1023) // 1024 * 1024


def attend(form: Form, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, operands: Operands) -> Any:
    """Call flex_attention, inside code that is being compiled.

    Args:
        form: what is computed.
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        operands: the form's tensors.

    Returns:
        (B, Sq, Hq, Dv), and with ``form.lse`` also (B, Hq, Sq) in float32, differentiable.
    """
    options: dict[str, Any] = dict(_AUX) if form.lse else {}
    if form.forced:
        options["kernel_options"] = {"FORCE_USE_FLEX_ATTENTION": True}
    if form.gqa:
        options["enable_gqa"] = True
    on_cpu = query.device.type == "cpu"
    if form.scores or on_cpu:
        options["score_mod"] = _score_function(form, operands, hides_nan=on_cpu)
    if operands.blocks is not None:
        lengths = (query.shape[1], key.shape[1])
        options["block_mask"] = torch_flex.BlockMask(  # Blocks has its order; torch 2.8 can't trace _asdict
            lengths, *operands.blocks, (BLOCK, BLOCK), _mask_function(form, operands)
        )
    if on_cpu:
        query, key = _wide(query), _wide(key)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    result: Any = torch_flex.flex_attention(
        query, key, value, scale=1.0 if form.scale is None else form.scale, **options
    )
    if not form.lse:
        return result.transpose(1, 2)
    out, extra = result
    return out.transpose(1, 2), extra if isinstance(extra, torch.Tensor) else extra.lse


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Pad the head dim with zeros to 24, which changes no score.

    Below that, where the head dim and the last keys, short of 16, are whole vectors, torch's code for CPU computes and
    stores scores of 16 keys all the same, beyond the end of its buffers (CppMicroGemmFP32Vec with a transposed B; seen on
    torch 2.13 with AVX2: head dims of 8 and 16, eight keys more than a multiple of 16).
    """
    missing = 24 - tensor.shape[3]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing > 0 else tensor


def _score_function(form: Form, operands: Operands, *, hides_nan: bool) -> Callable[..., torch.Tensor]:
    """The score function; with ``hides_nan`` a NaN becomes an infinity, whose softmax is NaN.

    torch's code for CPU takes the largest score of vectors that pass over NaN, and a NaN query or key vanishes from the result
    (seen on torch 2.13).
    """

    def score_mod(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        if form.scale is None:
            score = score * operands.factor
        if form.softcap:
            score = torch.tanh(score / operands.softcap) * operands.softcap  # type: ignore[operator]
        if form.mask == "float":
            score = score + _dense_at(form, operands, b, h, q, kv)
        return torch.where(score.isnan(), torch.inf, score) if hides_nan else score

    return score_mod


def _mask_function(form: Form, operands: Operands) -> Callable[..., torch.Tensor]:
    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        position = q
        visible = kv >= 0
        if form.mask == "packed":
            position = operands.position[q]  # type: ignore[index]
            visible = operands.owner_q[q] == operands.owner_k[kv]  # type: ignore[index]
        elif form.mask in ("bool", "key_padding"):
            visible = _dense_at(form, operands, b, h, q, kv)
        if form.diagonal:
            visible = visible & (kv <= position)
        if form.low:
            visible = visible & (kv >= position + operands.low)
        if form.high:
            visible = visible & (kv <= position + operands.high)
        return visible

    return mask_mod


def _dense_at(form: Form, operands: Operands, b: Any, h: Any, q: Any, kv: Any) -> Any:
    places = [place for place, indexed in zip((b, h, q, kv), form.indexed) if indexed]  # noqa: B905 (Dynamo)
    return operands.dense[tuple(places)]  # type: ignore[index]
