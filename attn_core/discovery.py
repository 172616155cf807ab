"""Finds the backends: walks the installed distributions and asks each wheel's hook, one at a time and under guard.

pluggy is used here and nowhere on the way of a call. Nothing is printed, but what a wheel prints itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from attn_core.declaration import API, BackendSpec
from attn_core.guard import Raised, attempt, plain
from attn_core.hookspec import GROUP
from attn_core.installed import installed
from attn_core.record import AVAILABLE, BROKEN, DISABLED, INCOMPATIBLE, Row
from attn_core.requirements import CORE, Shortfall, core_shortfall, needed_by, shortfall

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pluggy

    from attn_core.installed import Installed, metadata
    from attn_core.requirements import Needed
    from attn_core.switches import Switches

HOOK = "attn_backends"

MOST_BACKENDS = 1000
"""How many backends one entry point may declare; more is taken for a generator that never ends."""


class HookError(Exception):
    """A declaration that is not what the hook asks for."""


class Wheel(NamedTuple):
    """A distribution with entry points of ours; ``problem`` where they can't be read."""

    distribution: Installed
    points: tuple[metadata.EntryPoint, ...] = ()
    problem: str | None = None

    @property
    def name(self) -> str:
        """The distribution's normalised name."""
        return self.distribution.name

    def row(self, name: str, status: str, reason: str, next_step: str = "", spec: BackendSpec | None = None) -> Row:
        """Make a row for one of its backends or entry points."""
        return Row(plain(name), status, plain(reason), plain(next_step), self.name, self.distribution.version, spec)

    def rows(self, status: str, reason: str, next_step: str) -> list[Row]:
        """Make the rows of a wheel whose declarations are not asked: one for each entry point."""
        return [self.row(name, status, reason, next_step) for name in sorted({point.name for point in self.points})]

    @property
    def report(self) -> str:
        """What to do about a wheel that is broken."""
        return f"report it to the authors of {self.name}; ATTN_DISABLE={self.name} leaves it out"

    @property
    def reinstall(self) -> str:
        """What to do about a wheel that is not whole."""
        return f"pip install --force-reinstall --no-deps {self.name}"


def discover(switches: Switches, known: Mapping[str, Iterable[str]]) -> tuple[Row, ...]:
    """Ask every installed wheel for its backends.

    Args:
        switches: what the user switched off; a distribution that is off is not run.
        known: names that distributions are known to bring, by distribution.

    Returns:
        Rows in order of name and distribution, each judged by itself: whether several claim a name is not looked at.
    """
    wheels = list(_wheels())
    names = {wheel.name: {*known.get(wheel.name, ()), *(point.name for point in wheel.points)} for wheel in wheels}
    unexplained = switches.unexplained({*names, *(name for some in names.values() for name in some)})
    rows: list[Row] = []
    for wheel in wheels:
        off = switches.distribution_off(wheel.name, names[wheel.name], unexplained=unexplained)
        rows += wheel.rows(DISABLED, off, _switch_on(off)) if off else _rows(wheel, switches)
    return tuple(sorted(rows, key=lambda row: (row.name, row.distribution or "", row.reason)))


def _wheels() -> Iterable[Wheel]:
    for _, distribution in sorted(installed().items()):
        text = attempt(partial(distribution.read, "entry_points.txt"))
        if isinstance(text, Raised):  # not UTF-8: ours only if it names our group
            if GROUP.encode() in getattr(text.error, "object", b""):
                yield Wheel(distribution, problem="its entry_points.txt can't be read")
        elif text.value and GROUP in text.value:
            yield _wheel(distribution, text.value)


def _wheel(distribution: Installed, text: str) -> Wheel:
    points = attempt(partial(_entry_points, distribution))
    if isinstance(points, Raised):  # in other words on each version of Python, so they are left out
        return Wheel(distribution, problem="its entry_points.txt can't be read")
    spoilt = next(
        (line for line in text.splitlines() if line.strip("\ufeff[] \t") == GROUP and line.strip() != f"[{GROUP}]"),
        None,
    )
    if spoilt is not None and not points.value:
        return Wheel(distribution, problem=f"its entry_points.txt has {spoilt!r} where [{GROUP}] is meant")
    return Wheel(distribution, points.value)


def _entry_points(distribution: Installed) -> tuple[metadata.EntryPoint, ...]:
    points = distribution.source.entry_points.select(group=GROUP)
    ordered = sorted(points, key=lambda point: (point.name, point.module))  # .module raises where the value is none
    asked = {point.value: point for point in reversed(ordered)}  # a module that is named twice is asked once
    return tuple(reversed(asked.values()))


def _rows(wheel: Wheel, switches: Switches) -> list[Row]:
    if wheel.problem is not None:
        return [wheel.row(wheel.name, BROKEN, wheel.problem, wheel.reinstall)]
    if not wheel.points:
        return []
    needed = attempt(partial(needed_by, wheel.distribution))
    if isinstance(needed, Raised):
        return wheel.rows(BROKEN, f"its metadata can't be read: {needed}", wheel.reinstall)
    refused = attempt(partial(core_shortfall, needed.value))
    if isinstance(refused, Raised):
        return wheel.rows(BROKEN, f"what it needs can't be told: {refused}", wheel.report)
    if refused.value is not None:
        return wheel.rows(refused.value.status, refused.value.reason, refused.value.next_step)
    return _declared_rows(wheel, needed.value, switches)


