"""Attention round a ring: chunks of keys travel, each rank's queries stay, partial results are merged.

Two operators, so that compiled code holds them unopened: they take the kind of call as text, which names the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - read from the operators' annotations
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_core.errors import CallRefused
from attn_core.offset import largest, offset_of
from attn_core.parallel.agreement import agreed, begun
from attn_core.parallel.communication import Transfer
from attn_core.parallel.completion import completed, how_many_lengths, lengths_of
from attn_core.parallel.faults import alone, told
from attn_core.parallel.kind import parsed
from attn_core.parallel.merge import wide
from attn_core.parallel.part import options_of
from attn_core.parallel.rows import Rows, cutter
from attn_core.reading import without_autocast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attn_core.parallel.layout import Segment
    from attn_core.parallel.preparation import Prepared
    from attn_core.parallel.rows import Cut
    from attn_core.parallel.sight import Piece


class Chunk(NamedTuple):
    """Keys and values of one place, or their gradients, and the message that they are sent in.

    Attributes:
        message: flat, the one after the other.
        cut: both, for some of the positions.
    """

    message: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cut: Cut


class Room:
    """Memory for one chunk, whichever place it comes from; most are as long as others, and are made of it once.

    Args:
        key: of this rank, for its shape.
        value: the same.
        memory: flat, enough for the longest.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, memory: torch.Tensor) -> None:
        self._shapes = [(tensor.shape[0], tensor.shape[2], tensor.shape[3]) for tensor in (key, value)]
        self.memory = memory
        self._chunks: dict[int, Chunk] = {}

    def chunk(self, length: int) -> Chunk:
        """One of so many positions."""
        found = self._chunks.get(length)
        if found is None:
            shapes = [(batch, length, heads, dim) for batch, heads, dim in self._shapes]
            sizes = [prod(shape) for shape in shapes]
            message = self.memory[: sum(sizes)]
            key, value = (part.view(shape) for part, shape in zip(message.split(sizes), shapes, strict=True))
            found = self._chunks[length] = Chunk(message, key, value, cutter((key, 1), (value, 1)))
        return found


class Ring:
    """One pass round the ring, forward or backward, as this rank takes part in it.

    Args:
        prepared: the kind of call.
        key: this rank's own.
        value: this rank's own.
        late: whether it is the backward, whose messages are not taken for those of a forward.
    """

    def __init__(self, prepared: Prepared, key: torch.Tensor, value: torch.Tensor, *, late: bool = False) -> None:
        self.cp = prepared.kind.cp
        self.course = prepared.course
        self.tag = prepared.tag ^ late
        self.places = self.cp.ring
        self.place = self.cp.place[0]
        self.onward = (self.place + 1) % self.places  # the place that chunks go to
        self.rounds = max(self.course.last) + 1
        self.key, self.value = key, value
        self.lengths = prepared.key_lengths

    def source(self, step: int) -> int:
        """The place whose chunk is here at a step."""
        return (self.place - step) % self.places

    def here(self, step: int) -> bool:
        """Whether a chunk is here at a step, and anybody has use for it."""
        return step <= self.course.last[self.source(step)]

    def pieces(self, step: int) -> tuple[Piece, ...]:
        """What this rank computes at a step."""
        steps = self.course.steps[self.place]
        return steps[step] if step < len(steps) else ()

    def rooms(self, dtype: torch.dtype) -> list[Room]:
        """Room for two chunks."""
        longest = max(self.lengths)
        size = sum(tensor.shape[0] * longest * tensor.shape[2] * tensor.shape[3] for tensor in (self.key, self.value))
        return [Room(self.key, self.value, self.key.new_empty(size, dtype=dtype)) for _ in range(2)]

    def chunk(self, room: Room, step: int) -> Chunk:
        """What a room holds at a step."""
        return room.chunk(self.lengths[self.source(step)])

    def chunks(self, gradients: Gradients | None = None) -> Iterator[tuple[int, Cut]]:
        """The steps, with what cuts the keys and values at hand, this rank's own first. The next are on their way meanwhile.

        A step at which nothing is here has nothing to compute; it is told all the same, since all ranks post their messages
        in one order.

        Args:
            gradients: what they have to send and receive goes with the keys, in one exchange.
        """
        if self.rounds == 1:
            yield 0, cutter((self.key, 1), (self.value, 1))
            return
        rooms = self.rooms(self.key.dtype)
        current = self.chunk(rooms[0], 0)
        current.key.copy_(self.key)
        current.value.copy_(self.value)
        for step in range(self.rounds):
            following = self.chunk(rooms[(step + 1) % 2], step + 1)
            transfer = Transfer(self.cp, self.tag)
            if gradients is not None:
                gradients.go_with(transfer)
            if step < self.course.last[self.source(step)]:
                transfer.send(current.message, self.onward, "keys")
            if step + 1 < self.rounds and self.here(step + 1):
                transfer.receive(following.message, self.source(1))
            transfer.start()
            yield step, current.cut
            transfer.wait()
            current = following


