"""Masks that are described instead of written out, and the dense form of any mask for kernels that want one.

torch is imported here: the public names reach users through ``attn_core``, which imports this module when first asked.
"""

from __future__ import annotations

from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from attn_core.errors import CallRefused

if TYPE_CHECKING:
    from collections.abc import Callable

Prepared = TypeVar("Prepared")

# Bound once: they are asked on the way of each call.
_is_traced = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack


class Description:
    """A mask as data, with what adapters prepared from it.

    An adapter that needs another form of the description (indices, lengths, a dense mask) asks ``prepared`` for it: it
    is built once and kept with the description, and built again when a tensor of it was changed in place.
    """

    kind: ClassVar[str]

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = tensors
        self._prepared: dict[object, tuple[tuple[int, ...], Any]] = {}

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it is made of."""
        return self._tensors

    def prepared(self, name: object, build: Callable[[], Prepared]) -> Prepared:
        """Return what ``build()`` made for ``name``, building it once.

        Nothing is kept while code is traced, and nothing of inference tensors, which don't count their changes. While a CUDA
        graph is captured what was kept before is used, and nothing new is kept: it would have no values before a replay.
        """
        if traced(*self._tensors) or any(tensor.is_inference() for tensor in self._tensors):
            return build()
        versions = tuple(tensor._version for tensor in self._tensors)
        kept = self._prepared.get(name)
        if kept is None or kept[0] != versions:
            kept = (versions, build())
            if not capturing(*self._tensors):
                self._prepared[name] = kept
        prepared: Prepared = kept[1]
        return prepared

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}


class KeyPadding(Description):
    """Which keys are real: query i sees key j of batch b where ``keep[b, j]``.

    Holes and left padding are as good as right padding.

    Args:
        keep: bool tensor (B, Skv), True is a real key, on the device of the call.

    Raises:
        CallRefused: when keep is not a two-dimensional bool tensor.

    Example:
        >>> import torch
        >>> KeyPadding(torch.tensor([[False, True, True]]))
        KeyPadding(batch=1, keys=3)
    """

    kind = "key_padding"

    def __init__(self, keep: torch.Tensor) -> None:
        if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool or keep.ndim != 2:
            msg = (
                f"KeyPadding: keep is a bool tensor (B, Skv), True for a real key; found {_describe(keep)}. "
                "A padding mask of 0 and 1 becomes one with mask.bool()"
            )
            raise CallRefused(msg)
        super().__init__(keep)

    @property
    def keep(self) -> torch.Tensor:
        """Which keys are real, bool (B, Skv)."""
        return self._tensors[0]

    def __repr__(self) -> str:
        return f"KeyPadding(batch={self.keep.shape[0]}, keys={self.keep.shape[1]})"


class Packed(Description):
    """Sequences laid end to end in a batch of one, each attending to itself, the causal diagonal its own.

    Its tensors may be changed in place, to offsets with the same longest sequence or a shorter one. Inference tensors are
    copied when it is made, so that a change of the originals is no change of it.

    Args:
        cu_seqlens_q: int32 tensor (N + 1,): where each sequence starts among the queries, beginning with 0 and
            ending with Sq.
        cu_seqlens_k: the same among the keys, ending with Skv; None is as for the queries.
        max_seqlen_q: length of the longest sequence among the queries; counted when not given.
        max_seqlen_k: the same among the keys.

    Raises:
        CallRefused: when the tensors are not increasing int32 offsets from 0, differ in length or device, or a
            max_seqlen is below the longest sequence. Inside compiled code the values are not looked at.

    Example:
        >>> import torch
        >>> Packed(torch.tensor([0, 3, 5], dtype=torch.int32)).max_seqlen_q
        3
    """

    kind = "packed"

    def __init__(
        self,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor | None = None,
        *,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_offsets("cu_seqlens_q", cu_seqlens_q)
        _check_offsets("cu_seqlens_k", cu_seqlens_k)
        if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.device != cu_seqlens_k.device:
            msg = (
                "Packed: cu_seqlens_q and cu_seqlens_k describe the same sequences on one device; found "
                f"{_describe(cu_seqlens_q)} and {_describe(cu_seqlens_k)}"
            )
            raise CallRefused(msg)
        self._made_traced = traced(cu_seqlens_q, cu_seqlens_k)
        if not self._made_traced:
            cu_seqlens_q, cu_seqlens_k = _counted(cu_seqlens_q, cu_seqlens_k)
        super().__init__(cu_seqlens_q, cu_seqlens_k)
        self._longest = (max_seqlen_q, max_seqlen_k)
        self._totals: tuple[int, int] | None = None
        if not self._made_traced:
            lengths_q, lengths_k = self._read_lengths("q"), self._read_lengths("k")
            self._longest = (
                _longest("q", lengths_q, max_seqlen_q),
                _longest("k", lengths_k, max_seqlen_k),
            )
            self._totals = (sum(lengths_q), sum(lengths_k))

    @property
    def cu_seqlens_q(self) -> torch.Tensor:
        """Where each sequence starts among the queries, int32 (N + 1,)."""
        return self._tensors[0]

    @property
    def cu_seqlens_k(self) -> torch.Tensor:
        """Where each sequence starts among the keys, int32 (N + 1,)."""
        return self._tensors[1]

    @property
    def max_seqlen_q(self) -> int | None:
        """Length of the longest sequence among the queries; None where it was made in traced code and not given."""
        return self._longest[0]

    @property
    def max_seqlen_k(self) -> int | None:
        """Length of the longest sequence among the keys; None where it was made in traced code and not given."""
        return self._longest[1]

    @property
    def lengths_q(self) -> list[int] | None:
        """The length of each sequence among the queries; None in traced code, which reads no values."""
        return self._lengths("q")

    @property
    def lengths_k(self) -> list[int] | None:
        """The length of each sequence among the keys; None in traced code, which reads no values."""
        return self._lengths("k")

    @property
    def totals(self) -> tuple[int, int] | None:
        """How many queries and keys the sequences have together; in traced code those that it was made with, or None."""
        lengths_q, lengths_k = self.lengths_q, self.lengths_k
        if lengths_q is None or lengths_k is None:
            return self._totals
        return sum(lengths_q), sum(lengths_k)

    def _lengths(self, side: str) -> list[int] | None:
        if self._made_traced or traced(*self._tensors):
            return None
        return self.prepared(("lengths", side), lambda: self._read_lengths(side))

    def _read_lengths(self, side: str) -> list[int]:
        """Copy them from the device, and refuse offsets that make no sense."""
        place = "qk".index(side)
        lengths = _lengths(f"cu_seqlens_{side}", self._tensors[place])
        _longest(side, lengths, self._longest[place])  # it may have been changed in place since it was made
        return lengths

    def __repr__(self) -> str:
        return f"Packed(sequences={self.cu_seqlens_q.shape[0] - 1})"


def traced(*tensors: torch.Tensor) -> bool:
    """Whether these are traced (torch.compile, export, fake tensors), so that values can't be read or kept.

    ``torch.compiler.is_compiling`` is true in every thread while one compiles, so it is not asked.
    """
    if _is_traced() or _dispatch_modes() > 0:
        return True
    for tensor in tensors:  # noqa: SIM110 - a generator costs half a microsecond on the way of a call
        if type(tensor) is not torch.Tensor:
            return True
    return False


def capturing(*tensors: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured that calls on these would become part of."""
    return any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing()


