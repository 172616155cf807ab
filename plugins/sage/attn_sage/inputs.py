"""What every kernel of sageattention needs done around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from attn_core.errors import CallRefused
from attn_core.shaping import aligned

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

GRID = 65_535
"""The largest second and third dimension of a CUDA grid; batch and heads go there."""
DIAGONAL = 128
"""The Triton kernels go along the diagonal in steps of so many queries and keys, two blocks of keys each."""
OFFSETS = 2**31
"""The kernels count the numbers of a tensor in 32 bits."""
NEGLIGIBLE = 1e-3
"""The share of missing keys that is left as it is; a twentieth of the error that int8 scores make."""


def on_default_stream(
    name: str, tensor: torch.Tensor, compute: Callable[[], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """Have what launches on the default stream, whichever is current, take its place among what the current stream does.

    Args:
        name: of the backend.
        tensor: for the device.
        compute: what launches; its results are for the current stream.

    Raises:
        CallRefused: a CUDA graph is being captured, and would not hold these launches.
    """
    current = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
    if current is None or current == (default := torch.cuda.default_stream(tensor.device)):
        return compute()
    if torch.cuda.is_current_stream_capturing():
        msg = (
            f"{name} refused the call: sageattention 2 launches its CUDA kernels on the default stream, and a CUDA graph does "
            "not hold what happens there. Next: call it outside the capture, or name sage_fp16_triton or another backend"
        )
        raise CallRefused(msg)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        results = compute()
    current.wait_stream(default)
    for result in results:
        result.record_stream(current)
    return results


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one, on which Triton launches, and put back the one that was.

    sageattention 2 changes the current device of the process by itself, to this one; which this undoes.
    """
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


_NOTHING = nullcontext()


