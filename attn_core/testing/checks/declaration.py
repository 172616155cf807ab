"""The declaration itself: what it imports, whether what it names loads, and whether each word of it is reachable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from attn_core.declaration import Backward, CapabilityRange, Constraints
from attn_core.facts import PLATFORMS, Facts
from attn_core.testing.checking import check
from attn_core.testing.drawing import CHOICES, draw
from attn_core.testing.facing import facts_of
from attn_core.testing.head_dims import many_head_dims, representative_head_dims
from attn_core.testing.outcomes import CheckFailed
from attn_core.testing.subject import PREFERRED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from random import Random

    from attn_core.declaration import BackendSpec, Rule
    from attn_core.testing.subject import Subject

CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
"""Compute capabilities of GPUs from Turing to Blackwell."""
DRAWN = 1500
"""How many calls are drawn to reach what a declaration says, at least."""
MOST = 20 * DRAWN
"""How many, before it counts as never reached."""
ABILITIES = (
    "causal", "gqa", "cross_lengths", "value_head_dim", "window_size", "softcap", "dropout", "lse", "deterministic",
    "mask_gradient", "backward",
)  # fmt: skip


def _more(name: str, *values: Any) -> list[Any]:
    """The choices of a field, more often than not, and these."""
    return [*CHOICES[name], *CHOICES[name], *CHOICES[name], *values]


OPTIONS: Mapping[str, Sequence[Any]] = {
    **CHOICES,
    "heads": _more(
        "heads", (5, 5), (8, 8), (8, 1), (8, 2), (12, 4), (12, 12), (16, 1), (16, 2), (28, 4), (32, 8), (40, 8), (64, 8),
        (64, 1), (71, 1), (96, 96), (128, 128), (128, 1), (256, 2), (512, 8),
    ),
    "window_size": _more(
        "window_size", (127, 127), (128, 0), (257, -1), (-1, 300), (1024, 1023), (4096, 0), (70000, -1)
    ),
    "mask_once": _more("mask_once", *product((False, True), repeat=4)),
}  # fmt: skip
"""What facts are drawn from: more than calls are, since no tensor is made of them."""

_PROBE = """
import json, sys
from attn_core import registry
before = set(sys.modules)
rows = [row.status for row in registry.rows() if row.distribution == sys.argv[1]]
print(json.dumps([rows, sorted(set(sys.modules) - before)]))
"""


@check("declaration-imports", cheap=True)
def declaration_imports(subject: Subject) -> str:
    """Declaring imports neither torch nor a library, so that listing is quick and never breaks."""
    distribution = str(subject.row.distribution)
    environment = {**os.environ, "ATTN_ONLY": distribution, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("ATTN_DISABLE", None)
    command = [sys.executable, "-c", _PROBE, distribution]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 (our own words)
    if done.returncode:
        msg = f"declaring it in a process of its own fails: {done.stderr.strip()[-300:]}"
        raise CheckFailed(msg)
    _, modules = json.loads(done.stdout.splitlines()[-1])
    ours = {"attn_core", "pluggy", "packaging", "importlib_metadata", "zipp", *sys.stdlib_module_names}
    ours |= {subject.spec.forward.partition(".")[0].partition(":")[0], *_own_packages(subject)}
    foreign = sorted({module.partition(".")[0] for module in modules} - ours)
    if foreign:
        msg = f"declaring imports {', '.join(foreign)}; accepted: the standard library, attn_core and the wheel's own modules"
        raise CheckFailed(msg)
    return "in a process of its own"


def _own_packages(subject: Subject) -> set[str]:
    """The packages of the modules that the distribution's entry points name."""
    from attn_core.hookspec import GROUP
    from attn_core.installed import installed

    points = installed()[str(subject.row.distribution)].source.entry_points
    found = {point.value.partition(":")[0].partition(".")[0] for point in points if point.group == GROUP}
    return found | {module for module in sys.modules if module.startswith("__editable__")} | {"_distutils_hack"}


@check("loads", cheap=True)
def loads(subject: Subject) -> str:
    """What the declaration names can be imported, and takes the options that it declares."""
    adapter = subject.adapter
    return f"{subject.spec.forward}" + (f" and {subject.spec.backward}" if adapter.backward else "")


@check("declared-values", cheap=True)
def declared_values(subject: Subject) -> str:
    """Each declared value is admitted in some drawn call; the share that rules refuse is said."""
    random = subject.random("declared values")
    missing, admitted, by_rules = [], 0, 0
    drawn = DRAWN // 5 if subject.quick else DRAWN
    for alternative in subject.spec.alternatives:
        values = dict.fromkeys(_declared_values(alternative))
        bare = _without_rules(alternative)
        pairs = representative_head_dims(alternative.head_dims)
        for turn, facts in enumerate(_drawn_facts(alternative, random, MOST, pairs)):
            if turn >= drawn and not values:
                break
            if bare.reasons(facts):
                continue
            if alternative.reasons(facts):
                by_rules += 1
                continue
            admitted += 1
            for value in _values_of(facts):
                values.pop(value, None)
        missing += [f"{name}: {value}" for name, value in values]
    if missing:
        msg = f"declared, but no drawn call with it is admitted: {', '.join(missing)}"
        raise CheckFailed(msg)
    share = by_rules / max(admitted + by_rules, 1)
    return f"{admitted} drawn calls admitted; rules refuse {share:.0%} of what the data admits"


