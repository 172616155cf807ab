"""What a check is, and which checks a declaration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attn_core.testing.outcomes import NotChecked

if TYPE_CHECKING:
    from attn_core.declaration import BackendSpec
    from attn_core.testing.subject import Subject

KIT = 3
"""The version of the kit: what a backend that passes has been held to. Checks that are added, or try more, raise it."""

MODULES = (
    "declaration", "refusals", "options", "masks", "gradients", "sizes", "tensors", "numbers", "dropout", "repetition",
    "circumstances", "combinations", "tracing", "graphs", "parallel",
)  # fmt: skip
"""Where the checks are, in the order in which they run: tracing forgets what was compiled before."""

Function = Callable[..., "str | None"]
_definitions: list[Definition] = []


@dataclass(frozen=True)
class Definition:
    """A check for backends of a kind.

    Attributes:
        name: its identifier, or what stands before the brackets of it.
        function: of the subject, and of one of ``each`` where there is one; returns what to print, raises where it fails.
        when: whether a declaration asks for it.
        each: what a declaration asks it for, one by one.
        new: whether it came with this release: then it warns where it would fail.
        cheap: whether it makes few calls that run, so that a quick run has it even where each kind of call compiles first.
    """

    name: str
    function: Function
    when: Callable[[BackendSpec], bool]
    each: Callable[[BackendSpec], Iterable[Any]] | None
    new: bool
    cheap: bool


@dataclass(frozen=True)
class Check:
    """One check of one backend.

    Attributes:
        identifier: such as "causal" or "masks[bool]".
        definition: what it does.
        item: what it is asked for, where it is one of several.
    """

    identifier: str
    definition: Definition
    item: Any = None

    @property
    def about(self) -> str:
        """What it looks at, in a line."""
        return str(self.definition.function.__doc__ or "").partition("\n")[0]

    def __call__(self, subject: Subject) -> str | None:
        """Run it.

        Returns:
            What was tried, in a line.

        Raises:
            CheckFailed: the backend does not do what it declares.
            NotChecked: it can't be tried on this machine.
        """
        if subject.quick and subject.spec.first_call_compiles and not self.definition.cheap:
            msg = "left out of a quick run, since each kind of call compiles first"
            raise NotChecked(msg)
        arguments = () if self.definition.each is None else (self.item,)
        return self.definition.function(subject, *arguments)


def _always(_: BackendSpec) -> bool:
    return True


def check(
    name: str,
    *,
    when: Callable[[BackendSpec], bool] = _always,
    each: Callable[[BackendSpec], Iterable[Any]] | None = None,
    new: bool = False,
    cheap: bool = False,
) -> Callable[[Function], Function]:
    """Mark a function as a check.

    Args:
        name: its identifier; with ``each``, followed by the item in brackets.
        when: whether a declaration asks for it.
        each: the items that a declaration asks it for.
        new: whether it came with this release: for one release it warns where it would fail.
        cheap: whether it makes few calls that run.
    """

    def mark(function: Function) -> Function:
        _definitions.append(Definition(name, function, when, each, new, cheap))
        return function

    return mark


def checks_of(spec: BackendSpec) -> list[Check]:
    """Every check that a declaration asks for, whatever this machine is.

    Example:
        >>> from attn_core.plugin import BackendSpec, Constraints
        >>> constraints = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, causal=True)
        >>> spec = BackendSpec(api=1, name="x", summary="x", forward="x:x", constraints=constraints)
        >>> {"causal", "refused[softcap]"} <= {check.identifier for check in checks_of(spec)}
        True
    """
    found = []
    for definition in definitions():
        if not definition.when(spec):
            continue
        if definition.each is None:
            found.append(Check(definition.name, definition))
        else:
            found.extend(Check(f"{definition.name}[{item}]", definition, item) for item in definition.each(spec))
    return found


@cache
def definitions() -> tuple[Definition, ...]:
    """Every check that there is, in the order in which they run."""
    for module in MODULES:
        import_module(f"attn_core.testing.checks.{module}")
    return tuple(_definitions)


def declared(*abilities: str) -> Callable[[BackendSpec], bool]:
    """Say whether some alternative of a declaration declares all of these."""

    def asks(spec: BackendSpec) -> bool:
        return any(all(getattr(item, ability) for ability in abilities) for item in spec.alternatives)

    return asks


def differentiable(spec: BackendSpec) -> bool:
    """Whether some alternative of a declaration has a backward."""
    from attn_core.declaration import No

    return any(not isinstance(item.backward, No) for item in spec.alternatives)
