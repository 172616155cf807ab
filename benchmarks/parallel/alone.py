"""One rank of a ring without the others: all that it computes, and nothing on its way.

torch's fake process group stands for the others, so that the code under test is the code that runs on many ranks.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from attn_core.parallel import ContextParallel, agreement, ring
from attn_core.parallel.communication import Transfer


class Still(Transfer):
    """A transfer that sends nothing."""

    def start(self):
        """Nothing is under way."""


@contextmanager
def place(rank, places, order="zigzag", device="cpu", *, still=False):
    """The ``ContextParallel`` of one place of a ring.

    Args:
        rank: the place.
        places: of the ring.
        order: of the sequence.
        device: type of device.
        still: whether even the calls to ``torch.distributed`` are left out, and what would arrive is random numbers.
    """
    dist.init_process_group("fake", rank=rank, world_size=places, store=FakeStore())
    kept = agreement.exchanged, ring.Transfer, ring.Ring.rooms
    agreement.exchanged = lambda cp, said: [said] * cp.size
    if still:
        ring.Transfer = Still
        ring.Ring.rooms = _filled(ring.Ring.rooms)
    try:
        yield ContextParallel(DeviceMesh(device, torch.arange(places), mesh_dim_names=("ring",)), order=order)
    finally:
        agreement.exchanged, ring.Transfer, ring.Ring.rooms = kept
        dist.destroy_process_group()


def _filled(rooms):
    """Zeros and what lies around in memory are faster, or slower, than numbers. Keys and gradients differ in dtype here."""
    made = {}

    def found(self, dtype):
        key = (dtype, self.key.shape, self.key.device)
        if key not in made:
            made[key] = rooms(self, dtype)
            for room in made[key]:
                room.memory.normal_()
        return made[key]

    return found
