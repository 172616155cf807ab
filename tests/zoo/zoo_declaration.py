"""Declares the liars, and the honest ones beside them."""

from dataclasses import replace

from attn_core.plugin import Constraints, No, Rule, hookimpl


class Loose(Constraints):
    """Admits everything, whatever it declares."""

    def reasons(self, facts):
        return []


@hookimpl
def attn_backends():
    import zoo_kernels
    import zoo_surroundings  # noqa: F401 (it adds to the lies)

    from attn_example.plugin import attn_backends as example

    (honest,) = example()
    whole = replace(honest, aliases=(), constraints=honest.alternatives[:1])
    limits = whole.alternatives[0]
    yield replace(whole, name="honest")
    for name, (_, changes) in zoo_kernels.LIES.items():
        given = dict(changes)
        abilities = {key: given.pop(key) for key in ("dropout", "mask_gradient") if key in given}
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
