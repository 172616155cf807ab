"""Attention round a ring: chunks of keys travel, each rank's queries stay, partial results are merged.

Two operators, so that compiled code holds them unopened: they take the kind of call as text, which names the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - read from the operators' annotations
from typing import TYPE_CHECKING, Any

import torch

from attn_core.parallel.agreement import agreed, begun
from attn_core.parallel.communication import Transfer
from attn_core.parallel.completion import completed, how_many_lengths, lengths_of
from attn_core.parallel.faults import told
from attn_core.parallel.kind import parsed
from attn_core.parallel.merge import NOTHING, merge_, wide
from attn_core.parallel.part import options_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attn_core.parallel.preparation import Prepared
    from attn_core.parallel.sight import Piece

Shapes = tuple[torch.Size, torch.Size]


class Ring:
    """One pass round the ring, forward or backward, as this rank takes part in it.

    Args:
        prepared: the kind of call.
        key: this rank's own.
        value: this rank's own.
    """

    def __init__(self, prepared: Prepared, key: torch.Tensor, value: torch.Tensor) -> None:
        self.cp = prepared.kind.cp
        self.course = prepared.course
        self.tag = prepared.tag
        self.places = self.cp.ring
        self.place = self.cp.place[0]
        self.rounds = max(self.course.last) + 1
        self.key, self.value = key, value
        self.lengths = [sum(map(len_, segments)) for segments in prepared.key_pieces]

    def source(self, step: int) -> int:
        """The place whose chunk is here at a step."""
        return (self.place - step) % self.places

    @property
    def onward(self) -> int:
        """The place that chunks go to."""
        return (self.place + 1) % self.places

    def here(self, step: int) -> bool:
        """Whether a chunk is here at a step, and anybody has use for it."""
        return step <= self.course.last[self.source(step)]

    def pieces(self, step: int) -> tuple[Piece, ...]:
        """What this rank computes at a step."""
        steps = self.course.steps[self.place]
        return steps[step] if step < len(steps) else ()

    def buffers(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Room for two chunks of keys and values, or of their gradients, whichever place they come from."""
        longest = max(self.lengths)
        size = sum(tensor.shape[0] * longest * tensor.shape[2] * tensor.shape[3] for tensor in (self.key, self.value))
        return [self.key.new_empty(size, dtype=dtype) for _ in range(2)]

    def message(self, buffer: torch.Tensor, source: int) -> torch.Tensor:
        """The part of a buffer that a chunk from a place takes."""
        return buffer[: sum(self._sizes(source))]

    def opened(self, buffer: torch.Tensor, source: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The two tensors that a message holds."""
        sizes = self._sizes(source)
        first, second = self.message(buffer, source).split(sizes)
        return first.view(self._shape(self.key, source)), second.view(self._shape(self.value, source))

    def _shape(self, tensor: torch.Tensor, source: int) -> tuple[int, ...]:
        return tensor.shape[0], self.lengths[source], tensor.shape[2], tensor.shape[3]

    def _sizes(self, source: int) -> list[int]:
        rows = self.key.shape[0] * self.lengths[source]
        return [rows * tensor.shape[2] * tensor.shape[3] for tensor in (self.key, self.value)]

    def chunks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The chunks that come by, with their steps, this rank's own first. The next is on its way while one is at hand.

        A step at which nothing is here has nothing to compute; it is told all the same, since all ranks post their messages
        in one order.
        """
        if self.rounds == 1:
            yield 0, self.key, self.value
            return
        buffers = self.buffers(self.key.dtype)
        own = self.opened(buffers[0], self.place)
        own[0].copy_(self.key)
        own[1].copy_(self.value)
        for step in range(self.rounds):
            current, following = buffers[step % 2], buffers[(step + 1) % 2]
            goes = step < self.course.last[self.source(step)]
            comes = step + 1 < self.rounds and self.here(step + 1)
            transfer = Transfer(
                self.cp,
                [(self.message(current, self.source(step)), self.onward)] if goes else [],
                [(self.message(following, self.source(step + 1)), self.source(1))] if comes else [],
                "keys",
                self.tag,
            )
            yield step, *self.opened(current, self.source(step))
            transfer.wait()


def len_(segment: Any) -> int:
    """The length of a segment."""
    return int(segment.length)


# --- forward ------------------------------------------------------------------------------------------------------------


class Partial:
    """The result so far of this rank's queries."""

    def __init__(self, query: torch.Tensor, value: torch.Tensor) -> None:
        batch, length, heads, _ = query.shape
        dtype = wide(query.dtype)
        self._new = (
            lambda: query.new_zeros(batch, length, heads, value.shape[3], dtype=dtype),
            lambda: query.new_full((batch, heads, length), NOTHING, dtype=dtype),
        )
        self._length = length
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, piece: Piece, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge the result of a piece in."""
        if self._found is None and piece.queries.length == self._length:
            self._found = self._own(out), self._own(lse)
            return
        whole, whole_lse = self.finished()
        rows = slice(*piece.queries)
        merge_(whole[:, rows], whole_lse[:, :, rows], out, lse)

    def finished(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The result and its lse."""
        if self._found is None:
            self._found = self._new[0](), self._new[1]()
        return self._found

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first part, in memory that may be written over."""
        found = tensor.to(wide(tensor.dtype))
        overlaps = any(stride == 0 and size > 1 for stride, size in zip(found.stride(), found.shape, strict=True))
        return found.contiguous() if overlaps else found


@torch.library.custom_op("attn_core::ring", mutates_args=())
def _ring(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Sequence[torch.Tensor], kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = parsed(kind)
    if found.mode == "ring":
        begun(found.cp)
    prepared = agreed(completed(kind, query, key, mask))
    with told(prepared.kind.cp), torch.no_grad():
        out, lse = _forward(prepared, query, key, value, _dense(prepared, mask, query))
        return out, lse, torch.tensor(lengths_of(prepared.kind) if found.keys is None else [], dtype=torch.int64)


def _forward(
    prepared: Prepared, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    going = Ring(prepared, key, value)
    options = {**prepared.options, **prepared.deterministic[0], "return_lse": True}
    partial = Partial(query, value)
    for step, keys, values in going.chunks():
        for piece in going.pieces(step):
            rows, columns = slice(*piece.queries), slice(*piece.keys)
            hidden = options_of(piece, mask, prepared.kind.mask, prepared.key_pieces[going.source(step)])
            found = prepared.adapter.forward(query[:, rows], keys[:, columns], values[:, columns], **options, **hidden)
            partial.add(piece, *found)
    out, lse = partial.finished()
    return out.to(query.dtype).contiguous(), lse.contiguous()  # as compiled code has been told


@_ring.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,  # noqa: ARG001
    value: torch.Tensor,
    mask: Sequence[torch.Tensor],  # noqa: ARG001
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[3])
    lengths = torch.empty(how_many_lengths(parsed(kind)), dtype=torch.int64, device="cpu")
    return out, query.new_empty(batch, heads, length, dtype=wide(query.dtype)), lengths


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
    out, lse, _ = _ring(query, key, value, list(mask), kind)  # the lengths are for the backward of compiled code
    return out, lse


# --- backward -----------------------------------------------------------------------------------------------------------


class Gradients:
    """The gradients of keys and values, which travel one step behind their chunk and are added to at each place.

    Two buffers: one to add to, and one under way. Where chunks end their course at different steps, the own gradient
    comes home into a third.
    """

    def __init__(self, going: Ring) -> None:
        self._ring = going
        self._buffers = going.buffers(wide(going.key.dtype))
        self._buffers[0].zero_()
        self._home: torch.Tensor | None = None
        self._transfer: Transfer | None = None

    def arrived(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where to add what this rank computes for the chunk that is here."""
        self._wait()
        buffer = self._buffers[step % 2]
        return self._ring.opened(buffer, self._ring.source(step))

    def pass_on(self, step: int) -> None:
        """Send those of the chunk that is here on, or home where its course ends; receive those of the next."""
        self._wait()  # where nothing was added at this step
        ring, last = self._ring, self._ring.course.last
        source, coming = ring.source(step), ring.source(step + 1)
        sending, receiving = [], []
        if ring.here(step) and last[source] > 0:
            target = ring.onward if step < last[source] else source
            sending.append((ring.message(self._buffers[step % 2], source), target))
        if step + 1 < ring.rounds and ring.here(step + 1):
            receiving.append((ring.message(self._buffers[(step + 1) % 2], coming), ring.source(1)))
        if last[ring.place] == step == 0 and ring.rounds > 1:  # the buffer is needed for others
            self._home = ring.message(self._buffers[0], ring.place).clone()
        elif 0 < last[ring.place] == step:
            free = self._buffers[(step + 1) % 2] if step + 1 == ring.rounds else torch.empty_like(self._buffers[0])
            self._home = ring.message(free, ring.place)
            receiving.append((self._home, (ring.place + step) % ring.places))
        self._transfer = Transfer(ring.cp, sending, receiving, "gradients", ring.tag)

    def own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of this rank's keys and values, complete."""
        self._wait()
        buffer = self._buffers[0] if self._home is None else self._home
        return self._ring.opened(buffer, self._ring.place)

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
    prepared = agreed(completed(kind, query, key, mask, lengths.tolist()))
    with told(prepared.kind.cp), torch.no_grad():
        return _backward(prepared, (grad_out, query, out, lse), key, value, _dense(prepared, mask, query))


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
    going = Ring(prepared, key, value)
    gradients = Gradients(going)
    grad_query = torch.zeros_like(query, dtype=wide(query.dtype), memory_format=torch.contiguous_format)
    for step, keys, values in going.chunks():
        for piece in going.pieces(step):
            rows, columns = slice(*piece.queries), slice(*piece.keys)
            hidden = options_of(piece, mask, prepared.kind.mask, prepared.key_pieces[going.source(step)])
            found = backward(
                grad_out[:, rows], query[:, rows], keys[:, columns], values[:, columns],
                out[:, rows], lse[:, :, rows].contiguous(), **options, **hidden,
            )  # fmt: skip
            grad_query[:, rows] += found[0]
            grad_keys, grad_values = gradients.arrived(step)
            grad_keys[:, columns] += found[1]
            grad_values[:, columns] += found[2]
        gradients.pass_on(step)
    grad_key, grad_value = gradients.own()
    return grad_query.to(query.dtype), _as(grad_key, key), _as(grad_value, value)


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
    ctx.save_for_backward(query, key, value, *output, *mask)
    ctx.kind = kind


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