def _counted(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same tensors; of inference tensors, which don't count their changes, copies that do."""
    with torch.inference_mode(mode=False):
        copies = {tensor: tensor.clone() if tensor.is_inference() else tensor for tensor in tensors}
    return [copies[tensor] for tensor in tensors]  # what was one tensor stays one


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def _check_offsets(label: str, value: object) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int32 or value.ndim != 1 or value.shape[0] < 2:
        msg = (
            f"Packed: {label} is an int32 tensor (N + 1,) of offsets such as [0, 3, 5]; found {_describe(value)}. "
            "From lengths: torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)"
        )
        raise CallRefused(msg)
    if value.is_meta:
        msg = f"Packed: {label} holds values that are read when it is made; found a tensor on meta, which has none"
        raise CallRefused(msg)


def _lengths(label: str, offsets: torch.Tensor) -> list[int]:
    values = offsets.tolist()
    lengths = [end - start for start, end in pairwise(values)]
    if values[0] != 0 or min(lengths) < 0:
        msg = f"Packed: {label} starts with 0 and never falls; found {values[:20]}"
        raise CallRefused(msg)
    return lengths


def _longest(side: str, lengths: list[int], given: object) -> int:
    longest = max(lengths)
    if given is None:
        return longest
    if isinstance(given, bool) or not isinstance(given, Integral) or given < longest:
        msg = f"Packed: max_seqlen_{side} is a whole number, at least the longest sequence ({longest}); found {given!r}"
        raise CallRefused(msg)
    return int(given)


def diagonal_mask(
    query_length: int,
    key_length: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor | None:
    """Which keys the bottom-right diagonal and the window around it leave visible.

    Query i sits on key ``i + Skv - Sq``; ``causal`` sees up to it, ``window_size`` from ``left`` before to ``right``
    after it.

    Returns:
        bool (Sq, Skv), True is visible; None when everything is.

    Example:
        >>> diagonal_mask(2, 3, causal=True).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    left, right = window_size or (-1, -1)
    if causal:
        right = 0
    if left < 0 and right < 0:
        return None
    position = torch.arange(query_length, device=device)[:, None] + (key_length - query_length)
    keys = torch.arange(key_length, device=device)[None, :]
    return _around(position, keys, left, right)


def _around(position: torch.Tensor, keys: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """Which keys lie from ``left`` before to ``right`` after each position, one side at least limited. Bools alone are made."""
    if left < 0:
        return keys <= position + right
    near = keys >= position - left
    return near if right < 0 else near & (keys <= position + right)


def packed_mask(
    packed: Packed,
    query_length: int,
    key_length: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Which keys each packed query sees: those of its own sequence, around its sequence's own diagonal.

    Returns:
        bool (Sq, Skv), True is visible. No value is copied from the device.

    Example:
        >>> import torch
        >>> packed_mask(Packed(torch.tensor([0, 1, 3], dtype=torch.int32)), 3, 3, causal=True).int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    starts_q, starts_k = packed.cu_seqlens_q, packed.cu_seqlens_k
    queries = torch.arange(query_length, device=starts_q.device, dtype=torch.int32)
    keys = torch.arange(key_length, device=starts_k.device, dtype=torch.int32)
    owner_q = torch.bucketize(queries, starts_q[1:], right=True)
    owner_k = torch.bucketize(keys, starts_k[1:], right=True)
    visible = owner_q[:, None] == owner_k[None, :]
    left, right = window_size or (-1, -1)
    if causal:
        right = 0
    if left < 0 and right < 0:
        return visible
    position = queries - starts_q[1:][owner_q] + starts_k[1:][owner_q]
    return visible & _around(position[:, None], keys[None, :], left, right)


def visible_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    attn_mask: torch.Tensor | Description | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
) -> torch.Tensor | None:
    """Everything that hides keys, in one bool tensor: causal, window, and a bool or described mask.

    A float mask hides nothing here; it is added to the scores by the caller.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        attn_mask: as in the call.
        causal: bottom-right.
        window_size: (left, right), -1 unlimited.

    Returns:
        bool, 4-D, broadcastable to (B, Hq, Sq, Skv), True is visible; None when everything is.

    Example:
        >>> import torch
        >>> q = torch.zeros(1, 2, 1, 4)
        >>> visible_mask(q, q, causal=True).int().tolist()
        [[[[1, 0], [1, 1]]]]
    """
    query_length, key_length = query.shape[1], key.shape[1]
    if isinstance(attn_mask, Packed):
        packed = attn_mask
        inside: torch.Tensor = packed.prepared(
            ("packed_mask", query_length, key_length, causal, window_size),
            lambda: packed_mask(packed, query_length, key_length, causal=causal, window_size=window_size),
        )
        return inside[None, None]
    diagonal = diagonal_mask(query_length, key_length, causal=causal, window_size=window_size, device=query.device)
    mask = None if diagonal is None else diagonal[None, None]
    if isinstance(attn_mask, KeyPadding):
        keep = attn_mask.keep[:, None, None, :]
        return keep if mask is None else mask & keep
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        return attn_mask if mask is None else mask & attn_mask
    return mask
