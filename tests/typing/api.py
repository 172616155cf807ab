"""The types that a user of the wheels sees. Not run: mypy reads it, in the session ``types``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import assert_type

import attn_core
from attn_core import (
    AttnError,
    BackendNotUsable,
    CallRefused,
    KeyPadding,
    Packed,
    attention,
    bind,
    explain,
    list_backends,
    plan,
    set_backend,
    use_backend,
)
from attn_core.plugin import (
    BackendSpec,
    CapabilityRange,
    Constraints,
    ContextParallelSupport,
    Facts,
    No,
    Rule,
    hookimpl,
)

query = torch.randn(1, 8, 2, 16)

# the call: with return_lse a pair, without it a tensor
assert_type(attention(query, query, query), Tensor)
assert_type(attention(query, query, query, causal=True, scale=0.5, window_size=(4, 0), softcap=30.0), Tensor)
assert_type(attention(query, query, query, dropout_p=0.1, deterministic=True, backend="native"), Tensor)
assert_type(attention(query, query, query, backend=("flex", "native")), Tensor)
assert_type(attention(query, query, query, return_lse=True), tuple[Tensor, Tensor])

# masks
lengths = torch.tensor([0, 3, 8], dtype=torch.int32)
attention(query, query, query, attn_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
attention(query, query, query, attn_mask=KeyPadding(torch.ones(1, 8, dtype=torch.bool)))
attention(query, query, query, attn_mask=Packed(lengths, lengths, max_seqlen_q=5, max_seqlen_k=5))

# refused by the type checker as by the call
attention(query, query, query, attn_mask="causal")  # type: ignore[call-overload]
attention(query, query, query, window_size=4)  # type: ignore[call-overload]
attention(query, query, query, True)  # type: ignore[call-overload]

# choosing
assert_type(set_backend("native"), None)
with use_backend("flex", "native"):
    attention(query, query, query)
assert_type(bind(torch.nn.Identity(), "native").remove(), None)

# asking
names: list[str] = [row.name for row in list_backends()]
reasons: list[str | None] = [row.reason for row in list_backends()]
told: str = str(explain(query, query, query, causal=True))
resolved = plan(query, query, query, causal=True)
assert_type(resolved.backend, str)
resolved(query, query, query)

# errors
refusals: Sequence[type[AttnError]] = [BackendNotUsable, CallRefused]
version: str = attn_core.__version__


@hookimpl
def attn_backends() -> Iterator[BackendSpec]:
    yield BackendSpec(
        api=1,
        name="acme",
        summary="Acme fused attention for Hopper",
        forward="acme_attn.kernel:forward",
        needs="kernel",
        constraints=Constraints(
            platforms={"cuda"},
            compute_capability={(9, 0)},
            dtypes={"float16", "bfloat16"},
            head_dims=range(8, 257, 8),
            masks={"none"},
            causal=True,
            lse=True,
            dropout=No("the kernel keeps no random state"),
            backward=No("inference only"),
            rules=[Rule("causal needs as many keys as queries", lambda facts: facts.causal and facts.cross_lengths)],
        ),
        context_parallel=ContextParallelSupport(ring=True, ulysses=True, hybrid=True),
    )


assert_type(attn_backends(), Iterator[BackendSpec])
admitted: bool = not Constraints(
    platforms={"cuda"}, compute_capability=CapabilityRange((8, 0)), dtypes={"float16"}, masks={"none"}
).reasons(Facts(platform="cuda"))
