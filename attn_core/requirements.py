"""What a distribution and its backends need, whether it is installed, and the line that installs it."""

from __future__ import annotations

import sys
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from attn_core.declaration import Needs
from attn_core.installed import installed, normalized
from attn_core.record import INCOMPATIBLE, MISSING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from attn_core.declaration import BackendSpec
    from attn_core.installed import Installed

CORE = "attn-core"


class RequirementError(ValueError):
    """A distribution asks for something that its own metadata does not have."""


class Unmet(NamedTuple):
    """A requirement that is not met: what is asked for, and the version found, None where there is none."""

    requirement: str
    found: str | None

    def __str__(self) -> str:
        return f"needs {self.requirement}" + (f", found {self.found}" if self.found else "")


class Shortfall(NamedTuple):
    """Why a backend can't be used as things are installed."""

    status: str
    reason: str
    next_step: str


class Needed(NamedTuple):
    """What the metadata of one distribution says that it needs."""

    distribution: str
    requirements: tuple[Requirement, ...]
    extras: frozenset[str]

    def base(self) -> list[Requirement]:
        """What the distribution needs here whatever it is used for."""
        return [item for item in self.requirements if _applies(item, "")]

    def added_by(self, extra: str) -> list[Requirement]:
        """What one of its extras adds here."""
        return [item for item in self.requirements if _applies(item, extra) and not _applies(item, "")]


def needed_by(distribution: Installed) -> Needed:
    """Read what a distribution needs.

    Raises:
        RequirementError: it has no metadata.
        packaging.requirements.InvalidRequirement: a line of it makes no sense.
    """
    headers = distribution.headers()
    if headers is None:
        msg = f"{distribution.name} has no METADATA that can be read"
        raise RequirementError(msg)
    lines = headers.get("requires-dist", ())
    if not lines and distribution.is_egg_info:
        lines = distribution.source.requires or ()  # from its requires.txt
    extras = frozenset(normalized(extra) for extra in headers.get("provides-extra", ()))
    return Needed(distribution.name, tuple(Requirement(line) for line in lines), extras)


def core_shortfall(needed: Needed) -> Shortfall | None:
    """Why a distribution needs another attn-core than this one; None where it does not."""
    ours = [item for item in needed.base() if normalized(item.name) == CORE]
    unmet = (
        [] if CORE not in installed() else unmet_of(ours)
    )  # a core that runs from a checkout has no version to hold against
    if not unmet:
        return None
    asked = Requirement(unmet[0].requirement)
    step = f"pip install '{asked.name}{asked.specifier}', or another version of {needed.distribution}"
    return Shortfall(INCOMPATIBLE, str(unmet[0]), step)


def shortfall(spec: BackendSpec, needed: Needed) -> Shortfall | None:
    """What is missing or has the wrong version for a backend; None where all that it needs is installed.

    Raises:
        RequirementError: it names an extra that its distribution does not have.
    """
    return _base_shortfall(needed) or _needs_shortfall(spec, needed) or _library_shortfall(spec)


def library_reason(library: str) -> str | None:
    """Why the installed version of a library does not meet a requirement such as "flash-attn>=2.6"; None where it does.

    >>> library_reason("packaging>=20") is None
    True
    >>> library_reason("no-such-library>=2.6")
    'needs no-such-library>=2.6, which is not installed'
    """
    unmet = _unmet_library(library)
    if unmet is None:
        return None
    return str(unmet) if unmet.found else f"{unmet}, which is not installed"


def unmet_of(requirements: Iterable[Requirement]) -> list[Unmet]:
    """Those of the requirements that what is installed does not meet, their own extras included."""
    return list(dict.fromkeys(_unmet(requirements, set())))


