"""The records with which a wheel declares its backends: frozen, keyword-only plain data, validated when made."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal, cast

from packaging.requirements import InvalidRequirement, Requirement

from attn_core.errors import AttnError
from attn_core.facts import DTYPES, MASKS, PLATFORMS, Facts
from attn_core.guard import Raised, attempt

API = 1
"""The version of the meanings (the table of what each option does) that this core speaks."""

NAME = re.compile(r"[a-z_][a-z0-9_]*")
_EXTRA = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_IMPORT_STRING = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class DeclarationError(AttnError, ValueError):
    """A record that contradicts itself or says something that attn does not know."""


@dataclass(frozen=True)
class No:
    """An ability that a backend does not have, and why. False in a condition.

    >>> bool(No("the kernel keeps no random state"))
    False
    """

    reason: str

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str) or not self.reason.strip():
            msg = f"No(...) carries the reason as text, found {self.reason!r}; write what stands in the way"
            raise DeclarationError(msg)

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason


Ability = Literal[True] | No
NOT_DECLARED = No("not declared")


@dataclass(frozen=True)
class Rule:
    """What data can't say: ``predicate`` is true of the calls that the rule refuses.

    ``text`` is fixed; refusals and docs print it.

    >>> rule = Rule("softcap excludes dropout", lambda facts: facts.softcap and facts.dropout)
    >>> rule.refuses(Facts(softcap=True, dropout=True)), rule.refuses(Facts(softcap=True))
    (True, False)
    """

    text: str
    predicate: Callable[[Facts], bool]

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            msg = f"Rule: the text is what people read when it refuses, found {self.text!r}"
            raise DeclarationError(msg)
        if not callable(self.predicate):
            msg = f"Rule({self.text!r}): the predicate is a function of Facts, found {self.predicate!r}"
            raise DeclarationError(msg)

    def refuses(self, facts: Facts) -> bool:
        """Whether this rule refuses a call with these facts."""
        return bool(self.predicate(facts))


@dataclass(frozen=True)
class CapabilityRange:
    """Compute capabilities from ``minimum`` to ``maximum``, both included; None is open.

    >>> (9, 0) in CapabilityRange((8, 0)), (9, 0) in CapabilityRange((8, 0), (8, 9))
    (True, False)
    """

    minimum: tuple[int, int]
    maximum: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for end in (self.minimum, *((self.maximum,) if self.maximum is not None else ())):
            if not isinstance(end, tuple) or len(end) != 2 or not all(type(number) is int for number in end):
                msg = f"CapabilityRange: an end is a pair (major, minor), found {end!r}"
                raise DeclarationError(msg)
        if self.maximum is not None and self.maximum < self.minimum:
            msg = f"CapabilityRange: the maximum {self.maximum} lies below the minimum {self.minimum}"
            raise DeclarationError(msg)

    def __contains__(self, capability: tuple[int, int]) -> bool:
        return self.minimum <= capability and (self.maximum is None or capability <= self.maximum)

    def __str__(self) -> str:
        start = "{}.{}".format(*self.minimum)
        return f"{start} and up" if self.maximum is None else "{} to {}.{}".format(start, *self.maximum)


HeadDims = range | Collection[int | tuple[int, int]]
Masks = Collection[str] | Mapping[str, bool | No]

_ABILITIES: dict[str, Callable[[Facts], bool]] = {
    "causal": lambda facts: facts.causal,
    "gqa": lambda facts: facts.gqa,
    "cross_lengths": lambda facts: facts.cross_lengths,
    "value_head_dim": lambda facts: facts.value_head_dim != facts.head_dim,
    "window_size": lambda facts: facts.window_size is not None,
    "softcap": lambda facts: facts.softcap,
    "dropout": lambda facts: facts.dropout,
    "lse": lambda facts: facts.return_lse,
    "deterministic": lambda facts: facts.deterministic,
    "mask_gradient": lambda facts: facts.mask_gradient,
    "vmap": lambda facts: facts.vmap,
    "forward_mode": lambda facts: facts.forward_mode,
}
"""Each ability of a declaration, and whether a call with these facts asks for it."""

_FOUND: dict[str, Callable[[Facts], str]] = {
    "gqa": lambda facts: f"{facts.heads} query heads on {facts.key_heads} key heads",
    "cross_lengths": lambda facts: facts.lengths,
    "value_head_dim": lambda facts: f"{facts.value_head_dim} beside a query and key head dim of {facts.head_dim}",
    "window_size": lambda facts: str(facts.window_size),
}


def _check_names(owner: str, label: str, found: Any, known: Sequence[str]) -> frozenset[str]:
    if isinstance(found, (str, Mapping)) or not isinstance(found, Collection):
        msg = f"{owner}: {label} is a set of names, found {found!r}; known: {', '.join(known)}"
        raise DeclarationError(msg)
    unknown = sorted(str(name) for name in found if name not in known)
    if unknown:
        msg = f"{owner}: unknown {label} {', '.join(map(repr, unknown))}; known: {', '.join(known)}"
        raise DeclarationError(msg)
    if not found:
        msg = f"{owner}: {label} is empty, so that no call could ever be admitted; known: {', '.join(known)}"
        raise DeclarationError(msg)
    return frozenset(found)


def _check_ability(owner: str, label: str, found: Any) -> Any:
    if found is True or isinstance(found, No):
        return found
    hint = ' ("No" is a class: give it the reason)' if found is No else ""
    msg = f'{owner}: {label} is True or No("the reason"), found {found!r}{hint}'
    raise DeclarationError(msg)


def _check_capabilities(owner: str, found: Any) -> CapabilityRange | frozenset[tuple[int, int]]:
    if isinstance(found, CapabilityRange):
        return found
    items = () if isinstance(found, str) or not isinstance(found, Collection) else tuple(found)
    if not items or not all(
        isinstance(item, tuple) and len(item) == 2 and all(isinstance(n, int) for n in item) for item in items
    ):
        msg = (
            f"{owner}: compute_capability is a non-empty set of (major, minor) or a CapabilityRange, found {found!r}; "
            "{(9, 0)} is Hopper only, CapabilityRange((9, 0)) is Hopper and up"
        )
        raise DeclarationError(msg)
    return frozenset(items)


def _check_head_dims(owner: str, found: Any) -> range | frozenset[Any]:
    items = found if isinstance(found, (set, frozenset, list, tuple)) else ()
    if isinstance(found, range):  # it may be too long to list
        items = (*found[:1], *found[-1:])
    numbers = [n for item in items for n in (item if isinstance(item, tuple) and len(item) == 2 else (item,))]
    if not numbers or not all(type(n) is int and n > 0 for n in numbers):
        msg = f"{owner}: head_dims is a range, or a set of numbers or (D, Dv) pairs above 0, found {found!r}"
        raise DeclarationError(msg)
    return found if isinstance(found, range) else frozenset(items)


def _check_masks(owner: str, found: Any) -> dict[str, Ability]:
    if isinstance(found, Mapping):
        _check_names(owner, "mask kind", list(found), MASKS)
        given = {kind: _check_ability(owner, f"masks[{kind!r}]", ability) for kind, ability in found.items()}
    else:
        given = dict.fromkeys(_check_names(owner, "mask kind", found, MASKS), True)
    if not any(given.values()):
        msg = f"{owner}: masks admits nothing; a backend that takes no mask declares {{'none'}}"
        raise DeclarationError(msg)
    return {kind: given.get(kind, NOT_DECLARED) for kind in MASKS}


def _check_rules(owner: str, found: Any) -> tuple[Rule, ...]:
    rules = tuple(found) if isinstance(found, Iterable) and not isinstance(found, str) else (found,)
    for rule in rules:
        if not isinstance(rule, Rule):
            msg = f'{owner}: rules holds Rule("text", predicate), found {rule!r}'
            raise DeclarationError(msg)
    return rules


def _check_library(owner: str, found: str) -> str:
    try:
        Requirement(found)
    except (InvalidRequirement, TypeError) as error:
        msg = f"{owner}: library is a requirement such as 'flash-attn>=2.6', found {found!r}: {error}"
        raise DeclarationError(msg) from error
    return found


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "platforms": lambda owner, found: _check_names(owner, "platforms", found, PLATFORMS),
    "dtypes": lambda owner, found: _check_names(owner, "dtypes", found, DTYPES),
    "compute_capability": _check_capabilities,
    "head_dims": _check_head_dims,
    "masks": _check_masks,
    "rules": _check_rules,
    "library": _check_library,
}


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What forward and backward limit alike. A field left at None limits nothing.

    Attributes:
        platforms: a set of ``PLATFORMS``. A ROCm build of torch is "rocm", although its devices are called cuda.
        compute_capability: a set of (major, minor), or a ``CapabilityRange``: ``{(9, 0)}`` is Hopper only,
            ``CapabilityRange((9, 0))`` Hopper and up. Says nothing of devices that have none.
        dtypes: a set of ``DTYPES``: of query, key and value, after autocast.
        head_dims: a range, or a set of numbers and (D, Dv) pairs. None is any.
        masks: a set of ``MASKS``, "none" among them where calls without a mask are admitted; or a mapping of kinds to
            True or ``No(reason)``.
        causal: the bottom-right diagonal.
        gqa: fewer key heads than query heads.
        cross_lengths: Sq other than Skv.
        value_head_dim: Dv other than D. A declared (D, Dv) pair needs no further word.
        window_size: (left, right) in keys around the diagonal, -1 unlimited, each on its own.
        softcap: scores become c * tanh(scores / c) before masking.
        dropout: of the probabilities, with torch's generator; the backward uses the same draw.
        lse: forward returns (out, lse) where ``return_lse=True`` asks for it.
        deterministic: the same bits twice, forward and backward, where ``deterministic=True`` asks for it.
        mask_gradient: a float mask that requires a gradient gets it.
        vmap: calls inside ``torch.func`` transforms.
        forward_mode: forward-mode differentiation.
        library: the requirement on the library's version under which this holds, such as "flash-attn>=2.6".
        rules: ``Rule("text", predicate)`` for what data can't say: the predicate gets ``Facts`` and is true of the calls
            that are refused.
    """

    platforms: Collection[str] | None = None
    compute_capability: Collection[tuple[int, int]] | CapabilityRange | None = None
    dtypes: Collection[str] | None = None
    head_dims: HeadDims | None = None
    masks: Masks | None = None
    causal: Ability | None = None
    gqa: Ability | None = None
    cross_lengths: Ability | None = None
    value_head_dim: Ability | None = None
    window_size: Ability | None = None
    softcap: Ability | None = None
    dropout: Ability | None = None
    lse: Ability | None = None
    deterministic: Ability | None = None
    mask_gradient: Ability | None = None
    vmap: Ability | None = None
    forward_mode: Ability | None = None
    library: str | None = None
    rules: Sequence[Rule] = ()

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for item in fields(self):
            found = getattr(self, item.name)
            if found is None and item.name != "rules":
                continue
            if item.name in _CHECKS:
                found = _CHECKS[item.name](owner, found)
            elif item.name in _ABILITIES:
                found = _check_ability(owner, item.name, found)
            object.__setattr__(self, item.name, found)

    @property
    def mask_abilities(self) -> Mapping[str, Ability]:
        """``masks`` as a mapping of each kind of mask to True or its reason, whatever form it was given in."""
        return cast("Mapping[str, Ability]", self.masks)

    def reasons(self, facts: Facts) -> list[str]:
        """Every reason, with found and accepted values, why a call with these facts is refused; empty if it is not."""
        return [
            *self._reasons_from_values(facts),
            *self._reasons_from_abilities(facts),
            *self._reasons_from_rules(facts),
        ]

    def _reasons_from_values(self, facts: Facts) -> Iterable[str]:
        if self.platforms is not None and facts.platform not in self.platforms:
            yield f"device: found {facts.platform}; accepted: {_listed(sorted(self.platforms))}"
        elif (found := facts.compute_capability) is not None and found not in (self.compute_capability or (found,)):
            yield f"compute capability: found {_capability(found)}; accepted: {_capabilities(self)}"
        if self.dtypes is not None and facts.dtype not in self.dtypes:
            yield f"dtype: found {facts.dtype}; accepted: {_listed(sorted(self.dtypes))}"
        yield from self.head_dim_reasons(facts)
        if self.masks is not None and isinstance(no := self.mask_abilities[facts.mask], No):
            accepted = _listed(kind for kind, ability in self.mask_abilities.items() if ability)
            yield f"attn_mask: found {facts.mask}; accepted: {accepted} ({no})"

    def head_dim_reasons(self, facts: Facts) -> list[str]:
        """The reason, if there is one, why head dims like these are refused."""
        pair, dims = (facts.head_dim, facts.value_head_dim), self.head_dims
        if dims is None or _has_pair(dims, pair) or (facts.head_dim in dims and facts.value_head_dim in dims):
            return []
        shown = str(facts.head_dim) if pair[0] == pair[1] else f"{pair} for query and value"
        return [f"head_dim: found {shown}; accepted: {describe_head_dims(dims)}"]

    def _reasons_from_abilities(self, facts: Facts) -> Iterable[str]:
        for name, asked in _ABILITIES.items():
            no = getattr(self, name)
            if not isinstance(no, No) or not asked(facts):
                continue
            if name == "value_head_dim" and self._pair_declared(facts):
                continue
            found = f"found {_FOUND[name](facts)}; " if name in _FOUND else ""
            yield f"{name}: {found}not supported: {no}"

    def _pair_declared(self, facts: Facts) -> bool:
        return self.head_dims is not None and _has_pair(self.head_dims, (facts.head_dim, facts.value_head_dim))

    def _reasons_from_rules(self, facts: Facts) -> Iterable[str]:
        for rule in self.rules:
            refused = attempt(partial(rule.refuses, facts))
            if isinstance(refused, Raised):
                yield f"{rule.text}: the rule itself raises {refused}; report it to the authors of the wheel"
            elif refused.value:
                yield rule.text


