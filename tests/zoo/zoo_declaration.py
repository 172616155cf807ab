"""Declares the liars, and the honest ones beside them."""

from dataclasses import replace
from functools import partial

from attn_core.plugin import Constraints, No, Rule, hookimpl


class Loose(Constraints):
    """Admits everything, whatever it declares."""

    def reasons(self, facts):
        return []


def narrow(whole, limits):
    """Honest ones that serve little, by several alternatives or by rules."""
    little = {
        **vars(limits), "masks": {"none"}, "window_size": No("no"), "softcap": No("no"), "value_head_dim": No("no"),
        "backward": No("no"), "deterministic": No("no"), "rules": (),
    }  # fmt: skip
    wide = {**little, "dtypes": {"bfloat16"}, "head_dims": {(192, 128)}, "value_head_dim": True}
    latent = {
        **wide,
        "head_dims": {(576, 512)},
        "causal": No("no"),
        "masks": {"none", "key_padding"},
        "window_size": True,
    }
    small = {**little, "dtypes": {"float32"}, "head_dims": {64}, "causal": No("no"), "gqa": No("no"), "lse": No("no")}
    made = partial(replace, whole, backward=None, context_parallel=No("no"))
    yield made(name="honest_for_pairs", constraints=[Constraints(**wide), Constraints(**latent)])
    yield made(name="honest_for_64_and_a_pair", constraints=[Constraints(**small), Constraints(**wide)])
    rules = (
        Rule("at most 8 query heads to a key head", lambda facts: facts.heads > 8 * facts.key_heads),
        Rule("at most 64 heads", lambda facts: facts.heads > 64),
        Rule("float32 only up to a head dim of 224", lambda facts: facts.dtype == "float32" and facts.head_dim > 224),
    )
    yield made(name="honest_by_rules", constraints=Constraints(**{**little, "rules": rules}))
    causal = (Rule("causal only", lambda facts: not facts.causal),)
    yield made(name="honest_for_causal", constraints=Constraints(**{**little, "rules": causal}))
    dtypes = {"float8_e4m3fn"}
    yield made(name="for_float8", constraints=Constraints(**{**little, "dtypes": dtypes}))
    yield made(name="for_float8_too", constraints=Constraints(**{**little, "dtypes": {"bfloat16", *dtypes}}))


@hookimpl
def attn_backends():
    import zoo_corners  # noqa: F401 (it adds to the lies)
    import zoo_kernels
    import zoo_surroundings  # noqa: F401 (it adds to the lies)

    from attn_example.plugin import attn_backends as example

    (honest,) = example()
    whole = replace(honest, aliases=(), constraints=honest.alternatives[:1])
    limits = whole.alternatives[0]
    yield replace(whole, name="honest")
    yield replace(whole, name="honest_compiling", first_call_compiles=True)
    yield from narrow(whole, limits)
    for name, (_, changes) in zoo_kernels.LIES.items():
        given = dict(changes)
        abilities = {key: given.pop(key) for key in ("dropout", "mask_gradient", "vmap") if key in given}
        if given.pop("context_parallel", None):
            given["context_parallel"] = No("it is no kernel for that")
        yield replace(whole, name=name, constraints=replace(limits, **abilities), **given)
    without = {**vars(limits), "softcap": No("no softcap"), "rules": ()}
    yield replace(whole, name="no_that_is_admitted", constraints=Loose(**without))
    everything = Rule("softcap is not for everybody", lambda facts: facts.softcap)
    yield replace(whole, name="ability_that_a_rule_refuses", constraints=replace(limits, rules=(everything,)))
    never = Rule("never holds", lambda facts: False)
    yield replace(whole, name="rule_that_never_fires", constraints=replace(limits, rules=(never,)))
    eight = Rule("softcap needs a head dim of 4096", lambda facts: facts.softcap and facts.head_dim != 4096)
    yield replace(whole, name="ability_for_nobody", constraints=replace(limits, rules=(eight,)))
