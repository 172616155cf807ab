"""Sends tensors between ranks, and counts what this rank sends.

NCCL works on a stream of its own, so that what is posted here runs beside what is computed; gloo on threads of its own.
gloo takes no CUDA tensors point to point: they go by way of pinned memory, copied on a stream of their own.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from attn_core.parallel.faults import blamed

if TYPE_CHECKING:
    from attn_core.parallel.context import ContextParallel

sent: Counter[str] = Counter()
"""Bytes that this process has sent to others, by what for: "keys", "gradients", "heads"."""

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
_streams: dict[torch.device, Any] = {}


class Transfer:
    """Messages under way. Tensors are contiguous; both ends post theirs in one order, and post at once what belongs together.

    Args:
        cp: whose ring.
        sending: (tensor, ring place) to send to.
        receiving: (tensor, ring place) to receive from.
        purpose: for ``sent``.
        tag: of the messages: gloo delivers none to who waits for another. NCCL has no tags.
    """

    def __init__(
        self,
        cp: ContextParallel,
        sending: list[tuple[torch.Tensor, int]],
        receiving: list[tuple[torch.Tensor, int]],
        purpose: str,
        tag: int,
    ) -> None:
        self._cp = cp
        self._doing = f"exchanging {purpose} round the ring"
        group = cp.group("ring")
        peers = cp.ring_ranks
        self._arrivals: list[tuple[torch.Tensor, torch.Tensor]] = []
        if "ring" in cp.staged and any(tensor.is_cuda for tensor, _ in (*sending, *receiving)):
            sending = [(_off_device(tensor), place) for tensor, place in sending]
            landing = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor, _ in receiving]
            self._arrivals = [(tensor, host) for (tensor, _), host in zip(receiving, landing, strict=True)]
            receiving = [(host, place) for host, (_, place) in zip(landing, receiving, strict=True)]
        operations = [dist.P2POp(dist.isend, tensor, peers[place], group, tag) for tensor, place in sending]
        operations += [dist.P2POp(dist.irecv, tensor, peers[place], group, tag) for tensor, place in receiving]
        sent[purpose] += sum(tensor.numel() * tensor.element_size() for tensor, _ in sending)
        self._kept = sending
        with blamed(cp, self._doing):
            self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        """Have what arrives at hand, and what was sent free again: on a GPU, for the current stream."""
        with blamed(self._cp, self._doing):
            for work in self._works:
                work.wait()
        for tensor, host in self._arrivals:
            tensor.copy_(host, non_blocking=True)
        self._works, self._arrivals, self._kept = [], [], []


def all_to_all(
    cp: ContextParallel, tensor: torch.Tensor, sending: list[int], receiving: list[int]
) -> tuple[torch.Tensor, ...]:
    """Send a slice of a flat tensor to each ulysses place, so many elements each, and return what each has sent here."""
    group = cp.group("ulysses")
    own = cp.place[1]
    sent["heads"] += (sum(sending) - sending[own]) * tensor.element_size()
    source = tensor.cpu() if tensor.is_cuda and "ulysses" in cp.staged else tensor
    found = source.new_empty(sum(receiving))
    with blamed(cp, "exchanging heads"):
        dist.all_to_all_single(found, source, receiving, sending, group=group)
    parts: tuple[torch.Tensor, ...] = found.to(tensor.device).split(receiving)
    return parts


def all_gather(group: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of a group's ranks, alike in shape, one after another along the first dimension."""
    staged = tensor.is_cuda and dist.get_backend(group) == "gloo"
    source = (tensor.cpu() if staged else tensor).contiguous()
    found = source.new_empty(group.size() * source.shape[0], *source.shape[1:])
    _gather(found, source, group=group)
    return found.to(tensor.device)


def _off_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the host without holding up what the current stream computes next."""
    stream = _streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
    stream.synchronize()
    return host
