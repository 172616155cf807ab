"""The backend under test: where it is tried, what it admits there, and the calls that are drawn for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, combinations, count, islice, product, zip_longest
from random import Random
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from attn_core import loading, registry
from attn_core.admission import refusals
from attn_core.call import attention
from attn_core.declaration import Limits
from attn_core.errors import AttnError, BackendNotUsable, CallRefused
from attn_core.guard import Raised, attempt
from attn_core.probe import devices
from attn_core.reading import device_facts
from attn_core.requirements import library_reason
from attn_core.testing.comparing import called, compare
from attn_core.testing.covering import cover
from attn_core.testing.drawing import Case
from attn_core.testing.facing import facts_of
from attn_core.testing.head_dims import many_head_dims, representative_head_dims
from attn_core.testing.kinds import ESSENTIAL, kind_of, wished
from attn_core.testing.lengths import other_lengths
from attn_core.testing.outcomes import CheckFailed, NotChecked
from attn_core.testing.shrinking import shrink
from attn_core.testing.surroundings import USUAL, unusual

if TYPE_CHECKING:
    from attn_core.declaration import BackendSpec, Constraints
    from attn_core.facts import Facts
    from attn_core.record import Row

Fragment = Mapping[str, Any]
"""Some fields of a ``Case``."""

PREFERRED = ("float32", "bfloat16", "float16", "float64")
_ATTEMPTS = 2000
_DIMS_COMPILED = 4
"""How many head dims, beside the largest, are tried where each is compiled for."""
_SCORES_WHERE_QUICK = 2**17
"""How many scores a call of several sequences may have in a quick run: it is the float64 reference that takes the time."""
_KNOWN = 40
"""How many calls of known kinds are made where a check wants fewer: they take no time to compile."""


def _lengths(queries: int, keys: int | None = None) -> Fragment:
    return {"queries": queries, "keys": keys}


def _windows(*windows: tuple[int, int] | None) -> tuple[Fragment, ...]:
    return tuple({"window_size": window} for window in windows)


_ALL = ("query", "key", "value")
FACTORS: Mapping[str, tuple[Fragment, ...]] = {
    "lengths": (
        _lengths(16), _lengths(33), _lengths(64), _lengths(300), _lengths(1), _lengths(5, 17), _lengths(1, 70),
        _lengths(33, 5), _lengths(70, 1), _lengths(7, 530),
    ),
    "batch": ({"batch": 2}, {"batch": 1}, {"batch": 3}),
    "heads": tuple({"heads": heads} for heads in ((2, 2), (4, 2), (6, 2), (4, 1), (3, 3), (8, 8), (8, 1), (16, 2))),
    "mask": (
        {"mask": "none"}, {"mask": "key_padding"}, {"mask": "key_padding", "mask_hides": "left"},
        {"mask": "packed", "batch": 1}, {"mask": "bool"}, {"mask": "bool", "mask_once": (False, True, False, False)},
        {"mask": "bool", "mask_once": (True, True, True, False), "mask_hides": "rows"},
        {"mask": "bool", "mask_hides": "rows", "mask_layout": "transposed"},
        {"mask": "bool", "mask_once": (False, True, True, False)}, {"mask": "float"},
        {"mask": "float", "mask_once": (True, False, False, False)}, {"mask": "float", "mask_dtype": "float32"},
        {"mask": "float", "mask_once": (False, True, True, False), "mask_hides": "rows", "mask_layout": "expanded"},
    ),
    "causal": ({"causal": False}, {"causal": True}),
    "window_size": _windows(None, (3, 0), (2, 1), (-1, 2), (5, -1), (0, 0), (40, 40)),
    "scale": tuple({"scale": scale} for scale in (None, 0.3, 2, 0, -0.5)),
    "softcap": ({"softcap": None}, {"softcap": 2.0}, {"softcap": 30}),
    "return_lse": ({"return_lse": False}, {"return_lse": True}),
    "gradients": tuple(
        {"gradients": names} for names in ((), _ALL, ("query",), ("key",), ("value",), (*_ALL, "attn_mask"), ("attn_mask",))
    ),
    "grad_layout": tuple(
        {"grad_layout": layout} for layout in ("contiguous", "expanded", "transposed", "last strided", "offset")
    ),
    "deterministic": ({"deterministic": False}, {"deterministic": True}),
    "layouts": tuple(
        {"layouts": (layout,) * 3}
        for layout in ("contiguous", "transposed", "sliced", "last strided", "expanded batch", "expanded keys", "offset")
    ),
    "autocast": ({"autocast": None}, {"autocast": "bfloat16"}, {"autocast": "float16"}),
    "mode": ({"mode": "grad"}, {"mode": "no_grad"}, {"mode": "inference"}),
    "amplitude": ({"amplitude": 1.0}, {"amplitude": 4.0}, {"amplitude": 1e-3}),
}  # fmt: skip
"""What a call is made of, beside dtype and head dims, which come from the declaration; the plainest value first."""


@dataclass(frozen=True)
class Combinations:
    """A covering set of calls, and how much it covers."""

    cases: tuple[Case, ...]
    strength: int
    values: int
    covered: int
    refused: int

    def __str__(self) -> str:
        what = "single values" if self.strength == 1 else "pairs of values"
        refused = f"; {self.refused} are refused by the declaration" if self.refused else ""
        return f"{len(self.cases)} calls that cover {self.covered} {what} of {self.values} values{refused}"


@dataclass(frozen=True)
class Subject:
    """One backend on one device.

    Attributes:
        row: its row in the list, available.
        device: where it is tried.
        seed: where all choices come from.
        quick: whether to draw few calls.
    """

    row: Row
    device: torch.device
    seed: int = 0
    quick: bool = False

    @property
    def spec(self) -> BackendSpec:
        """The declaration."""
        return self.row.spec  # type: ignore[return-value]

    @property
    def call(self) -> Callable[..., Any]:
        """``attention`` on this backend."""
        return partial(attention, backend=self.row.qualified_name)

    def random(self, purpose: str) -> Random:
        """Choices for one purpose, the same ones for the same seed."""
        return Random(f"{self.seed} {self.row.name} {purpose}")  # noqa: S311 (no secret)

    @cached_property
    def adapter(self) -> loading.Adapter:
        """Its loaded functions."""
        return loading.load(self.spec)

    # --- what it admits --------------------------------------------------------------------------------------------

    @cached_property
    def alternatives(self) -> tuple[Constraints, ...]:
        """The alternatives of its declaration for this device, for what is installed, and of dtypes that the kit draws."""
        place = device_facts(self.device)
        found = (item for item in self.spec.alternatives if item.is_for(place["platform"], place["compute_capability"]))
        drawn = (item for item in found if item.dtypes is None or not set(PREFERRED).isdisjoint(item.dtypes))
        return tuple(item for item in drawn if item.library is None or library_reason(item.library) is None)

    def facts(self, case: Case) -> Facts:
        """The facts of a case."""
        return facts_of(case, **self._place)

    def admits(self, case: Case) -> bool:
        """Whether the declaration admits the call."""
        return not refusals(self.spec, self.facts(case))

    @cached_property
    def _place(self) -> dict[str, Any]:
        return device_facts(self.device)

    # --- what is drawn for it ----------------------------------------------------------------------------------------

    @cached_property
    def factors(self) -> Mapping[str, tuple[Fragment, ...]]:
        """The values of each factor of which a call that is plain otherwise is admitted; the plainest first."""
        return {
            name: (
                self._bases[0][name],
                *(item for item in values if item != self._bases[0][name] and self._fits(name, item)),
            )
            for name, values in self._every.items()
        }

    @cached_property
    def _every(self) -> Mapping[str, tuple[Fragment, ...]]:
        """All values of each factor."""
        return {"dtype": self._dtypes(), "dims": self._dims(), **FACTORS}

    def _dtypes(self) -> tuple[Fragment, ...]:
        declared = {name for item in self.alternatives for name in item.dtypes or ()}
        return tuple({"dtype": name} for name in PREFERRED if name in declared)

    def _dims(self) -> tuple[Fragment, ...]:
        each = [representative_head_dims(item.head_dims) for item in self.alternatives]
        if self.spec.first_call_compiles:
            each = [[*found[:_DIMS_COMPILED], *found[-1:]] for found in each]
        pairs = [pair for found in each for pair in found]
        dims = [dim for dim, value_dim in pairs if dim == value_dim]
        if any(item.value_head_dim for item in self.alternatives):
            pairs += [(dims[0], dims[-1]), (dims[-1], dims[0])] if len(dims) > 1 else []
        return tuple(map(_dims_fragment, dict.fromkeys(pairs)))

    @property
    def many_dims(self) -> Sequence[Fragment]:
        """Many of the declared head dims, and as many different ones of values where these may differ."""
        random = self.random("head dims")
        found = [pair for item in self.alternatives for pair in many_head_dims(item.head_dims, random)]
        numbers = [dim for dim, value_dim in found if dim == value_dim]
        if any(item.value_head_dim for item in self.alternatives):
            found += zip(numbers, random.sample(numbers, len(numbers)), strict=True)
        return self.admitted(map(_dims_fragment, dict.fromkeys(found)))

    @cached_property
    def _bases(self) -> tuple[dict[str, Fragment], ...]:
        """The plainest call that is admitted, and of each alternative that refuses it the plainest that this one admits."""
        found = [self._base(self.admits)]
        if found[0] is None:
            first = self.case(*(values[0] for values in self._every.values()))
            reasons = "; ".join(refusals(self.spec, self.facts(first)))
            msg = f"its declaration admits none of the calls that were drawn for it; the plainest is refused: {reasons}"
            raise CheckFailed(msg)
        for alternative in self.alternatives if len(self.alternatives) > 1 else ():

            def admits(case: Case, limits: Constraints = alternative) -> bool:
                return not limits.reasons(self.facts(case)) and self.admits(case)

            if not any(base is not None and admits(self.case(*base.values())) for base in found):
                found.append(self._base(admits))
        return tuple(base for base in found if base is not None)

    def _base(self, admits: Callable[[Case], bool]) -> dict[str, Fragment] | None:
        """The plainest call that is admitted: the first values, or as few others as will do."""
        first = {name: values[0] for name, values in self._every.items()}
        for changes in self._changes(self._every):
            base = {**first, **changes}
            if admits(self.case(*base.values())):
                return base
        return None

    def _changes(self, every: Mapping[str, Sequence[Fragment]]) -> Iterator[dict[str, Fragment]]:
        single = [(name, value) for name, values in every.items() for value in values[1:]]
        yield {}
        yield from ({name: value} for name, value in single)
        yield from ({**dict([one]), **dict([other])} for one, other in combinations(single, 2))
        random = self.random("base")
        for _ in range(_ATTEMPTS):
            yield {name: random.choice(values) for name, values in every.items()}

    def _fits(self, name: str, value: Fragment) -> bool:
        """Whether a value is admitted in a plain call, or in a plain one but for one other value."""
        if self._admitted_anywhere({name: value}):
            return True
        others = [(other, item) for other, values in self._every.items() if other != name for item in values[1:]]
        return any(self._admitted_anywhere({name: value, other: item}) for other, item in others)

    def _admitted_anywhere(self, changes: Mapping[str, Fragment]) -> bool:
        return any(self.admits(self.case(*{**base, **changes}.values())) for base in self._bases)

    def case(self, *fragments: Fragment, **fields: Any) -> Case:
        """Make a case on this device of these fields, changed where they make no sense together: a packed one has one batch."""
        given: dict[str, Any] = {"device": str(self.device)}
        for fragment in fragments:
            given.update(fragment)
        given.update(fields)
        if given.get("mask") == "packed":
            given["batch"] = 1
        if given.get("mask") != "float":
            given["gradients"] = tuple(name for name in given.get("gradients", ()) if name != "attn_mask")
        if given.get("autocast") and given.get("dtype") == "float64":
            given["mask_dtype"] = "same"  # autocast leaves float64 as it is, and would make another one of the mask
        return Case(**given)

    @property
    def plain(self) -> Case:
        """The plainest call that it admits."""
        return self.case(*(values[0] for values in self.factors.values()))

    def draw(
        self,
        count: int,
        *varied: str,
        each: Sequence[Fragment] = ({},),
        where: Callable[[Case], bool] | None = None,
    ) -> list[Case]:
        """Draw calls that it admits.

        Args:
            count: how many at least, and one for each of ``each``; fewer where the run is quick or each kind of call compiles.
            varied: factors that take any of their values; all others stay plain.
            each: fields of ``Case``, each used in turn.
            where: what the calls must be like beside.

        Returns:
            Different cases; none where none is admitted.
        """
        random = self.random(f"{varied} {each}")
        wanted = max(count // 9, 2) if self.quick else max(count, len(each))
        if self.spec.first_call_compiles:  # none of which is told again, since each would compile
            return self._drawn_again(wanted, varied, random.sample(list(each), len(each)), where)
        if wanted < len(each):
            each = random.sample(list(each), len(each))
        found: dict[Case, None] = {}
        decks = {name: _dealt(self.factors[name], random) for name in varied}
        for turn in range(8 * max(wanted, len(each))):
            chosen = [next(deck) for deck in decks.values()]
            for base, fragments in product(self.plain_fragments, (chosen, ())):
                case = self.case(base, *fragments, each[turn % len(each)], seed=turn)
                if self.admits(case) and (where is None or where(case)):
                    found[case] = None
                    break
            if len(found) >= wanted:
                break
        cases = list(found) if self._takes_any_length else self._at_lengths_taken(found, where)
        self.drawn.extend(cases)
        return cases

    @cached_property
    def drawn(self) -> list[Case]:
        """The calls that were drawn of it, for the check that runs to say which one showed what is wrong."""
        return []

    @cached_property
    def _takes_any_length(self) -> bool:
        """Whether the plainest call is taken as it is; one that is compiled for is not made to know it."""
        attempt(lambda: self.adapter)
        # what this call leaves behind is nothing that a check starts from
        with patch.dict(os.environ), unusual(self.device, USUAL):
            return self.spec.first_call_compiles or self.taken(self.plain) == self.plain

    def _at_lengths_taken(self, cases: Iterable[Case], where: Callable[[Case], bool] | None) -> list[Case]:
        """These calls, each at lengths that its kernel takes, where it takes it at any."""
        moved = ((case, self.taken(case)) for case in cases)
        return list(dict.fromkeys(item if item and (where is None or where(item)) else case for case, item in moved))

    def taken(self, case: Case) -> Case | None:
        """The call, at its own lengths or else at others, as the adapter takes it; None where it refuses all when run."""
        each = chain([case], filter(self.admits, other_lengths(case)))
        return next((item for item in each if not self.refuses_when_run(item)), None)

    def refuses_when_run(self, case: Case) -> bool:
        """Whether the adapter itself refuses a call that the declaration admits."""
        found = attempt(partial(called, case, case.build(), self.call))
        return isinstance(found, Raised) and isinstance(found.error, CallRefused)

    def _drawn_again(
        self, wanted: int, varied: Sequence[str], each: Sequence[Fragment], where: Callable[[Case], bool] | None
    ) -> list[Case]:
        """Calls of kinds that are tried anyway, or else one of a kind of its own: where each kind takes seconds to compile."""
        known = [self.plain] if self.quick else self.combinations.cases
        free = {field for name in varied for item in self.factors[name] for field in item} | {"seed"}

        def laid(case: Case, place: int) -> list[Case]:
            """The calls that need no other code than this one; those of each place begin elsewhere."""
            found = []
            for turn in range(place, place + len(each)):
                item = each[turn % len(each)]
                changed = self.case(vars(case), item, seed=turn)
                if kind_of(changed) == kind_of(case) and _alike(
                    case, self.case(self.plain_fragment, item), but={*free, *item}
                ):
                    found.append(changed)
            return [item for item in found if self.admits(item) and (where is None or where(item))]

        in_turn = zip_longest(*(laid(case, place) for place, case in enumerate(known)))
        found = [case for several in in_turn for case in several if case is not None][: max(wanted, _KNOWN)]
        if found:
            again = chain.from_iterable([replace(case, seed=case.seed + 100 * n) for case in found] for n in count(0))
            return list(islice(again, max(min(wanted, _KNOWN), len(found))))
        plain = (self.case(base, item) for base in self.plain_fragments for item in each)
        return list(islice((case for case in plain if self.admits(case) and (where is None or where(case))), 1))

    def admitted(self, each: Iterable[Fragment]) -> list[dict[str, Any]]:
        """Those of these fields with which a call that is plain otherwise is admitted."""
        return [dict(item) for item in each if any(self.admits(self.case(base, item)) for base in self.plain_fragments)]

    @property
    def plain_fragment(self) -> Fragment:
        """The fields of the plainest call."""
        return self.plain_fragments[0]

    @cached_property
    def plain_fragments(self) -> tuple[Fragment, ...]:
        """The same, and those of the plainest call of each alternative that refuses it."""
        return tuple({field: value for item in base.values() for field, value in item.items()} for base in self._bases)

    @cached_property
    def combinations(self) -> Combinations:
        """Few calls in which all pairs of values meet; all single values, in a quick run or where each kind compiles."""
        factors = self.factors
        strength = 1 if self.quick or self.spec.first_call_compiles else 2
        essential = self._essential() if strength == 1 else ()

        def case(row: tuple[int, ...]) -> Case:
            chosen = (values[n] for values, n in zip(factors.values(), row, strict=True))
            return self.case(*chosen, seed=sum(row))

        def admitted(row: tuple[int, ...]) -> bool:
            return self.admits(case(row))

        met = {
            ((place, n),)
            for place, values in enumerate(factors.values())
            for n, value in enumerate(values)
            if any(_has(case, value) for case in essential)
        }
        plainest = [tuple(values.index(base[name]) for name, values in factors.items()) for base in self._bases]
        found = cover(
            [len(values) for values in factors.values()],
            admitted,
            self.random("combinations"),
            strength=strength,
            plainest=plainest,
            met=met,
        )
        cases = tuple(dict.fromkeys((*essential, *map(case, found.rows))))
        return Combinations(cases, strength, sum(map(len, factors.values())), found.covered, len(found.refused))

    def _essential(self) -> tuple[Case, ...]:
        """Calls of the essential kinds, as far as they are admitted."""
        found: dict[Case, Case] = {}
        for fields in ESSENTIAL:
            tries = (self.case(base, item) for item in wished(fields) for base in self.plain_fragments)
            case = next(filter(self.admits, tries), None)
            if case is not None:
                found.setdefault(kind_of(case), case)
        return tuple(found.values())

    def leave_out_if_quick(self) -> None:
        """End the check at the beginning of a quick run: it takes seconds."""
        if self.quick:
            msg = "left out of a quick run"
            raise NotChecked(msg)

    # --- what it is held to ------------------------------------------------------------------------------------------

    def hold(self, cases: Iterable[Case], call: Callable[..., Any] | None = None) -> str:
        """Hold each of these calls to the reference, made by ``attention`` or by ``call``.

        A call may be refused by the adapter itself, since lengths are not among the facts; then it is made at other lengths.
        Not all of them may be refused.

        Returns:
            How many were right, and how many refused.

        Raises:
            CheckFailed: with the smallest call that shows it.
        """
        right, refused = 0, []
        for case in map(self._lighter, cases):
            refusal = self.hold_one(case, call)
            if refusal is None:
                right += 1
                continue
            refused.append((case, refusal))
            other = self.taken(case)
            if other is None and call is None:
                self._expect_other_than_facts(case, refusal)
            right += other is not None and self.hold_one(other, call) is None
        if refused and not right:
            case, refusal = refused[0]
            msg = f"it declares this and refuses each of {len(refused)} calls when run: {refusal}"
            raise CheckFailed(msg, case)
        return f"{right} calls" + (f", {len(refused)} refused when run" if refused else "")

    def _expect_other_than_facts(self, case: Case, refusal: AttnError) -> None:
        """Fail where a call without a mask is refused when run at whatever lengths, although nothing but facts is left of it."""
        contiguous = ("contiguous",) * 3
        bare = replace(case, batch=1, scale=None, amplitude=1.0, layouts=contiguous, grad_layout=contiguous[0], seed=0)
        if case.mask == "none" and self.admits(bare) and self.taken(bare) is None:
            msg = (
                f"it declares this and refuses it when run, at whatever lengths: {refusal}. What facts of a call decide "
                "belongs into the declaration, as a No or a Rule"
            )
            raise CheckFailed(msg, bare)

    def hold_one(self, case: Case, call: Callable[..., Any] | None = None) -> AttnError | None:
        """Hold one call to the reference: None where it is right, the adapter's own refusal where it refuses."""
        found = self._compared(case, call)
        if not isinstance(found, Raised):
            return found
        if call is not None:  # what shows it is more than the case
            if self.refuses_when_run(case):  # which what traces it hides behind an error of its own
                return CallRefused(str(found.error))
            msg = f"{_told(found)}, in {case!r}"
            raise CheckFailed(msg) from found.error
        if not self.alive():
            msg = f"{_told(found)}; the device can't be used any more in this process"
            raise CheckFailed(msg, case)
        smallest = shrink(case, self._fails)
        shown = self._compared(smallest)
        if (
            not isinstance(shown, Raised) or not self.alive()
        ):  # a smaller call ended the device; it is not what was seen
            shown, smallest = found, case
        raise CheckFailed(_told(shown), smallest)

    def _lighter(self, case: Case) -> Case:
        """In a quick run, the same call of one sequence where more would take long to compare."""
        keys = case.queries if case.keys is None else case.keys
        many = case.batch * case.heads[0] * case.queries * keys > _SCORES_WHERE_QUICK
        return replace(case, batch=1) if self.quick and many and case.batch else case

    def alive(self) -> bool:
        """Whether the device can still be used: a fault of a kernel ends it for the whole process."""
        return self.device.type == "cpu" or not isinstance(attempt(self._touch), Raised)

    def _touch(self) -> float:
        return torch.zeros(1, device=self.device).add(1).item()

    def _compared(self, case: Case, call: Callable[..., Any] | None = None) -> AttnError | Raised | None:
        found = attempt(partial(compare, case, self.call if call is None else call, numerics=self.spec.numerics))
        if isinstance(found, Raised):
            return found
        refusal = found.value
        return Raised(refusal) if refusal is not None and not isinstance(refusal, CallRefused) else refusal

    def _fails(self, case: Case) -> bool:
        return self.alive() and self.admits(case) and isinstance(self._compared(case), Raised) and self.alive()

    def require(self, cases: Sequence[Case], ability: str) -> Sequence[Case]:
        """These calls, or a failure where none was admitted although the ability is declared for this device."""
        if cases:
            return cases
        if not any(said_of(item, ability) for item in self.alternatives):
            msg = f"{ability} is not declared for {self.device}"
            raise NotChecked(msg)
        msg = f"it declares {ability}, but admits no call with it that is plain otherwise"
        raise CheckFailed(msg)


