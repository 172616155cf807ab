"""Bytes that a rank sends, counted, against the formulas; and the keys that it holds, whatever the world.

With a sequence of S positions on P = R x U ranks (R places of a ring, U ranks that share the heads of a place), H query heads,
K key heads of which a place has k = K / U or 1, head dims D and V, batch B, e bytes an element and w an element in float32 (or
float64), a chunk has C = B S/R k (D + V) elements, and a rank sends

    ring, forward      (R - 1) C e
    ring, backward     (R - 1) C e + R C w        keys again, and their gradients round and home; nothing where R = 1
    ulysses, forward   (U - 1) B S/P (H/U + k) (D + V) e
    ulysses, backward  the same
    hybrid             both sums, the ring's with the chunk of a place of all its U ranks

causal or not, in zigzag order. In contiguous order under causal, chunks are not sent to who sees nothing of them: place r sends
(r + 1) C e of keys, the last none, and (r + 1) C w of gradients, the last (R - 1) C w.
"""

from __future__ import annotations

import torch
from processes import on_ranks
from reporting import keep, table
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

from attn_core import attention
from attn_core.parallel import ContextParallel, communication

SHAPES = [(2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 2), (4, 2)]
CASES = [("zigzag", False), ("zigzag", True), ("contiguous", True)]
HEADS = [(8, 8), (8, 2)]
TOKENS, DIMS, BATCH = 16, (16, 8), 1
HELD_TOKENS = 512


def add_options(parser):
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8], help="for the keys that a rank holds")


def run(options):
    answers = on_ranks(max(options.worlds), "section_bytes:everything", options.worlds)
    counted = rows_of([answer["sent"] for answer in answers])
    table(
        f"Bytes sent by each rank, {TOKENS} positions a rank, head dims {DIMS}, float32: counted, and of the formula",
        ["ring x ulysses", "order", "causal", "heads", "forward", "formula", "backward", "formula", "equal"],
        [row_of(row) for row in counted],
    )
    assert all(row["forward"] == row["forward formula"] for row in counted)
    assert all(row["backward"] == row["backward formula"] for row in counted)
    held = answers[0]["held"]
    table(
        f"Memory of a rank, {HELD_TOKENS} positions a rank, bfloat16: chunks of keys and values that the peak grows by when a "
        "chunk does, and the peak with torch's flash kernel, MiB",
        ["world", "forward, chunks", "backward, chunks", "forward, MiB", "backward, MiB", "calls of torch.distributed"],
        [list(row.values()) for row in held],
    )
    keep(options.json, "bytes", {"sent": counted, "held": held})


def rows_of(by_rank):
    """A row for each case, with what each of its ranks counted and what the formulas say."""
    rows = []
    for case in by_rank[0]:
        shape, order, causal, heads = case
        row = {"shape": shape, "order": order, "causal": causal, "heads": heads}
        found = [sent[case] for sent in by_rank[: shape[0] * shape[1]]]
        said = [formula(shape, divmod(rank, shape[1]), heads, order, causal) for rank in range(len(found))]
        for nth, way in enumerate(("forward", "backward")):
            row[way] = [pair[nth] for pair in found]
            row[f"{way} formula"] = [pair[nth] for pair in said]
        rows.append(row)
    return rows


def everything(worlds):
    """On each rank: what it sends in each case, and what it holds in a ring of each world."""
    meshes = {shape: mesh_of(shape) for shape in dict.fromkeys([*SHAPES, *((world, 1) for world in worlds)])}
    return {
        "sent": counts(meshes),
        "held": [holding(meshes[world, 1], world) for world in worlds if meshes[world, 1].get_coordinate()],
    }


def row_of(row):
    """The cells of a row; one number where all ranks send as much."""
    cells = [summed(row[name]) for name in ("forward", "forward formula", "backward", "backward formula")]
    equal = row["forward"] == row["forward formula"] and row["backward"] == row["backward formula"]
    return [f"{row['shape'][0]} x {row['shape'][1]}", row["order"], row["causal"], row["heads"], *cells, equal]


def summed(numbers):
    """One number for all ranks, or the smallest and the largest."""
    return numbers[0] if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"


# --- what is sent -------------------------------------------------------------------------------------------------------


def counts(meshes):
    """What this rank sends in each case that it takes part in."""
    found = {}
    for shape in SHAPES:
        for order, causal in CASES:
            if meshes[shape].get_coordinate() is None or (order == "contiguous" and shape[0] == 1):
                continue
            cp = ContextParallel(meshes[shape], order=order)
            for heads in HEADS:
                found[shape, order, causal, heads] = counted(cp, heads, causal)
    return found


