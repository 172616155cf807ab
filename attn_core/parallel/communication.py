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
_TAGS = 2**31
_DOING = "exchanging keys or gradients round the ring"


class Transfer:
    """Messages that go and come together. Tensors are contiguous; both ends name those between them in one order.

    Args:
        cp: whose ring.
        tag: of the messages: gloo delivers none to who waits for another. NCCL has no tags.
    """

    def __init__(self, cp: ContextParallel, tag: int) -> None:
        self._cp = cp
        self._tag = tag
        self._sending: list[tuple[torch.Tensor, int]] = []
        self._receiving: list[tuple[torch.Tensor, int]] = []
        self._purposes: list[str] = []
        self._arrivals: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._works: list[Any] = []
        self._peers: list[int | None] = []

    def send(self, tensor: torch.Tensor, place: int, purpose: str) -> None:
        """Send a tensor to a place of the ring; the purpose is for ``sent``."""
        self._sending.append((tensor, place))
        self._purposes.append(purpose)

    def receive(self, tensor: torch.Tensor, place: int) -> None:
        """Receive into a tensor from a place of the ring."""
        self._receiving.append((tensor, place))

    def start(self) -> None:
        """Post all messages."""
        sending, receiving = self._sending, self._receiving
        if not sending and not receiving:
            return
        group, peers = self._cp.group("ring"), self._cp.ring_ranks
        if "ring" in self._cp.staged and any(tensor.is_cuda for tensor, _ in (*sending, *receiving)):
            self._sending = sending = [(_off_device(tensor), place) for tensor, place in sending]
            landing = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu") for tensor, _ in receiving
            ]
            self._arrivals = [(tensor, host) for (tensor, _), host in zip(receiving, landing, strict=True)]
            receiving = [(host, place) for host, (_, place) in zip(landing, receiving, strict=True)]
        operations = [dist.P2POp(dist.isend, tensor, peers[place], group, self._tag) for tensor, place in sending]
        operations += [dist.P2POp(dist.irecv, tensor, peers[place], group, self._tag) for tensor, place in receiving]
        for (tensor, _), purpose in zip(sending, self._purposes, strict=True):
            sent[purpose] += tensor.numel() * tensor.element_size()
        with blamed(self._cp, _DOING):
            self._works = dist.batch_isend_irecv(operations)
            self._peers = peers_of(operations, self._works)

    def wait(self) -> None:
        """Have what arrives at hand, and what was sent free again: on a GPU, for the current stream."""
        if self._works:
            blame = blamed(self._cp, _DOING)
            with blame:
                for blame.peer, work in zip(self._peers, self._works, strict=True):
                    work.wait()
        for tensor, host in self._arrivals:
            tensor.copy_(host, non_blocking=True)
        self._works, self._arrivals, self._sending = [], [], []


def all_to_all(
    cp: ContextParallel, tensor: torch.Tensor, sending: list[int], receiving: list[int]
) -> tuple[torch.Tensor, ...]:
    """Send a slice of a flat tensor to each ulysses place, so many elements each, and return what each has sent here.

    On NCCL it is one collective. Where messages can have tags they go one by one, so that none is taken for that of another
    kind of call, or of another size.
    """
    own = cp.place[1]
    sent["heads"] += (sum(sending) - sending[own]) * tensor.element_size()
    source = tensor.cpu() if tensor.is_cuda and "ulysses" in cp.staged else tensor
    found = source.new_empty(sum(receiving))
    blame = blamed(cp, "exchanging heads")
    with blame:
        if source.is_cuda:
            dist.all_to_all_single(found, source, receiving, sending, group=cp.group("ulysses"))
        else:
            _tagged(cp, source.split(sending), found.split(receiving), blame)
    parts: tuple[torch.Tensor, ...] = found.to(tensor.device).split(receiving)
    return parts


def _tagged(
    cp: ContextParallel, sending: tuple[torch.Tensor, ...], receiving: tuple[torch.Tensor, ...], blame: blamed
) -> None:
    group, own, tag = cp.group("ulysses"), cp.place[1], cp.shared.current.tag
    operations: list[Any] = []
    for place, rank in enumerate(cp.grid[cp.place[0]]):
        for post, tensor in ((dist.isend, sending[place]), (dist.irecv, receiving[place])):
            if place != own and tensor.numel():
                operations.append(dist.P2POp(post, tensor, rank, group, (tag + tensor.numel()) % _TAGS))
    works = dist.batch_isend_irecv(operations) if operations else []
    receiving[own].copy_(sending[own])
    for blame.peer, work in zip(peers_of(operations, works), works, strict=True):
        work.wait()


def peers_of(operations: list[Any], works: list[Any]) -> list[int | None]:
    """The global rank at the other end of each work; None where NCCL has made one of several."""
    return [one.peer for one in operations] if len(works) == len(operations) else [None] * len(works)


def all_gather(group: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of a group's ranks, alike in shape, one after another along the first dimension.

    They go as bytes: neither gloo nor NCCL knows all dtypes, int16 for one.
    """
    staged = tensor.is_cuda and dist.get_backend(group) == "gloo"
    source = (tensor.cpu() if staged else tensor).contiguous()
    found = source.new_empty(group.size() * source.shape[0], *source.shape[1:])
    _gather(found.view(torch.uint8), source.view(torch.uint8), group=group)
    return found.to(tensor.device)


def _off_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the host without holding up what the current stream computes next."""
    stream = _streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
        host.copy_(tensor, non_blocking=True)
    stream.synchronize()
    return host
