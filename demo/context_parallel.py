"""One sequence over several processes: ``torchrun --nproc-per-node 4 demo/context_parallel.py``.

Each process holds a part of the sequence, and all together get what one device would: forward and gradients. On CPU it
speaks over gloo, on GPUs over NCCL.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attn_core import attention
from attn_core.parallel import ContextParallel


def main() -> None:
    """Attend to a causal sequence over a ring of two by ulysses over the rest, and compare with one device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = int(os.environ["WORLD_SIZE"])  # torchrun sets it
    ring = 2 if world % 2 == 0 else world
    mesh = init_device_mesh(device, (ring, world // ring), mesh_dim_names=("ring", "ulysses"))
    cp = ContextParallel(mesh)
    torch.manual_seed(0)  # every rank draws the same whole sequence here; a training loop reads only its part
    whole = [torch.randn(1, 1001, heads, 64, device=device) for heads in (8, 2, 2)]
    query, key, value = (cp.shard(tensor).requires_grad_() for tensor in whole)
    out = attention(query, key, value, causal=True, parallel=cp)

    leaves = [tensor.double().requires_grad_() for tensor in whole]
    expected = attention(*leaves, causal=True, backend="native_math")
    gradients = torch.autograd.grad(expected.sum(), leaves)
    found = (out, *torch.autograd.grad(out.sum(), (query, key, value)))
    errors = [(cp.unshard(part) - right).abs().max() for part, right in zip(found, (expected, *gradients), strict=True)]
    print(
        f"rank {dist.get_rank()}: {query.shape[1]} of {whole[0].shape[1]} positions, from {cp.positions()[0]} on; "
        f"largest error of out, dq, dk, dv: {', '.join(f'{error:.1e}' for error in errors)}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
