"""``ContextParallel``: a mesh of ranks over which sequences lie, and how they lie there."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from attn_core.errors import AttnError, CallRefused
from attn_core.parallel import gathering
from attn_core.parallel.faults import tell_of_the_end
from attn_core.parallel.layout import ORDERS, Layout, even

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from attn_core.parallel.layout import Segments

RING, ULYSSES = "ring", "ulysses"
Side = Literal["query", "key"]

LAYOUTS_REMEMBERED = 64
"""Of how many sequences it is remembered how they lie; the ranks ask each other of what was forgotten."""

OPERATORS = 2
"""Which form of the operators a handle is for, to be raised with each change of their signatures or gradients."""

turns: dict[tuple[int, ...], Any] = {}
"""By ranks: held by the thread that has a call over them going on, whatever their grid and order."""
contexts: dict[str, ContextParallel] = {}
"""By handle, for the operators, which take no objects."""

tell_of_the_end(contexts)


@dataclass
class Shared:
    """What all that were made for one grid remember together.

    Attributes:
        layouts: of the sequences that were sharded, or told of; the last of them last.
        latest: the last of them.
        known: what ``known_layout`` has found among them.
        told: the last two in words, which compiled code guards.
        calls: how many were begun; the same on every rank, so that a failure belongs to a call.
        going: whether a call that was begun here is still read; what compiled code runs begins calls by itself.
        points: at how many points of the call that is going on the ranks have spoken.
        exchanges: how often the ranks have spoken to one another.
        spoken: the keys of the store under which this rank has done so, until all have read them.
        kinds: of calls that all ranks have agreed on, with what was prepared for them.
        current: what was prepared for the call that is going on.
    """

    layouts: dict[Layout, None] = field(default_factory=dict)
    latest: Layout | None = None
    known: dict[int, Layout] = field(default_factory=dict)
    told: str = ""
    calls: int = 0
    going: bool = False
    points: int = 0
    exchanges: int = 0
    spoken: list[str] = field(default_factory=list)
    kinds: dict[str, Any] = field(default_factory=dict)
    current: Any = None

    def remember(self, layout: Layout) -> None:
        """That it was sharded, or told of, last; the one that was told of longest ago is forgotten where there are many."""
        if layout not in self.layouts:
            self.known.clear()
        self.layouts.pop(layout, None)  # to be the last
        self.layouts[layout] = None
        self.latest = layout
        if len(self.layouts) > LAYOUTS_REMEMBERED:
            del self.layouts[next(iter(self.layouts))]

    def begin(self) -> None:
        """Begin a call, on every rank."""
        self.calls += 1
        self.points = 0


class ContextParallel:
    """Sequences spread over the ranks of a mesh.

    Every rank makes it alike, and shards alike: what it remembers of lengths is then the same on each.

    Args:
        mesh: its dimension named "ring", or the one named "ulysses", or both; other dimensions (data, tensor) are left
            alone.
        order: "zigzag" gives each ring place a chunk from each end of the sequence, so that under causal all have as
            much to do; "contiguous" one piece in order.

    Attributes:
        name: what all ranks alike call it.
        handle: what the operators of this rank are given in its place. torch keeps what it compiled on disk, where other ranks
            and later launches find it, and knows a graph by its text: so the text has all that this rank's graphs depend on,
            which form the operators have, this rank's place, and the process groups.
        ring_ranks: the global ranks of this rank's ring, by place.
        staged: which of "ring" and "ulysses" send no tensors of a GPU, but copies of them on the host.
        ring: how many places the ring has, 1 where the mesh has no such dimension.
        ulysses: the same of ulysses.
        mode: which way: ring, ulysses or hybrid.
        whole: which of "query" and "key" are given whole on every rank, see ``given_whole``.
        sides: the same, in order.

    Raises:
        CallRefused: when the mesh has neither dimension, or the order is unknown.
    """

    def __init__(self, mesh: DeviceMesh, *, order: str = "zigzag") -> None:
        names = tuple(name for name in (RING, ULYSSES) if name in (mesh.mesh_dim_names or ()))
        if not names:
            msg = (
                f"ContextParallel: found a mesh with dimensions {mesh.mesh_dim_names}; accepted: one named 'ring', one named "
                "'ulysses', or both, as init_device_mesh(..., mesh_dim_names=('ring', 'ulysses')) makes"
            )
            raise CallRefused(msg)
        if mesh.get_coordinate() is None:
            msg = f"ContextParallel: found a mesh without this rank, of {mesh.mesh.tolist()}; accepted: a rank of the mesh"
            raise CallRefused(msg)
        if order not in ORDERS:
            msg = f"ContextParallel: order: found {order!r}; accepted: {', '.join(ORDERS)}"
            raise CallRefused(msg)
        from attn_core.parallel import tracing  # noqa: F401 - what makes a call part of compiled code, at hand before there is any

        self.mesh = mesh
        self.order = order
        self.mode = "hybrid" if len(names) > 1 else names[0]
        self.whole: frozenset[str] = frozenset()
        self.sides: tuple[str, ...] = ()
        self._groups = {name: mesh.get_group(name) for name in names}
        self._place = {name: mesh.get_local_rank(name) for name in names}
        self.ring = self._groups[RING].size() if RING in names else 1
        self.ulysses = self._groups[ULYSSES].size() if ULYSSES in names else 1
        self.grid = _grid(mesh, names, self.ring, self.ulysses)
        self.ring_ranks = tuple(row[self.place[1]] for row in self.grid)
        self.staged = tuple(name for name in names if dist.get_backend(self._groups[name]) == "gloo")
        self.name = f"{self.mode}:{order}:{self.grid}"
        groups = ",".join(group.group_name for group in self._groups.values())
        self.handle = f"{OPERATORS}:{self.place}:{groups}:{self.name}"
        self.turn = turns.setdefault(tuple(sorted(self.ranks)), RLock())
        for handle, other in tuple(contexts.items()):
            if not other.alive:
                contexts.pop(handle, None)
        alike = (other.shared for other in contexts.values() if other.name == self.name)
        self.shared: Shared = next(alike, None) or Shared()
        contexts[self.handle] = self

    def __repr__(self) -> str:
        return f"ContextParallel(ring={self.ring}, ulysses={self.ulysses}, order={self.order!r})"

    # --- the grid -----------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many ranks share a sequence."""
        return self.ring * self.ulysses

    @property
    def place(self) -> tuple[int, int]:
        """Where this rank is on the grid: ring place, ulysses place."""
        return self._place.get(RING, 0), self._place.get(ULYSSES, 0)

    @property
    def index(self) -> int:
        """The place in one number: that of this rank's part among ``lengths`` given flat."""
        ring, ulysses = self.place
        return ring * self.ulysses + ulysses

    @property
    def identity(self) -> tuple[str, tuple[str, ...], str, str]:
        """What makes it what it is, in plain words that compiled code guards.

        Its handle, the sides that are given whole, the mode, and where graphs are made for lengths what it was told of these.
        """
        return self.handle, self.sides, self.mode, "" if self.mode == RING else self.shared.told

    @property
    def alive(self) -> bool:
        """Whether the process groups still are those that it was made with."""
        from torch.distributed import distributed_c10d

        return all(group in distributed_c10d._world.pg_map for group in self._groups.values())

    def group(self, name: str) -> Any:
        """The process group of "ring" or "ulysses", None where the mesh has no such dimension."""
        return self._groups.get(name)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ranks, in the order of the grid."""
        return tuple(rank for row in self.grid for rank in row)

    # --- layouts ------------------------------------------------------------------------------------------------------

    def layout(self, total: int | None = None, lengths: Sequence[int] | None = None) -> Layout:
        """How a sequence lies: of ``total`` positions spread evenly, or of so many on each rank; remembered.

        Raises:
            CallRefused: when the lengths are not one for each rank, or do not add up to the total.
        """
        if lengths is None:
            if type(total) is not int or total < 0:
                msg = f"length: found {total!r}; accepted: a whole number from 0 up"
                raise CallRefused(msg)
            layout = even(total, self.ring, self.ulysses, self.order)
        else:
            layout = self._given(tuple(lengths), total)
        if layout != self.shared.latest:
            self.shared.remember(layout)
            self.shared.told = "; ".join(f"{one.flat}" for one in self.recent)
        return layout

    def _given(self, lengths: tuple[int, ...], total: int | None) -> Layout:
        accepted = f"{self.size} whole numbers from 0 up, one for each rank of the grid" + (
            "" if total is None else f", {total} together"
        )
        fits = len(lengths) == self.size and all(type(length) is int and length >= 0 for length in lengths)
        if not fits or (total is not None and sum(lengths) != total):
            msg = f"lengths: found {lengths}; accepted: {accepted}"
            raise CallRefused(msg)
        return self.layout_on(lengths)

    def layout_on(self, lengths: Sequence[int]) -> Layout:
        """How a sequence lies that has so many positions on each rank, in the order of the grid."""
        rows = tuple(tuple(lengths[start : start + self.ulysses]) for start in range(0, self.size, self.ulysses))
        return Layout(rows, self.order)

    @property
    def recent(self) -> list[Layout]:
        """The last two sequences that were sharded, or told of, the last one first: keys and queries, say."""
        return list(self.shared.layouts)[:-3:-1]

    def known_layout(self, local: int) -> Layout | None:
        """The layout whose part here has this length; None where none is known, or where some rank could not tell which.

        The answer, whether there is one, is the same on every rank, as long as all were told of the same layouts.
        """
        found = self.shared.known.get(local)
        if found is None:
            mine = [layout for layout in self.shared.layouts if layout.flat[self.index] == local]
            if len(mine) != 1 or any(_alike(mine[0], other) for other in self.shared.layouts):
                return None
            found = self.shared.known[local] = mine[0]
        return found

    def looks_whole(self, local: int) -> bool:
        """Whether a tensor of this length is rather a sequence that was sharded here than a part of one."""
        totals = {layout.total for layout in self.shared.layouts}
        return (
            self.size > 1
            and local in totals
            and all(layout.flat[self.index] != local for layout in self.shared.layouts)
        )

    def given_whole(self, side: Side) -> ContextParallel:
        """The same, for calls whose query, or whose key and value, are whole and alike on every rank.

        With whole keys nothing travels in a ring. With a whole query each rank computes its rows, and the result is whole
        on every rank. Gradients of a whole tensor are what this rank's part of the work adds: they sum up over the ranks.

        Args:
            side: "query", or "key" for key and value.
        """
        if side not in ("query", "key"):
            msg = f"given_whole: found {side!r}; accepted: 'query', 'key'"
            raise CallRefused(msg)
        other = object.__new__(ContextParallel)
        other.__dict__.update(self.__dict__)
        other.whole = self.whole | {side}
        other.sides = tuple(sorted(other.whole))
        return other

    # --- tensors ------------------------------------------------------------------------------------------------------

    def shard(self, tensor: torch.Tensor, dim: int = 1, *, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Take this rank's part of a tensor that is whole on every rank.

        The gradient that reaches the whole tensor is that of this part, with zeros elsewhere; over the ranks they sum up.

        Args:
            tensor: whole along ``dim``.
            dim: the dimension of the sequence.
            lengths: how many positions each rank gets, in the order of the grid; as even as can be where not given.
        """
        layout = self.layout(tensor.shape[dim], lengths)
        return gathering.taken(tensor, dim, layout.segments(*self.place))

    def unshard(self, tensor: torch.Tensor, dim: int = 1, *, total: int | None = None) -> torch.Tensor:
        """The whole tensor, in the order of the sequence, from the parts of all ranks.

        The whole is the same on each rank, and so is what is computed of it: the gradient of the part is the part of the
        gradient, and nothing is added up.

        Args:
            tensor: this rank's part.
            dim: the dimension of the sequence.
            total: the length of the whole, where several sequences with parts as long as this were sharded.

        Raises:
            CallRefused: when the layout is not known.
        """
        return gathering.gathered(self, tensor, dim, self.layout_of(tensor.shape[dim], total))

    def positions(self, total: int | None = None, *, device: torch.device | str | None = None) -> torch.Tensor:
        """The positions that this rank holds, int64, in the order in which they lie here.

        Args:
            total: the length of the sequence; that of the last one sharded where not given.
            device: of the result.
        """
        latest = self.shared.latest
        if total is None and latest is None:
            msg = "positions: no sequence has been sharded yet; accepted: positions(total)"
            raise CallRefused(msg)
        layout = latest if latest is not None and total in (None, latest.total) else self.layout(total)
        return positions(layout.segments(*self.place), device)

    def layout_of(self, local: int, total: int | None = None) -> Layout:
        """The one layout known to have a part of this length here, or a refusal."""
        found = [item for item in self.shared.layouts if item.flat[self.index] == local and total in (None, item.total)]
        if total is not None and self.shared.latest in found:
            return self.shared.latest
        if len(found) == 1:
            return found[0]
        known = ", ".join(f"{item.total} in parts of {list(item.flat)}" for item in self.shared.layouts) or "none"
        msg = (
            f"unshard: found a part of {local} positions on this rank, which fits {len(found)} of the known sequences; "
            f"accepted: a part of one ({known}). Pass total=, or tell cp.layout(lengths=[...]) the length on each rank"
        )
        raise CallRefused(msg)