def _declared_rows(wheel: Wheel, needed: Needed, switches: Switches) -> list[Row]:
    manager = _manager()
    rows: dict[str, Row] = {}
    failed: list[Row] = []
    for point in wheel.points:
        specs = attempt(partial(_declare, manager, point))
        if isinstance(specs, Raised):
            failed.append(_broken(wheel, point, specs))
            continue
        for spec in specs.value:
            row = _row(wheel, spec, needed, switches)
            earlier = rows.setdefault(spec.name, row)
            if earlier is not row and not _declared_alike(earlier, spec):
                reason = f"two of its entry points declare a backend {spec.name}, each another"
                rows[spec.name] = wheel.row(spec.name, BROKEN, reason, wheel.report)
    return [*rows.values(), *failed]


def _declared_alike(earlier: Row, spec: BackendSpec) -> bool:
    """Whether a backend was declared before in the same way; what a record holds may be of classes that raise."""
    alike = attempt(lambda: bool(earlier.spec == spec))
    return not isinstance(alike, Raised) and alike.value


def _row(wheel: Wheel, spec: BackendSpec, needed: Needed, switches: Switches) -> Row:
    row = wheel.row(spec.name, AVAILABLE, _hidden_versions(wheel.distribution), "", spec)
    off = switches.backend_off(wheel.name, {spec.name, *spec.aliases})
    if off is not None:
        return replace(row, status=DISABLED, reason=off, next_step=_switch_on(off))
    if spec.api > API:
        reason = f"it speaks version {spec.api} of the meanings, this attn-core speaks {API}"
        return replace(row, status=INCOMPATIBLE, reason=reason, next_step=f"pip install --upgrade {CORE}")
    lacking = attempt(partial(shortfall, spec, needed))
    if isinstance(lacking, Raised):
        found: Shortfall | None = Shortfall(BROKEN, f"what it needs can't be told: {lacking}", wheel.report)
    else:
        found = lacking.value
    if found is None:
        return row
    return replace(row, status=found.status, reason=plain(found.reason), next_step=plain(found.next_step))


def _switch_on(off: str) -> str:
    return off.replace("named in", "take it out of").replace("left out of", "add it to")


def _hidden_versions(distribution: Installed) -> str:
    hidden = ", ".join(f"{version} in {folder}" for version, folder in distribution.shadowed)
    return f"also installed, and not used, is version {hidden}" if hidden else ""


def _broken(wheel: Wheel, point: metadata.EntryPoint, raised: Raised) -> Row:
    error = raised.error
    if isinstance(error, HookError):
        return wheel.row(point.name, BROKEN, f"its declaration {error}", wheel.report)
    if isinstance(error, ModuleNotFoundError) and error.name and f"{point.module}.".startswith(f"{error.name}."):
        reason = f"it is half installed: its metadata names the module {point.module}, and there is no {error.name}"
        return wheel.row(point.name, BROKEN, reason, wheel.reinstall)
    return wheel.row(point.name, BROKEN, f"its declaration raises {raised}", wheel.report)


def _manager() -> pluggy.PluginManager:
    from pluggy import PluginManager

    from attn_core import hookspec

    manager = PluginManager(hookspec.PROJECT)
    manager.add_hookspecs(hookspec)
    return manager


def _declare(manager: pluggy.PluginManager, point: metadata.EntryPoint) -> tuple[BackendSpec, ...]:
    """Import what an entry point names, and call its hook. The manager has one plugin at a time, so that none wraps another."""
    plugin = point.load()
    # What is left of a package that was not wholly removed is a folder without code, which import takes for a namespace.
    if getattr(plugin, "__path__", None) is not None and getattr(plugin, "__file__", None) is None:
        msg = f"{point.module} is a folder without code"
        raise ModuleNotFoundError(msg, name=point.module)
    manager.register(plugin, name=point.name)
    try:
        _check_implementations(manager, plugin)
        return tuple(_checked_specs(manager.hook.attn_backends()))
    finally:
        manager.unregister(name=point.name)


def _check_implementations(manager: pluggy.PluginManager, plugin: object) -> None:
    from pluggy import PluginValidationError

    try:
        manager.check_pending()
    except PluginValidationError as error:
        msg = f"implements an {error}; the hook of attn is {HOOK}"
        raise HookError(msg) from error
    implementations = manager.hook.attn_backends.get_hookimpls()
    if not implementations:
        undecorated = callable(getattr(plugin, HOOK, None))
        msg = (
            f"has an {HOOK} that is not marked with @hookimpl" if undecorated else f"does not implement the hook {HOOK}"
        )
        raise HookError(msg)
    if any(item.hookwrapper or item.wrapper for item in implementations):
        msg = f"wraps {HOOK}; a wheel declares its own backends and leaves those of others alone"
        raise HookError(msg)


def _checked_specs(results: list[Any]) -> list[BackendSpec]:
    if not results:
        msg = f"returns None from {HOOK}; return a list of BackendSpec, or yield them"
        raise HookError(msg)
    specs: dict[str, BackendSpec] = {}
    for result in results:
        for spec in _specs_in(result):
            if spec.name in specs:
                msg = f"has two backends named {spec.name!r}"
                raise HookError(msg)
            specs[spec.name] = spec
    return list(specs.values())


def _specs_in(result: Any) -> Iterable[BackendSpec]:
    if not isinstance(result, Iterable):
        msg = f"returns a {type(result).__name__} from {HOOK}; return a list of BackendSpec, or yield them"
        raise HookError(msg)
    specs = list(islice(result, MOST_BACKENDS + 1))
    if len(specs) > MOST_BACKENDS:
        msg = f"declares more than {MOST_BACKENDS} backends"
        raise HookError(msg)
    for spec in specs:
        if type(spec) is not BackendSpec:  # a class derived from it could do anything where rows are compared
            msg = f"has a {type(spec).__name__} among its backends; each is a BackendSpec itself"
            raise HookError(msg)
    return specs
