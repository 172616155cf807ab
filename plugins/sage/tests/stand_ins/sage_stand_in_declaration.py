"""The declarations of attn-sage, for the CPU, where stand-ins of sageattention run. All else is as declared."""

from __future__ import annotations

from dataclasses import replace

from attn_core.plugin import ContextParallelSupport, hookimpl
from attn_sage.declarations import FP8_CUDA, FP8_SM90, FP16_CUDA, FP16_TRITON, SAGE


def _on_cpu(constraints):
    return replace(constraints, platforms={"cpu"}, compute_capability=None, library=None)


def _stand_in(spec, name, forward, *constraints, **changes):
    alternatives = tuple(map(_on_cpu, constraints))
    return replace(
        spec, name=name, aliases=(), forward=forward, needs=None, constraints=alternatives, first_call_compiles=False,
        **changes,
    )  # fmt: skip


def _kernel(spec):
    name = spec.forward.partition(":")[2]
    return _stand_in(spec, f"sage_2_{name}_on_cpu", spec.forward, *spec.alternatives)


FIRST = _stand_in(
    SAGE,
    "sage_1_on_cpu",
    "attn_sage.first:forward",
    SAGE.alternatives[0],
    numerics=replace(SAGE.numerics, error=0.02),
    context_parallel=ContextParallelSupport(ulysses=True),
)
SECOND = _stand_in(SAGE, "sage_2_on_cpu", "attn_sage.second:automatic", SAGE.alternatives[2])


@hookimpl
def attn_backends():
    yield FIRST
    yield SECOND
    yield from map(_kernel, (FP16_TRITON, FP16_CUDA, FP8_CUDA, FP8_SM90))