def _declared_values(alternative: Constraints) -> Iterator[tuple[str, Any]]:
    yield from (("platforms", name) for name in sorted(alternative.platforms or ()))
    yield from (("dtypes", name) for name in sorted(alternative.dtypes or ()))
    yield from (("masks", kind) for kind, ability in alternative.mask_abilities.items() if ability)
    yield from (("head_dims", pair) for pair in representative_head_dims(alternative.head_dims))
    if isinstance(alternative.compute_capability, frozenset):
        yield from (("compute_capability", item) for item in sorted(alternative.compute_capability))
    for name in ABILITIES:
        if getattr(alternative, name) and not (name == "value_head_dim" and alternative.head_dims is not None):
            yield name, True
        if name == "backward" and isinstance(alternative.backward, Backward):
            yield name, True


def _values_of(facts: Facts) -> Iterator[tuple[str, Any]]:
    yield "platforms", facts.platform
    yield "dtypes", facts.dtype
    yield "masks", facts.mask
    yield "head_dims", (facts.head_dim, facts.value_head_dim)
    yield "compute_capability", facts.compute_capability
    asked = {
        "causal": facts.causal, "gqa": facts.gqa, "cross_lengths": facts.cross_lengths, "softcap": facts.softcap,
        "value_head_dim": facts.head_dim != facts.value_head_dim, "window_size": facts.window_size is not None,
        "dropout": facts.dropout, "lse": facts.return_lse, "deterministic": facts.deterministic,
        "mask_gradient": facts.mask_gradient, "backward": facts.backward,
    }  # fmt: skip
    yield from ((name, True) for name, is_asked in asked.items() if is_asked)


def _without_rules(alternative: Constraints) -> Constraints:
    backward = alternative.backward
    return replace(
        alternative, rules=(), backward=replace(backward, rules=()) if isinstance(backward, Backward) else backward
    )


def _drawn_facts(
    alternative: Constraints, random: Random, count: int, pairs: Sequence[tuple[int, int]]
) -> Iterator[Facts]:
    """Facts of drawn calls of these head dims, on the devices of an alternative, here or not; simple ones more often."""
    places = list(_places(alternative))
    dtypes = sorted(alternative.dtypes or ())
    masks = [kind for kind, ability in alternative.mask_abilities.items() if ability]
    plain: dict[str, Sequence[Any]] = {
        "spoiled": [None], "autocast": [None], "batch": [2], "mode": ["grad"], "amplitude": [1.0], "scale": [None],
        "mask": masks, "dtype": [name for name in PREFERRED if name in dtypes] or ["float32"],
    }  # fmt: skip
    for turn in range(count):
        dim, value_dim = random.choice(pairs)
        if alternative.value_head_dim and random.random() < 0.3:
            value_dim = dim + 8 if alternative.head_dims is None else random.choice(pairs)[1]
        limits = {**plain, "dim": [dim], "value_dim": [None if value_dim == dim else value_dim]}
        usual = [name for name in OPTIONS if name not in limits and name != "gradients" and random.random() < 0.5]
        limits = {**OPTIONS, **limits, **{name: OPTIONS[name][:1] for name in usual}}
        case = draw(random.choice, limits)
        changes: dict[str, Any] = dict(random.choice(places))
        changes["dropout"] = random.random() < 0.25
        changes["dtype"] = dtypes[turn % len(dtypes)]
        changes["compiled"] = random.random() < 0.2
        yield facts_of(case, **changes)


def _places(alternative: Constraints) -> Iterator[Mapping[str, Any]]:
    for platform in PLATFORMS:
        if platform not in (alternative.platforms or ()):
            continue
        if platform not in ("cuda", "rocm"):
            yield {"platform": platform, "compute_capability": None}
            continue
        declared = alternative.compute_capability
        known: list[tuple[int, int]] = list(CAPABILITIES)
        if isinstance(declared, CapabilityRange):
            known += [end for end in (declared.minimum, declared.maximum) if end is not None]
        elif declared is not None:
            known += list(declared)
        for capability in dict.fromkeys(known):
            if declared is None or capability in declared:
                yield {"platform": platform, "compute_capability": capability}


# --- rules ------------------------------------------------------------------------------------------------------------


def rules_of(spec: BackendSpec) -> list[Rule]:
    """Every rule of a declaration, its backwards' included, each text once."""
    found: dict[str, Rule] = {}
    for alternative in spec.alternatives:
        for rule in _own_rules(alternative):
            found.setdefault(rule.text, rule)
    return list(found.values())


def _own_rules(alternative: Constraints) -> tuple[Rule, ...]:
    backward = alternative.backward
    return (*alternative.rules, *(backward.rules if isinstance(backward, Backward) else ()))


@check("rule", each=lambda spec: [rule.text for rule in rules_of(spec)], cheap=True)
def rule(subject: Subject, text: str) -> str:
    """The rule refuses some call that everything else admits."""
    random = subject.random(text)
    tries = 0
    for alternative in subject.spec.alternatives:
        if text not in [own.text for own in _own_rules(alternative)]:
            continue
        pairs = [*representative_head_dims(alternative.head_dims), *many_head_dims(alternative.head_dims, random)]
        for facts in _drawn_facts(alternative, random, MOST, pairs):
            tries += 1
            if alternative.reasons(facts) in ([text], [f"backward: {text}"]):
                _refused_here(subject, facts, text)
                return f"fires after {tries} drawn calls"
    msg = f"the rule refuses none of {tries} drawn calls that everything else admits: it says nothing, or never holds"
    raise CheckFailed(msg)


def _refused_here(subject: Subject, facts: Facts, text: str) -> None:
    reasons = subject.spec.reasons(replace(facts, compiled=facts.compiled and bool(subject.spec.compile)))
    if reasons and not any(text in reason for reason in reasons) and len(subject.spec.alternatives) == 1:
        msg = f"a call that the rule refuses is refused with other words: {'; '.join(reasons)}"
        raise CheckFailed(msg)