def _has_pair(dims: HeadDims, pair: tuple[int, int]) -> bool:
    """Whether a (D, Dv) pair is declared as such; a range has none, and would compare each of its numbers."""
    return not isinstance(dims, range) and pair in dims


def _capability(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _capabilities(limits: Limits) -> str:
    accepted = limits.compute_capability
    if isinstance(accepted, CapabilityRange):
        return str(accepted)
    return _listed(_capability(item) for item in sorted(accepted or ()))


def _wider(forward: Limits, backward: Limits) -> Iterable[str]:
    """What a backward admits and its forward does not, with found and accepted; rules and libraries can't be compared."""
    for label, found, accepted in (
        ("platforms", backward.platforms, forward.platforms),
        ("dtypes", backward.dtypes, forward.dtypes),
        ("masks", _admitted_masks(backward), _admitted_masks(forward)),
    ):
        beyond = sorted(set(found or ()) - set(accepted or ()))
        if beyond:
            yield f"{label}: found {_listed(beyond)}; accepted: {_listed(sorted(accepted or ()))}"
    for name in _ABILITIES:
        no = getattr(forward, name)
        if getattr(backward, name) is True and isinstance(no, No):
            yield f"{name}: found True; accepted: a No, as of the forward ({no})"
    if forward.head_dims is not None:
        dims = (
            item if isinstance(item, tuple) else (item, item)
            for item in _telling(backward.head_dims, forward.head_dims)
        )
        facts = (Facts(head_dim=query, value_head_dim=value) for query, value in dims)
        yield from islice((reason for item in facts for reason in forward.head_dim_reasons(item)), 1)
    if not _capabilities_within(backward.compute_capability, forward.compute_capability):
        yield f"compute_capability: found {_capabilities(backward)}; accepted: {_capabilities(forward)}"


def _telling(found: HeadDims | None, accepted: HeadDims) -> Iterable[int | tuple[int, int]]:
    """Those of the head dims of a backward that tell whether all are accepted: of a long range, a few."""
    if not isinstance(found, range):
        return found or ()
    if isinstance(accepted, range):  # where the first two and the last are in it, the steps between are
        return (*found[:2], *found[-1:])
    return found[: len(accepted) + 1]


def _admitted_masks(limits: Limits) -> list[str]:
    return [] if limits.masks is None else [kind for kind, ability in limits.mask_abilities.items() if ability]


def _capabilities_within(
    found: Collection[tuple[int, int]] | CapabilityRange | None,
    accepted: Collection[tuple[int, int]] | CapabilityRange | None,
) -> bool:
    """Whether all of ``found`` are accepted; of a range inside a set, its ends are looked at."""
    if found is None or accepted is None:
        return True
    if not isinstance(found, CapabilityRange):
        return all(item in accepted for item in found)
    if found.maximum is None:
        return isinstance(accepted, CapabilityRange) and accepted.maximum is None and found.minimum in accepted
    return found.minimum in accepted and found.maximum in accepted


def describe_head_dims(head_dims: HeadDims | None) -> str:
    """Head dims as people write them.

    >>> describe_head_dims(range(8, 257, 8)), describe_head_dims({64, 128}), describe_head_dims({(192, 128)})
    ('8 to 256 in steps of 8', '64, 128', '192 with value 128')
    """
    if head_dims is None:
        return "any"
    if isinstance(head_dims, range):
        steps = "" if head_dims.step == 1 else f" in steps of {head_dims.step}"
        return f"{head_dims[0]} to {head_dims[-1]}{steps}"
    numbers = sorted(item for item in head_dims if isinstance(item, int))
    pairs = sorted(item for item in head_dims if isinstance(item, tuple))
    return _listed([*numbers, *(f"{query} with value {value}" for query, value in pairs)])


@dataclass(frozen=True, kw_only=True)
class Backward(Limits):
    """Where the backward is narrower than the forward. What is not given is as in the forward; wider is refused.

    >>> Backward(dtypes={"float16"}).reasons(Facts(dtype="float32"))
    ['dtype: found float32; accepted: float16']
    """


@dataclass(frozen=True, kw_only=True)
class Constraints(Limits):
    """One alternative of what a backend admits. An ability not mentioned is ``No("not declared")``.

    ``platforms``, ``dtypes`` and ``masks`` have to be given; ``head_dims``, ``compute_capability`` and ``library`` left
    at None limit nothing.

    Attributes:
        backward: whether gradients of query, key and value may be asked for: True, ``No(reason)``, or ``Backward(...)``
            where less is admitted with them than without.
        double_backward: the gradient of a gradient.

    >>> constraints = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, causal=True)
    >>> constraints.reasons(Facts(causal=True))
    []
    >>> constraints.reasons(Facts(dropout=True))
    ['dropout: not supported: not declared']
    """

    backward: Ability | Backward | None = None
    double_backward: Ability | None = None

    def __post_init__(self) -> None:
        for name in ("platforms", "dtypes", "masks"):
            if getattr(self, name) is None:
                msg = f"Constraints: {name} is missing; every alternative says which it admits"
                raise DeclarationError(msg)
        super().__post_init__()
        for name in (*_ABILITIES, "backward", "double_backward"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, NOT_DECLARED)
        if not isinstance(self.backward, Backward):
            _check_ability("Constraints", "backward", self.backward)
        _check_ability("Constraints", "double_backward", self.double_backward)
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        gpu = {"cuda", "rocm"}
        if self.compute_capability is not None and not gpu & set(self.platforms or ()):
            msg = (
                f"Constraints: compute_capability belongs to cuda or rocm, platforms are {sorted(self.platforms or ())}"
            )
            raise DeclarationError(msg)
        if self.mask_gradient and not self.mask_abilities["float"]:
            msg = "Constraints: mask_gradient is declared, but no float mask is admitted that could have one"
            raise DeclarationError(msg)
        for name in ("mask_gradient", "double_backward"):
            if getattr(self, name) and isinstance(self.backward, No):
                msg = f"Constraints: {name} is declared, but backward is No({str(self.backward)!r})"
                raise DeclarationError(msg)
        wider = list(_wider(self, self.backward)) if isinstance(self.backward, Backward) else []
        if wider:
            msg = f"Constraints: backward admits what the forward does not: {'; '.join(wider)}"
            raise DeclarationError(msg)

    def is_for(self, platform: str, compute_capability: tuple[int, int] | None) -> bool:
        """Whether this alternative is about devices of a platform and a compute capability (None: not known, or none)."""
        accepted = self.compute_capability
        fits = compute_capability is None or accepted is None or compute_capability in accepted
        return fits and platform in (self.platforms or ())

    def reasons(self, facts: Facts) -> list[str]:
        """As ``Limits.reasons``, with the backward's own where a gradient may be asked for."""
        found = super().reasons(facts)
        if facts.backward and isinstance(self.backward, No):
            found.append(f"backward: not supported: {self.backward}")
        if facts.backward and isinstance(self.backward, Backward):
            found.extend(f"backward: {reason}" for reason in self.backward.reasons(facts))
        return list(dict.fromkeys(found))

    def libraries(self, facts: Facts) -> list[str]:
        """The versions of libraries that a call with these facts needs, the backward's own where a gradient may be asked for."""
        backward = self.backward.library if facts.backward and isinstance(self.backward, Backward) else None
        return [library for library in (self.library, backward) if library is not None]


@dataclass(frozen=True, kw_only=True)
class ContextParallelSupport:
    """Which ways of spreading a sequence over devices a backend serves. The backward of each follows ``backward``.

    Attributes:
        ring: parts of the keys, merged by their lse: some alternative declares ``lse``, and a backward takes the result and
            the lse of the whole.
        ulysses: shards of the heads.
        hybrid: both at once.

    >>> ContextParallelSupport(ring=True, ulysses=True, hybrid=True).modes
    ('ring', 'ulysses', 'hybrid')
    """

    ring: Ability = NOT_DECLARED
    ulysses: Ability = NOT_DECLARED
    hybrid: Ability = NOT_DECLARED

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_ability("ContextParallelSupport", item.name, getattr(self, item.name))
        if self.hybrid and not (self.ring and self.ulysses):
            msg = "ContextParallelSupport: hybrid is ring and ulysses together, but one of them is declared No"
            raise DeclarationError(msg)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that are declared."""
        return tuple(item.name for item in fields(self) if getattr(self, item.name))


@dataclass(frozen=True)
class Exact:
    """Computes the defined function, up to rounding in the dtype of the call."""

    approximate: ClassVar[bool] = False

    def __str__(self) -> str:
        return "exact"


@dataclass(frozen=True)
class Approximate:
    """Computes the defined function up to an error that it declares.

    Attributes:
        error: the relative error (root mean square) that it is held to at every shape, between 0 and 1: of the whole result,
            and of each head of n rows with 1 + 3 / sqrt(n) times as much; the error of no single row is above 4 times as much.
        scores: up to which size of the scores it is: of ``|scale| |q| |k| / sqrt(D)`` for the longest query and key, about
            1.5 for numbers from randn at the usual scale. Beyond it the error grows in proportion, as that of quantised
            queries and keys does. None is any size.
    """

    error: float
    scores: float | None = None
    approximate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.error, bool) or not isinstance(self.error, (int, float)) or not 0 < self.error < 1:
            msg = f"Approximate: error is a relative error between 0 and 1, found {self.error!r}"
            raise DeclarationError(msg)
        if self.scores is not None and (isinstance(self.scores, bool) or not self.scores > 0):
            msg = f"Approximate: scores is a size above 0, or None for any, found {self.scores!r}"
            raise DeclarationError(msg)

    def __str__(self) -> str:
        limit = "" if self.scores is None else f" for scores up to {self.scores:g}, in proportion beyond"
        return f"approximate, relative error up to {self.error:g}{limit}"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What has to be installed beside the wheel: an extra of its distribution, or an importable module.

    Attributes:
        extra: of the wheel's own distribution: everything that it asks for.
        module: one that can be imported. One of the two is given.
        install: the author's own line where ``pip install distribution[extra]`` is not enough.
    """

    extra: str | None = None
    module: str | None = None
    install: str | None = None

    def __post_init__(self) -> None:
        if (self.extra is None) == (self.module is None):
            msg = f"Needs: give one of extra and module, found extra={self.extra!r}, module={self.module!r}"
            raise DeclarationError(msg)
        if self.extra is not None and not _is_extra(self.extra):
            msg = f"Needs: extra is the name of an extra of the wheel, found {self.extra!r}"
            raise DeclarationError(msg)
        if self.module is not None and not _is_module(self.module):
            msg = f"Needs: module is the dotted name of a module, found {self.module!r}"
            raise DeclarationError(msg)
        if self.install is not None and not (isinstance(self.install, str) and self.install.strip()):
            msg = f"Needs: install is a line of text, or None, found {self.install!r}"
            raise DeclarationError(msg)


def _is_extra(found: object) -> bool:
    return isinstance(found, str) and _EXTRA.fullmatch(found) is not None


def _is_module(found: object) -> bool:
    return isinstance(found, str) and all(part.isidentifier() for part in found.split("."))


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """One backend, declared: plain data, so that it can be listed without importing torch or the kernel's library.

    Attributes:
        api: the version of the meanings that the author wrote against, 1 today. Written, never computed.
        name: a plain word, lower case.
        summary: one line for people.
        forward: import string ``module:function`` of the adapter.
        backward: the same for a backward that is a function of its own, or None.
        constraints: one ``Constraints`` or several alternatives; a call is admitted when one of them admits it.
        aliases: further names for the same backend.
        needs: what has to be installed: an extra of the distribution or a module (a plain text is an extra where the
            distribution has one of that name, else a module), or ``Needs(...)`` with an install line of its own.
        autograd: "own" when the result of forward carries its graph; "core" when the core makes the graph from
            ``backward``. None is "core" where backward is given, else "own".
        context_parallel: a ``ContextParallelSupport``, or ``No(reason)``.
        numerics: ``Exact()`` or ``Approximate(error)``.
        compile: True when forward traces under ``torch.compile(fullgraph=True)``, else ``No(reason)``.
        first_call_compiles: whether the first call of a kind compiles and so takes long. It is said before, refused while a
            CUDA graph is captured, and made ahead by ``plan``.
        unverified: why the backend was never run on the hardware that it is for; None where it was. Lists and tables say
            so.
    """

    api: int
    name: str
    summary: str
    forward: str
    constraints: Constraints | Sequence[Constraints]
    backward: str | None = None
    aliases: Collection[str] = ()
    needs: str | Needs | None = None
    autograd: Literal["own", "core"] | None = None
    context_parallel: ContextParallelSupport | No = NOT_DECLARED
    numerics: Exact | Approximate = field(default_factory=Exact)
    compile: Ability = NOT_DECLARED
    first_call_compiles: bool = False
    unverified: str | None = None

    def __post_init__(self) -> None:
        self._check_names()
        owner = f"BackendSpec({self.name!r})"
        for label, found in (("forward", self.forward), ("backward", self.backward)):
            if not (isinstance(found, str) and _IMPORT_STRING.fullmatch(found)) and not (
                label == "backward" and found is None
            ):
                msg = f"{owner}: {label} is an import string 'module:function', found {found!r}"
                raise DeclarationError(msg)
        if not isinstance(self.summary, str) or not self.summary.strip() or "\n" in self.summary:
            msg = f"{owner}: summary is one line of text, found {self.summary!r}"
            raise DeclarationError(msg)
        if self.unverified is not None and not (isinstance(self.unverified, str) and self.unverified.strip()):
            msg = f"{owner}: unverified is the reason as text, or None, found {self.unverified!r}"
            raise DeclarationError(msg)
        self._check_kinds(owner)
        self._check_alternatives(owner)
        self._check_contradictions(owner)

    def __hash__(self) -> int:
        """By the names: equal records have equal ones, and what the others hold (a mapping of masks) has no hash."""
        return hash((self.api, self.name, self.forward, self.backward))

    def _check_names(self) -> None:
        if isinstance(self.aliases, str) or not isinstance(self.aliases, Collection):
            msg = f"BackendSpec({self.name!r}): aliases is a set of names, found the text {self.aliases!r}"
            raise DeclarationError(msg)
        object.__setattr__(self, "aliases", tuple(sorted(self.aliases, key=str)))
        for name in (self.name, *self.aliases):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                msg = (
                    f"BackendSpec: a name is a plain word of a-z, 0-9 and _, not starting with a digit, found {name!r}"
                )
                raise DeclarationError(msg)
        if type(self.api) is not int or self.api < 1:
            msg = f"BackendSpec({self.name!r}): api is the version of the meanings, a number from 1, found {self.api!r}"
            raise DeclarationError(msg)

    def _check_kinds(self, owner: str) -> None:
        _check_ability(owner, "compile", self.compile)
        kinds: tuple[tuple[str, tuple[Any, ...], str], ...] = (
            ("context_parallel", (ContextParallelSupport, No), 'ContextParallelSupport(...) or No("the reason")'),
            ("numerics", (Exact, Approximate), "Exact() or Approximate(error)"),
            ("needs", (str, Needs, type(None)), "an extra, a module, Needs(...) or None"),
            ("first_call_compiles", (bool,), "True or False"),
        )
        for label, accepted, words in kinds:
            found = getattr(self, label)
            if not isinstance(found, accepted):
                msg = f"{owner}: {label} is {words}, found {found!r}"
                raise DeclarationError(msg)
        if isinstance(self.needs, str) and not (_is_extra(self.needs) or _is_module(self.needs)):
            msg = (
                f"{owner}: needs is the name of an extra or of a module, found {self.needs!r}; the version of a library "
                "goes into Constraints(library=)"
            )
            raise DeclarationError(msg)
        if self.autograd is None:
            object.__setattr__(self, "autograd", "own" if self.backward is None else "core")
        if self.autograd not in ("own", "core"):
            msg = f"{owner}: autograd is 'own' or 'core', found {self.autograd!r}"
            raise DeclarationError(msg)

    def _check_alternatives(self, owner: str) -> None:
        given = (self.constraints,) if isinstance(self.constraints, Constraints) else self.constraints
        if isinstance(given, str) or not isinstance(given, Collection):
            given = (given,)
        if not given:
            msg = f"{owner}: constraints is empty; give one Constraints or several alternatives"
            raise DeclarationError(msg)
        for alternative in given:
            if not isinstance(alternative, Constraints):
                msg = f"{owner}: constraints holds Constraints(...), found {alternative!r}"
                raise DeclarationError(msg)
        object.__setattr__(self, "constraints", tuple(given))

    def _check_contradictions(self, owner: str) -> None:
        alternatives = self.alternatives
        ring = isinstance(self.context_parallel, ContextParallelSupport) and self.context_parallel.ring
        if ring and not any(item.lse for item in alternatives):
            msg = f"{owner}: ring merges partial results by their lse, but no alternative declares lse"
            raise DeclarationError(msg)
        if self.autograd != "core":
            return
        differentiable = [item for item in alternatives if not isinstance(item.backward, No)]
        if differentiable and self.backward is None:
            msg = f"{owner}: autograd is 'core', but there is no backward for the core to call"
            raise DeclarationError(msg)
        for item in differentiable:
            if not item.lse:
                msg = f"{owner}: the core's graph hands lse to backward, but lse is No({str(item.lse)!r})"
                raise DeclarationError(msg)
            if item.dropout and not (isinstance(item.backward, Backward) and isinstance(item.backward.dropout, No)):
                msg = f"{owner}: dropout with a backward that the core calls: the draw is not handed over; use autograd='own'"
                raise DeclarationError(msg)
            for name in ("vmap", "forward_mode", "double_backward"):
                if getattr(item, name):
                    msg = f"{owner}: {name} with a backward that the core calls: its graph has no such rule; use autograd='own'"
                    raise DeclarationError(msg)
            if item.mask_gradient:
                msg = f"{owner}: mask_gradient with a backward that the core calls: it returns dq, dk, dv; use autograd='own'"
                raise DeclarationError(msg)

    @property
    def alternatives(self) -> tuple[Constraints, ...]:
        """``constraints`` as a tuple, whatever form it was given in."""
        return self.constraints  # type: ignore[return-value]

    def parallel_modes(self, *, backward: bool = False) -> tuple[str, ...]:
        """The ways of context parallel that are declared; with ``backward`` those in which gradients may be asked for.

        A ring's needs a backward that is a function of its own; with ulysses the graph of the call does.
        """
        support = self.context_parallel
        modes = support.modes if isinstance(support, ContextParallelSupport) else ()
        if not backward:
            return modes
        differentiable = any(not isinstance(item.backward, No) for item in self.alternatives)
        return tuple(mode for mode in modes if differentiable and (mode == "ulysses" or self.backward is not None))

    def reasons(self, facts: Facts) -> list[str]:
        """Why a call with these facts is refused, from the alternative that comes closest; empty if one admits it."""
        if facts.compiled and isinstance(self.compile, No):
            return [f"torch.compile: not supported: {self.compile}"]
        return self.closest(facts, [(item.reasons(facts), []) for item in self.alternatives])

    def no_double_backward(self, facts: Facts) -> No | None:
        """Why a call has no gradient of its gradient; None where an alternative that admits the call declares one."""
        admitting = [item.double_backward for item in self.alternatives if not item.reasons(facts)]
        return next((item for item in admitting if isinstance(item, No)), None) if not any(admitting) else None

    def closest(self, facts: Facts, reasons: Sequence[tuple[list[str], list[str]]]) -> list[str]:
        """Of the reasons of each alternative, by facts and by libraries, those of the one that comes closest.

        One for this device comes first, then one for the libraries that are here, then the one with the fewest.
        """
        place = facts.platform, facts.compute_capability

        def distance(item: tuple[Constraints, tuple[list[str], list[str]]]) -> tuple[bool, bool, int]:
            alternative, (by_facts, by_libraries) = item
            return not alternative.is_for(*place), bool(by_libraries), len(by_facts)

        _, (by_facts, by_libraries) = min(zip(self.alternatives, reasons, strict=True), key=distance)
        return by_facts + by_libraries