# --- forward ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("attn_core::ring", mutates_args=())
def _ring(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Sequence[torch.Tensor], kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    found = parsed(kind)
    with alone(found.cp):
        if found.mode == "ring":
            begun(found.cp)
        prepared = agreed(completed(kind, query, key, mask))
        with told(found.cp), torch.no_grad():
            near, offset = _without_offset(prepared, _dense(prepared, mask, query), query)
            out, lse = _forward(prepared, query, key, value, near)
            lengths = torch.tensor(
                lengths_of(prepared.kind) if found.keys is None else [], dtype=torch.int64, device="cpu"
            )
            return out, lse, _added(lse, mask, offset), lengths


def _forward(
    prepared: Prepared, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    going = Ring(prepared, key, value)
    options = {**prepared.options, **prepared.deterministic[0], "return_lse": True}
    results, rows = Rows(query, value.shape[3], weighted=True), cutter((query, 1))
    for step, columns in going.chunks():
        for piece in going.pieces(step):
            hidden = options_of(piece, mask, prepared.kind.mask, prepared.key_pieces[going.source(step)])
            found = prepared.adapter.forward(*rows(piece.queries), *columns(piece.keys), **options, **hidden)
            results.add(piece.queries, found)
    out, lse = results.finished()
    return out, lse


@_ring.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,  # noqa: ARG001
    value: torch.Tensor,
    mask: Sequence[torch.Tensor],
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[3])
    lengths = torch.empty(how_many_lengths(parsed(kind)), dtype=torch.int64, device="cpu")
    lse = query.new_empty(batch, heads, length, dtype=wide(query.dtype))
    return out, lse, _added(lse, mask, None), lengths


def ring(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Sequence[torch.Tensor], kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the keys of all ranks.

    Args:
        query: this rank's.
        key: this rank's, or all.
        value: the same.
        mask: what the mask is made of.
        kind: of call, as text.

    Returns:
        The result and the log-sum-exp of this rank's queries.
    """
    out, lse, added, _ = _ring(query, key, value, list(mask), kind)  # the lengths are for the backward of compiled code
    return out, lse + added if _is_float(mask) else lse


# --- backward -----------------------------------------------------------------------------------------------------------


class Gradients:
    """The gradients of keys and values, which travel one step behind their chunk and are added to at each place.

    Two buffers: one to add to, and one under way. Where chunks end their course at different steps, the own gradient
    comes home into a third.
    """

    def __init__(self, going: Ring) -> None:
        self._ring = going
        self._rooms = going.rooms(wide(going.key.dtype))
        self._begun = False  # whether anything is in the first room
        self._home: Room | None = None
        self._sending: list[tuple[torch.Tensor, int]] = []
        self._receiving: list[tuple[torch.Tensor, int]] = []
        self._transfer: Transfer | None = None

    def add(self, step: int, keys: Segment, *parts: torch.Tensor) -> None:
        """Add what this rank has computed for some of the chunk that is here."""
        self._wait()
        chunk = self._chunk(step)
        first = step == 0 and not self._begun
        if first and keys.length < chunk.key.shape[1]:
            self._begin()
            first = False
        for whole, part in zip(chunk.cut(keys), parts, strict=True):
            (whole.copy_ if first else whole.add_)(part)
        self._begun = True

    def pass_on(self, step: int) -> None:
        """Have those of the chunk that is here go on, or home where its course ends, and those of the next come."""
        self._wait()  # where nothing was added at this step
        if not self._begun:
            self._begin()
        ring, last = self._ring, self._ring.course.last
        source, following = ring.source(step), self._rooms[(step + 1) % 2]
        if ring.here(step) and last[source] > 0:
            target = ring.onward if step < last[source] else source
            self._sending.append((self._chunk(step).message, target))
        if step + 1 < ring.rounds and ring.here(step + 1):
            self._receiving.append((ring.chunk(following, step + 1).message, ring.source(1)))
        if last[ring.place] == step == 0 and ring.rounds > 1:  # the room is needed for others
            self._home = self._room(self._rooms[0].memory.clone())
        elif 0 < last[ring.place] == step:
            self._home = following if step + 1 == ring.rounds else self._room(torch.empty_like(following.memory))
            self._receiving.append((ring.chunk(self._home, 0).message, (ring.place + step) % ring.places))

    def go_with(self, transfer: Transfer) -> None:
        """Leave what goes and comes to a transfer that is about to start."""
        if not self._sending and not self._receiving:
            return
        for tensor, place in self._sending:
            transfer.send(tensor, place, "gradients")
        for tensor, place in self._receiving:
            transfer.receive(tensor, place)
        self._sending, self._receiving, self._transfer = [], [], transfer

    def own(self) -> Chunk:
        """Those of this rank's keys and values, complete."""
        last = Transfer(self._ring.cp, self._ring.tag)
        self.go_with(last)
        last.start()
        self._wait()
        return self._ring.chunk(self._home or self._rooms[0], 0)

    def _chunk(self, step: int) -> Chunk:
        return self._ring.chunk(self._rooms[step % 2], step)

    def _begin(self) -> None:
        """With nothing, where the first that is computed is not for the whole chunk."""
        self._chunk(0).message.zero_()
        self._begun = True

    def _room(self, memory: torch.Tensor) -> Room:
        return Room(self._ring.key, self._ring.value, memory)

    def _wait(self) -> None:
        if self._transfer is not None:
            self._transfer.wait()
            self._transfer = None


@torch.library.custom_op("attn_core::ring_backward", mutates_args=())
def ring_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lengths: torch.Tensor,
    mask: Sequence[torch.Tensor],
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of this rank's queries, keys and values."""
    cp = parsed(kind).cp
    with alone(cp):
        prepared = agreed(completed(kind, query, key, mask, lengths.tolist()))
        with told(cp), torch.no_grad(), without_autocast(query.device.type):
            near, _ = _without_offset(prepared, _dense(prepared, mask, query), query)
            return _backward(prepared, (grad_out, query, out, lse), key, value, near)


def _backward(
    prepared: Prepared,
    rows_of: tuple[torch.Tensor, ...],
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_out, query, out, lse = rows_of
    backward: Any = prepared.adapter.backward
    options = {**prepared.options, **prepared.deterministic[1]}
    going = Ring(prepared, key, value, late=True)
    gradients = Gradients(going)
    grad_query, rows = Rows(query, query.shape[3], weighted=False), cutter((grad_out, 1), (query, 1))
    results = cache(lambda part: (out[:, slice(*part)], lse[:, :, slice(*part)].contiguous()))
    for step, columns in going.chunks(gradients):
        for piece in going.pieces(step):
            hidden = options_of(piece, mask, prepared.kind.mask, prepared.key_pieces[going.source(step)])
            found = backward(*rows(piece.queries), *columns(piece.keys), *results(piece.queries), **options, **hidden)
            grad_query.add(piece.queries, found[:1])
            gradients.add(step, piece.keys, *found[1:])
        gradients.pass_on(step)
    own = gradients.own()
    (grad,) = grad_query.finished()
    return grad, _as(own.key, key), _as(own.value, value)


def _as(grad: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype of its tensor, and in memory of its own."""
    return grad.to(tensor.dtype, copy=True)


@ring_backward.register_fake
def _(
    grad_out: torch.Tensor,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,  # noqa: ARG001
    lse: torch.Tensor,  # noqa: ARG001
    lengths: torch.Tensor,  # noqa: ARG001
    mask: Sequence[torch.Tensor],  # noqa: ARG001
    kind: str,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second, third = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return first, second, third


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, mask, kind = inputs
    out, lse, _, lengths = output
    ctx.save_for_backward(query, key, value, out, lse, lengths, *mask)
    ctx.kind = kind


def _no_second(*_: Any) -> Any:
    msg = (
        "backward: a gradient of the gradient (create_graph=True) is not supported round a ring; use ulysses with a backend "
        "whose own graph has it, or one device"
    )
    raise CallRefused(msg)


ring_backward.register_autograd(_no_second)


def _gradients(ctx: Any, grad_out: torch.Tensor, *_: torch.Tensor) -> Any:
    query, key, value, out, lse, lengths, *mask = ctx.saved_tensors
    return (*ring_backward(grad_out, query, key, value, out, lse, lengths, mask, ctx.kind), [None] * len(mask), None)


_ring.register_autograd(_gradients, setup_context=_setup)


# --- masks --------------------------------------------------------------------------------------------------------------


def _dense(prepared: Prepared, mask: Sequence[torch.Tensor], query: torch.Tensor) -> torch.Tensor | None:
    """The mask that pieces get their part of; packed sequences are in the pieces themselves."""
    kind = prepared.kind
    if not mask or kind.mask == "packed":
        return None
    if kind.mask_once is not None and not kind.mask_once[2]:
        return mask[0].expand(-1, -1, query.shape[1], -1)
    return mask[0]


def _is_float(mask: Sequence[torch.Tensor]) -> bool:
    return len(mask) > 0 and mask[0].is_floating_point()  # Dynamo of torch 2.11 takes no bool of a list


def _added(lse: torch.Tensor, mask: Sequence[torch.Tensor], offset: torch.Tensor | None) -> torch.Tensor:
    """What the caller's lse has beside that of the backward; nothing at all where the mask is no float one."""
    if not _is_float(mask):
        return lse.new_empty(0)
    added = torch.zeros_like(lse)
    return added if offset is None else added.add_(offset[..., 0])


def _without_offset(
    prepared: Prepared, mask: torch.Tensor | None, query: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask without what all keys of a row have in common, on whichever rank: partial results are merged by their lse."""
    if mask is None or not mask.is_floating_point():
        return mask, None
    kind = prepared.kind
    if kind.causal or kind.window_size is not None or not mask.shape[3]:
        offset = offset_of(_largest_of_pieces(prepared, mask, query.shape[1]))
    else:
        offset = offset_of(mask.amax(-1, keepdim=True))
    if offset is None:
        return mask, None
    if query.dtype == torch.float64:
        mask, offset = mask.double(), offset.double()
    return mask - offset, offset


def _largest_of_pieces(prepared: Prepared, mask: torch.Tensor, queries: int) -> torch.Tensor:
    """The largest number of the mask among the keys that each query of this rank sees, (., ., Sq, 1)."""
    cp = prepared.kind.cp
    found = mask.new_full((*mask.shape[:2], queries, 1), float("-inf"))
    for step, pieces in enumerate(prepared.course.steps[cp.place[0]]):
        keys = prepared.key_pieces[(cp.place[0] - step) % cp.ring]
        for piece in pieces:
            hidden = options_of(piece, mask, prepared.kind.mask, keys)
            rows = found.narrow(2, piece.queries.start, piece.queries.length)
            part = largest(hidden.pop("attn_mask"), piece.queries.length, piece.keys.length, **hidden)
            torch.maximum(rows, part, out=rows)
    return found