def _unmet(requirements: Iterable[Requirement], seen: set[tuple[str, str]]) -> Iterator[Unmet]:
    for item in requirements:
        name = normalized(item.name)
        found = installed().get(name)
        if found is None:
            yield Unmet(_shown(item), None)
            continue
        if not _accepts(item, found.version):
            yield Unmet(_shown(item), found.version)
            continue
        for extra in sorted(item.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                yield from _unmet(needed_by(found).added_by(extra), seen)


def _accepts(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return not requirement.specifier


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _shown(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _base_shortfall(needed: Needed) -> Shortfall | None:
    unmet = unmet_of(item for item in needed.base() if normalized(item.name) != CORE)
    return _shortfall(unmet, "pip install " + " ".join(f"'{item.requirement}'" for item in unmet)) if unmet else None


def _shortfall(unmet: Sequence[Unmet], install: str) -> Shortfall:
    status = MISSING if any(item.found is None for item in unmet) else INCOMPATIBLE
    return Shortfall(status, "; ".join(map(str, unmet)), install)


def _needs_shortfall(spec: BackendSpec, needed: Needed) -> Shortfall | None:
    needs = _resolved(spec.needs, needed)
    if needs is None:
        return None
    if needs.module is not None:
        if module_is_there(needs.module):
            return None
        install = needs.install or f"install what brings it, as the authors of {needed.distribution} describe"
        return Shortfall(MISSING, f"needs the module {needs.module}", install)
    unmet = unmet_of(needed.added_by(str(needs.extra)))
    install = needs.install or f"pip install '{needed.distribution}[{needs.extra}]'"
    return _shortfall(unmet, install) if unmet else None


def _resolved(needs: str | Needs | None, needed: Needed) -> Needs | None:
    if isinstance(needs, str):
        return Needs(extra=needs) if normalized(needs) in needed.extras else Needs(module=needs)
    if needs is not None and needs.extra is not None and normalized(needs.extra) not in needed.extras:
        has = ", ".join(sorted(needed.extras)) or "none"
        msg = f"it needs its extra {needs.extra!r}, which its metadata does not have; it has {has}"
        raise RequirementError(msg)
    return needs


def module_is_there(name: str) -> bool:
    """Whether a module could be imported, found without running its parents. A folder without code is no module.

    >>> module_is_there("json.decoder"), module_is_there("json.no_such_part"), module_is_there("no.such.module")
    (True, False, False)
    """
    if name in sys.modules:
        return sys.modules[name] is not None
    top, *rest = name.split(".")
    try:
        found = find_spec(top)
    except ValueError:  # a stand-in in sys.modules, without a spec
        return False
    for part in rest:
        if found is None or found.submodule_search_locations is None:
            return False
        found = _below(part, found.submodule_search_locations)
    return found is not None and found.loader is not None and found.origin is not None


def _below(part: str, folders: Iterable[str]) -> ModuleSpec | None:
    """Find a part of a package in its folders, as import does, but with no need of the package itself."""
    from pkgutil import get_importer

    bare = ModuleSpec(part, None, is_package=True)
    for folder in folders:
        finder = get_importer(folder)
        found = finder.find_spec(part) if finder is not None else None
        if found is not None and found.loader is not None:
            return found
        if found is not None and found.submodule_search_locations and bare.submodule_search_locations is not None:
            bare.submodule_search_locations += found.submodule_search_locations
    return bare if bare.submodule_search_locations else None


def _library_shortfall(spec: BackendSpec) -> Shortfall | None:
    unmet = [_unmet_library(item.library) for item in spec.alternatives if item.library is not None]
    failed = list(dict.fromkeys(item for item in unmet if item is not None))
    if not failed or len(unmet) < len(spec.alternatives) or None in unmet:
        return None
    status = INCOMPATIBLE if any(item.found for item in failed) else MISSING
    install = spec.needs.install if isinstance(spec.needs, Needs) else None
    return Shortfall(status, " or ".join(map(str, failed)), install or f"pip install '{failed[0].requirement}'")


def _unmet_library(library: str) -> Unmet | None:
    return next(iter(unmet_of([_requirement(library)])), None)


@cache
def _requirement(line: str) -> Requirement:
    return Requirement(line)
