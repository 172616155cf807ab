"""Never edited: see README.md."""

from attn_core.plugin import BackendSpec, Backward, Constraints, ContextParallelSupport, Exact, No, Rule, hookimpl


@hookimpl
def attn_backends():
    yield BackendSpec(
        api=1,
        name="frozen_1",
        summary="attention in plain torch, written against version 1",
        forward="attn_frozen_1_kernels:forward",
        backward="attn_frozen_1_kernels:backward",
        aliases={"frozen"},
        constraints=Constraints(
            platforms={"cpu"},
            dtypes={"float32", "float64"},
            masks={"none": True, "bool": True, "key_padding": True, "float": No("it has no additive masks")},
            head_dims=range(1, 257),
            causal=True,
            gqa=True,
            cross_lengths=True,
            value_head_dim=No("values have the head dim of keys"),
            window_size=No("it has no window"),
            softcap=True,
            dropout=No("it has no dropout"),
            lse=True,
            deterministic=True,
            backward=Backward(softcap=No("the slope of the softcap is not implemented")),
            rules=(Rule("a mask beside causal is not implemented", lambda facts: facts.causal and facts.mask != "none"),),
        ),
        context_parallel=ContextParallelSupport(ring=True, ulysses=True),
        numerics=Exact(),
        compile=No("it was never traced"),
    )
