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


def particular(whole, limits):
    """Honest ones that serve one thing alone, or refuse lengths when run."""
    narrow = {**vars(limits), "dtypes": {"float32"}, "softcap": No("no"), "value_head_dim": No("no")}
    eights = (Rule("query heads in eights", lambda facts: facts.heads % 8 != 0),)
    groups = (Rule("8 query heads to a key head", lambda facts: facts.heads != 8 * facts.key_heads),)
    one_key = (Rule("one key head", lambda facts: facts.key_heads != 1),)
    windows = (Rule("windows alone", lambda facts: facts.window_size is None),)
    for name, rules in (("eights", eights), ("groups_of_8", groups), ("one_key_head", one_key), ("windows", windows)):
        yield replace(whole, name=f"honest_for_{name}", constraints=Constraints(**{**narrow, "rules": rules}))
    alone = partial(replace, whole, context_parallel=No("no"))
    yield alone(name="honest_for_packed", constraints=Constraints(**{**narrow, "masks": {"packed"}}))
    yield alone(name="honest_in_blocks", constraints=Constraints(**narrow), forward="zoo_refusing:in_blocks")
    decoding = {**narrow, "backward": No("inference alone")}
    yield alone(
        name="honest_decoding", constraints=Constraints(**decoding), forward="zoo_refusing:decoding", backward=None
    )


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
    yield from particular(whole, limits)
    for name, (_, changes) in zoo_kernels.LIES.items():
        given = dict(changes)
        abilities = {key: given.pop(key) for key in ("dropout", "mask_gradient", "vmap") if key in given}
        if given.pop("context_parallel", None):
            given["context_parallel"] = No("it is no kernel for that")
        yield replace(whole, name=name, constraints=replace(limits, **abilities), **given)
    yield replace(whole, name="softcap_beside_causal_refused_when_run", forward="zoo_refusing:softcap_beside_causal")
    without = {**vars(limits), "softcap": No("no softcap"), "rules": ()}
    yield replace(whole, name="no_that_is_admitted", constraints=Loose(**without))
    everything = Rule("softcap is not for everybody", lambda facts: facts.softcap)
    yield replace(whole, name="ability_that_a_rule_refuses", constraints=replace(limits, rules=(everything,)))
    never = Rule("never holds", lambda facts: False)
    yield replace(whole, name="rule_that_never_fires", constraints=replace(limits, rules=(never,)))
    eight = Rule("softcap needs a head dim of 4096", lambda facts: facts.softcap and facts.head_dim != 4096)
    yield replace(whole, name="ability_for_nobody", constraints=replace(limits, rules=(eight,)))