def _has(case: Case, fragment: Fragment) -> bool:
    return all(getattr(case, name) == value for name, value in fragment.items())


def _alike(case: Case, other: Case, but: Collection[str]) -> bool:
    """Whether they differ in these fields at most."""
    return all(value == getattr(other, name) for name, value in vars(case).items() if name not in but)


def _dealt(values: Sequence[Fragment], random: Random) -> Iterator[Fragment]:
    """Values in random order, each as often as any other."""
    while True:
        yield from random.sample(values, len(values))


def _dims_fragment(pair: tuple[int, int]) -> Fragment:
    dim, value_dim = pair
    return {"dim": dim, "value_dim": None if value_dim == dim else value_dim}


def said_of(alternative: Constraints, ability: str) -> Any:
    """What an alternative says of an ability such as "softcap", or of a kind of mask such as "masks: bool"."""
    kind = ability.removeprefix("masks: ")
    if kind != ability:
        return alternative.mask_abilities[kind]
    said = getattr(alternative, ability)
    return True if isinstance(said, Limits) else said


def undrawn(dtypes: Iterable[str]) -> str:
    """Why nothing is tried of these dtypes."""
    return f"it declares {', '.join(dtypes)}; this kit makes calls of {', '.join(PREFERRED)} alone"


def _told(raised: Raised) -> str:
    return str(raised.error) if isinstance(raised.error, AssertionError) else f"raises {raised}"


