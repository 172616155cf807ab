"""On a GPU: streams, and graphs that are captured once and replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attn_core.testing.checking import check
from attn_core.testing.outcomes import NotChecked
from attn_core.testing.trying import made, reference_of, tried, within

if TYPE_CHECKING:
    from attn_core.declaration import BackendSpec
    from attn_core.testing.subject import Subject

WAIT = 50_000_000
"""GPU cycles, some tens of milliseconds, by which a stream is kept behind the others."""


def _on_gpu(spec: BackendSpec) -> bool:
    return any({"cuda", "rocm"} & set(item.platforms or ()) for item in spec.alternatives)


def _require_gpu(subject: Subject) -> None:
    if subject.device.type != "cuda":
        msg = "this machine has no GPU that it is for"
        raise NotChecked(msg)


@check("streams", when=_on_gpu)
def streams(subject: Subject) -> str:
    """A call runs on the current stream, behind what was queued there."""
    _require_gpu(subject)
    cases = subject.draw(6, "mask", "causal", "dtype", "return_lse")
    for case in cases:
        built, source = made(case), made(case, seed=case.seed + 1)
        if tried(subject, built) is None:
            continue
        expected, allowed = reference_of(made(case), case)
        tensors = {name: getattr(built, name).clone() for name in ("query", "key", "value")}
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for name in tensors:
                getattr(built, name).copy_(getattr(source, name))
            torch.cuda._sleep(WAIT)  # noqa: SLF001 (no public name)
            for name, tensor in tensors.items():
                getattr(built, name).copy_(tensor)
            found = tried(subject, built)
        torch.cuda.synchronize()
        if found is not None:
            within(found[0], expected["out"], allowed["out"], subject, "result on a stream of its own", case)
    return f"{len(cases)} calls"


@check("cuda-graphs", when=_on_gpu)
def cuda_graphs(subject: Subject) -> str:
    """A captured call, replayed on new numbers, is right."""
    _require_gpu(subject)
    cases = subject.draw(6, "mask", "causal", "dtype", "return_lse")
    for case in cases:
        built, other = made(case), made(case, seed=case.seed + 1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm = [tried(subject, built) for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        if warm[-1] is None:
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = tried(subject, built)
        with torch.no_grad():
            for name in ("query", "key", "value"):
                getattr(built, name).copy_(getattr(other, name))
        graph.replay()
        torch.cuda.synchronize()
        expected, allowed = reference_of(built, case)
        if found is not None:
            within(found[0], expected["out"], allowed["out"], subject, "result of a replayed graph", case)
    return f"{len(cases)} graphs"