def check_sizes(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse what the kernels can't count: they do not check, and would read from the wrong place.

    Raises:
        CallRefused: too many sequences or heads for a grid, or too many numbers for 32 bits.
    """
    batch, _, heads, head_dim = query.shape
    rows = max(batch * heads if head_dim == 96 else batch, heads)  # one kernel has both in one dimension of its grid
    if rows > GRID:
        msg = f"{name}: found a batch of {batch} with {heads} heads; accepted: up to {GRID} of each. Next: split the batch"
        raise CallRefused(msg)
    for tensor in (query, key, value):
        if tensor.numel() >= OFFSETS or not tensor.is_contiguous():
            _check_span(name, query=query, key=key, value=value)
            return


def _check_span(name: str, **tensors: torch.Tensor) -> None:
    for label, tensor in tensors.items():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if max(last, tensor.numel()) >= OFFSETS:
            msg = f"{name}: {label} spans {last + 1} numbers; accepted: up to {OFFSETS}. Next: split the batch or the heads"
            raise CallRefused(msg)


class Prepared(NamedTuple):
    """What a kernel is given.

    Attributes:
        query: (B, Sq, Hq, D), with causal longer by what is missing.
        key: less its mean, a copy (B, Skv and what is missing, Hkv, D).
        value: of as many rows; with key padding 0 where it is hidden, and times ``power``.
        power: of two, (B, Hkv) in float32, or None; see ``fitted``.
        mean: of the keys, (B, 1, Hkv, D), or None where it was not asked for.
        nothing: 0 where this number of all queries and keys of a key head is finite, else NaN, (B, Hkv, D) in float32; or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    power: torch.Tensor | None
    mean: torch.Tensor | None
    nothing: torch.Tensor | None


def missing_keys(block: int, keys: int, *, causal: bool) -> int:
    """How many keys are added: up to a multiple of ``block``.

    With causal, which needs queries and keys of one length and hides what is added: both up to a multiple of ``DIAGONAL``
    where the last block of keys would not be there.
    """
    if not causal:
        return -keys % block
    last = keys % DIAGONAL
    return DIAGONAL - last if 0 < last <= DIAGONAL // 2 else 0


def prepared(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    missing: int,
    *,
    causal: bool = False,
    divided: bool = False,
    wanted: bool = False,
    half: bool = False,
) -> Prepared:
    """The inputs of a kernel, laid out as it insists on: smooth keys, and as many values.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, D).
        keep: which keys are real, (B, Skv), or None for all.
        missing: how many keys and values of 0 to add, with causal queries too.
        causal: whether it is.
        divided: whether ``of_real_keys`` follows, which on a GPU shows by itself what is not finite in a query.
        wanted: whether ``mean`` and ``nothing`` are.
        half: whether the kernel takes values in float16, which on a GPU they then are.
    """
    query, key, value = aligned(_longer(query, missing) if causal else query), aligned(key), aligned(value)
    if (fused := _on_gpu(key)) is not None:
        keep = None if keep is None else keep.contiguous()
        scanned = wanted or not divided
        return Prepared(
            query, *fused.prepared(query, key, value, keep, missing, scanned=scanned, wanted=wanted, half=half)
        )
    value, power = (value, None) if keep is None else fitted(hide(value, keep))
    smoothed, mean, nothing = smooth(query, key, keep)
    return Prepared(query, _longer(smoothed, missing), _longer(value, missing), power, mean, nothing)


def _on_gpu(tensor: torch.Tensor) -> ModuleType | None:
    """What does the same on a GPU, in a launch or two, where there is Triton."""
    return _fused() if tensor.is_cuda else None


@cache
def _fused() -> ModuleType | None:
    try:
        from attn_sage import fused
    except ImportError:
        return None
    return fused


def smooth(
    query: torch.Tensor, key: torch.Tensor, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take its mean over the sequence from the key, which changes each score of a query alike; 0 what is not to be kept.

    The kernels turn NaN into 0 when they quantise, and so hide it. An infinity in the first key makes the scale of its
    block infinite, and every score in it NaN; each query sees that block. So it stands for whatever is not finite in the
    queries and keys of a head.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        keep: which keys are real, (B, Skv), or None for all.

    Returns:
        A copy of the key, and ``mean`` and ``nothing`` of ``Prepared``.
    """
    if keep is None:
        mean = key.mean(1, keepdim=True)
        smoothed = key - mean
    else:
        kept = hide(key, keep)
        count = keep.sum(1).clamp(min=1)[:, None, None, None]
        mean = (kept.sum(1, keepdim=True, dtype=torch.float32) / count).to(key.dtype)
        smoothed = hide(kept - mean, keep)
    total = (query * 0.0).sum(1, dtype=torch.float32)
    if query.shape[2] != key.shape[2]:
        total = total.unflatten(1, (key.shape[2], -1)).sum(2)
    nothing = total + mean[:, 0] * 0.0
    smoothed[:, 0].masked_fill_(nothing.isnan(), float("inf"))
    return smoothed, mean, nothing


def hide(tensor: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """A copy of keys or values (B, Skv, H, D) that is 0 where they are not to be kept, (B, Skv)."""
    return tensor.masked_fill(~keep[:, :, None, None], 0.0)


def _longer(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    return pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor


def counts_others(keys: int, keep: torch.Tensor | None, missing: int) -> bool:
    """Whether the kernel counts so many keys that are not real, with a score of 0, that its result has to be divided.

    The mean of smoothed scores is 0, so that the exponentials of ``keys`` of them add up to no less than their number
    (Jensen), and each padded key adds 1.
    """
    return keep is not None or missing > NEGLIGIBLE * keys


def fitted(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values in float16 times a power of two that brings the largest of a head to some 200, and that power, (B, Hkv).

    A result that is to be divided by a small share is small itself, and in float16 would have no digits left. No more than
    200, since kernels add a block of up to 128 of them in float16. Other dtypes have digits enough: None.
    """
    if value.dtype != torch.float16:
        return value, None
    largest = value.abs().amax((1, 3)).float()
    power = torch.exp2(torch.floor(8.0 - torch.log2(largest))).clamp(2.0**-100, 2.0**100)
    power = torch.where(largest.isfinite() & (largest > 0.0), power, 1.0)
    return (value.float() * power[:, None, :, None]).to(value.dtype), power


def of_real_keys(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    inputs: Prepared,
    keep: torch.Tensor | None,
    keys: int,
    scale: float,
    weigh: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The results for real keys alone, where a kernel counted others with a score of 0; 0 for a query that sees none.

    They are divided by the share of the probabilities that is that of real keys. On a GPU it comes from a sum of the
    exponentials of their scores, else from a second run of the kernel.

    Args:
        out: of the kernel, (B, Sq, Hq, D), dense; on a GPU changed in place.
        lse: of the kernel, (B, Hq, Sq), dense, or None; so too.
        inputs: which it was given.
        keep: which keys are real, (B, Skv), or None for all.
        keys: how many keys the call has.
        scale: which it was given.
        weigh: the kernel, for the same queries and keys and other values.
    """
    if (fused := _on_gpu(out)) is not None:
        keep = None if keep is None else keep.contiguous()
        fused.of_real_keys(out, lse, inputs.query, inputs.key, inputs.power, keep, keys, scale)
        return out, lse
    share = share_of(inputs.value, keys, keep, weigh)
    lse = None if lse is None else lse + share[..., 0].transpose(1, 2).float().log()
    return divide(out, share, inputs.power), lse


def share_of(
    value: torch.Tensor, keys: int, keep: torch.Tensor | None, weigh: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Which share of the probabilities is that of real keys, (B, Sq, Hq, D).

    It is what the kernel returns for values of 1 where keys are real. The largest real score is never far below the
    others' 0, for the reason that ``counts_others`` has.

    Args:
        value: as the kernel was given it, with what was missing.
        keys: how many keys the call has.
        keep: which of them are real, (B, keys), or None for all.
        weigh: the kernel, for the same queries and keys and other values.
    """
    missing = value.shape[1] - keys
    real = value.new_ones(1, keys) if keep is None else keep.to(value.dtype)
    ones = pad(real, (0, missing))[:, :, None, None].expand(-1, -1, 1, value.shape[3]).contiguous()
    return weigh(ones.expand(value.shape))


def divide(out: torch.Tensor, share: torch.Tensor, power: torch.Tensor | None) -> torch.Tensor:
    """The result for real keys alone and for values without their power of two; 0 for a query that sees none."""
    if power is None:
        return torch.where(share != 0, out / share, 0.0)
    power = power.repeat_interleave(out.shape[2] // power.shape[1], 1)[:, None, :, None]
    return torch.where(share != 0, out.float() / share.float() / power, 0.0).to(out.dtype)