def subject(name: str, *, device: str | None = None, seed: int = 0, quick: bool = False) -> Subject:
    """Find the backend that a name means, and a device of this machine for it.

    Args:
        name: a name, an alias or ``distribution:name``.
        device: such as "cuda"; the first that it declares and this machine has where not given.
        seed: where all choices come from.
        quick: whether to draw few calls.

    Raises:
        BackendNotUsable: nobody has that name, or several; or this machine has no such device.
        NotChecked: it can't run on this machine; says why.
    """
    row = registry.meant(name)
    if row.status != registry.AVAILABLE or row.spec is None:
        raise NotChecked(str(row))
    found = devices() if device is None else [_device(device)]
    for place in found:
        made = Subject(row, place, seed, quick)
        if made.alternatives:
            return made
    unknown = sorted({name for item in row.spec.alternatives for name in item.dtypes or ()})
    if set(PREFERRED).isdisjoint(unknown):
        raise NotChecked(undrawn(unknown))
    if device is not None:
        declared = sorted({name for item in row.spec.alternatives for name in item.platforms or ()})
        msg = f"{row.name} is not for {device}: its declaration has {', '.join(declared)}"
        raise NotChecked(msg)
    msg = f"{row.name} is not for this machine: {registry.probe(row).reason}"
    raise NotChecked(msg)


def _device(name: str) -> torch.device:
    """The device of that name, where this machine has it."""
    found = attempt(lambda: torch.zeros(1, device=name).device)
    if not isinstance(found, Raised):
        return found.value
    msg = f"device {name!r}: this machine has {', '.join(map(str, devices()))} ({found})"
    raise BackendNotUsable(msg)