def mesh_of(shape):
    """The first ranks; made by all, in one order."""
    ranks, names = torch.arange(shape[0] * shape[1]), ("ring", "ulysses")
    if 1 in shape:
        return DeviceMesh("cpu", ranks, mesh_dim_names=(names[shape[0] == 1],))
    return DeviceMesh("cpu", ranks.view(shape), mesh_dim_names=names)


def counted(cp, heads, causal):
    """Bytes that this rank sends forward, and backward."""
    q, k, v = drawn(cp, heads, TOKENS, DIMS, torch.float32)
    communication.sent.clear()
    out = attention(q, k, v, causal=causal, backend="native_math", parallel=cp)
    forward = sum(communication.sent.values())
    out.sum().backward()
    return forward, sum(communication.sent.values()) - forward


def drawn(cp, heads, tokens, dims, dtype):
    """Query, key and value of this rank."""
    cp.layout(tokens * cp.size)
    shapes = [(heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1])]
    return [torch.randn(BATCH, tokens, count, dim, dtype=dtype).requires_grad_() for count, dim in shapes]


def formula(shape, place, heads, order, causal):
    """Bytes forward and backward that the rank at a place of the grid sends."""
    (ring, ulysses), r = shape, place[0]
    element = wide = 4
    key_heads = max(heads[1] // ulysses, 1)
    chunk = BATCH * TOKENS * ulysses * key_heads * sum(DIMS)
    keys, gradients = ring - 1, ring
    if order == "contiguous" and causal:
        keys = r + 1 if r < ring - 1 else 0
        gradients = r + 1 if r < ring - 1 else ring - 1
    if ring == 1:
        keys = gradients = 0
    over_heads = (ulysses - 1) * BATCH * TOKENS * (heads[0] // ulysses + key_heads) * sum(DIMS) * element
    forward = keys * chunk * element + over_heads
    return forward, forward + gradients * chunk * wide


# --- what is held -------------------------------------------------------------------------------------------------------


def holding(mesh, world):
    """Peaks of a rank's memory in a ring of a world; what the ranks call each other by."""
    cp = ContextParallel(mesh)
    slopes = {}
    small, large = peaks(cp, 4, stub=True), peaks(cp, 8, stub=True)
    chunk = BATCH * HELD_TOKENS * 4 * (64 + 64) * 2  # the difference, in bytes
    for way in ("forward", "backward"):
        slopes[f"{way} chunks"] = (large[way] - small[way]) / chunk
    real = peaks(cp, 8, stub=False)
    return {
        "world": world,
        **slopes,
        "forward peak": real["forward"] / 2**20,
        "backward peak": real["backward"] / 2**20,
        "calls": ", ".join(real["calls"]),
    }


def peaks(cp, key_heads, *, stub):
    """Bytes above what there was before, forward and backward, and the operators of torch.distributed that ran.

    With a stub for a kernel that makes nothing of the size of the keys, what grows with them is what the ring itself holds.
    """
    q, k, v = drawn(cp, (8, key_heads), HELD_TOKENS, (64, 64), torch.bfloat16)
    how = {"causal": True, "backend": "native_flash", "parallel": cp}
    grad = torch.randn_like(q)
    torch.autograd.grad(attention(q, k, v, **how), (q, k, v), grad)
    restore = stubbed(cp) if stub else lambda: None
    found = {}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        out = attention(q, k, v, **how)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        torch.autograd.grad(out, (q, k, v), grad)
    restore()
    found["forward"], found["backward"] = peak(forward), peak(backward)
    events = [event.name for recorded in (forward, backward) for event in recorded.events()]
    found["calls"] = sorted({name for name in events if name.startswith(("c10d::", "gloo:"))})
    return found


def stubbed(cp):
    """Have the kernels of all kinds of call on a context do nothing, and take nothing as large as keys."""
    prepared = list(cp.shared.kinds.values())
    kept = [(one.adapter, one.adapter.forward, one.adapter.backward) for one in prepared]

    def forward(query, key, value, **options):
        batch, length, heads, _ = query.shape
        return query.new_zeros(batch, length, heads, value.shape[3]), query.new_zeros(batch, heads, length).float()

    def backward(grad_out, query, key, value, out, lse, **options):
        return query, key, value

    for adapter, *_ in kept:
        object.__setattr__(adapter, "forward", forward)
        object.__setattr__(adapter, "backward", backward)

    def restore():
        for adapter, *functions in kept:
            object.__setattr__(adapter, "forward", functions[0])
            object.__setattr__(adapter, "backward", functions[1])

    return restore


def peak(recorded):
    """The most bytes above the start that were allocated at once."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