def positions(segments: Segments, device: Any = None) -> torch.Tensor:
    """The positions of segments, one after another."""
    parts = [torch.arange(start, stop, device=device) for start, stop in segments]
    return torch.cat(parts) if parts else torch.arange(0, device=device)


def context(handle: str) -> ContextParallel:
    """Find it by its handle."""
    found = contexts.get(handle)
    if found is None:
        msg = (
            f"parallel: no ContextParallel {handle} is in this process, or its process groups were destroyed; make one as the "
            "process that compiled did"
        )
        raise AttnError(msg)
    return found


def _grid(mesh: DeviceMesh, names: tuple[str, ...], ring: int, ulysses: int) -> tuple[tuple[int, ...], ...]:
    """The global ranks that share this rank's sequence, by ring place and ulysses place."""
    # torch slices a mesh in its own order alone
    within = tuple(name for name in mesh.mesh_dim_names or () if name in names)
    part = mesh if mesh.mesh_dim_names == within else mesh[within if len(within) > 1 else within[0]]
    ranks = (part.mesh if within == names else part.mesh.T).reshape(ring, ulysses).tolist()
    return tuple(tuple(int(rank) for rank in row) for row in ranks)


def _alike(one: Layout, other: Layout) -> bool:
    """Whether some rank can't tell two layouts from the length of its part."""
    return one != other and any(a == b for a, b in zip(one.flat, other.flat, strict=True))
