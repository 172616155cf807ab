"""Makes tables of backends from their declarations. The wheels that declare them have to be installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

from attn_core import listing
from attn_core.declaration import Backward, CapabilityRange, Constraints, No, describe_head_dims
from attn_core.hookspec import GROUP
from kit_tables import hardware_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from attn_core.plugin import BackendSpec

ABILITIES = {
    "causal": "`causal`",
    "window_size": "`window_size`",
    "gqa": "fewer key heads (GQA)",
    "cross_lengths": "Sq other than Skv",
    "value_head_dim": "Dv other than D",
    "softcap": "`softcap`",
    "dropout": "`dropout_p`",
    "lse": "`return_lse`",
    "deterministic": "`deterministic`",
    "backward": "gradients",
    "mask_gradient": "gradient of a float mask",
}


class Notes:
    """The reasons of every no, each numbered once."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def refer(self, reasons: Iterable[str]) -> str:
        """Return the numbers of these reasons, as a cell shows them."""
        unique = list(dict.fromkeys(reasons))
        self.reasons.extend(reason for reason in unique if reason not in self.reasons)
        return "(" + ", ".join(str(self.reasons.index(reason) + 1) for reason in unique) + ")"


def find_specs(wheel: str) -> list[BackendSpec]:
    """Return what an installed wheel, such as attn-native, declares."""
    package = wheel.replace("-", "_")
    modules = {
        point.value: point.load() for point in entry_points(group=GROUP) if point.module.split(".")[0] == package
    }
    assert modules, f"{wheel} is not installed; pip install it from this checkout first"
    return [spec for place in sorted(modules) for spec in modules[place].attn_backends()]


def platforms(alternatives: Iterable[Constraints]) -> str:
    """Return the platforms of these alternatives."""
    return ", ".join(sorted({name for item in alternatives for name in item.platforms or ()}))


def where(alternatives: Iterable[Constraints]) -> str:
    """Return the platforms of these alternatives, with the compute capability where only some are admitted."""
    given = list(alternatives)
    capabilities = {describe_capability(item) for item in given}
    return platforms(given) + (f" {capabilities.pop()}" if len(capabilities) == 1 else "")


def describe_capability(item: Constraints) -> str:
    """Return the compute capabilities of an alternative as people write them, or nothing."""
    accepted = item.compute_capability
    if accepted is None or isinstance(accepted, CapabilityRange):
        return str(accepted or "")
    return ", ".join(f"{major}.{minor}" for major, minor in sorted(accepted))


def in_each(spec: BackendSpec, describe: Callable[[Constraints], str]) -> str:
    """Return what describes every alternative; where they differ, each beside where it holds."""
    grouped: dict[str, list[Constraints]] = {}
    for item in spec.alternatives:
        grouped.setdefault(describe(item), []).append(item)
    if len(grouped) == 1:
        return next(iter(grouped))
    return "<br>".join(f"{where(items).strip()}: {text}" for text, items in grouped.items())


def mask_kinds(item: Constraints) -> str:
    """Return the kinds of mask that an alternative admits."""
    admitted = [kind for kind, admits in cast("dict[str, object]", item.masks).items() if admits and kind != "none"]
    return ", ".join(admitted) or "none"


def ability(spec: BackendSpec, name: str, notes: Notes) -> str:
    """Return yes, no with its reasons, or where."""
    refusing = [item for item in spec.alternatives if isinstance(getattr(item, name), No)]
    admitting = [item for item in spec.alternatives if not isinstance(getattr(item, name), No)]
    if not refusing:
        return "yes"
    numbers = notes.refer(str(getattr(item, name)) for item in refusing)
    if not admitting:
        return f"no {numbers}"
    here, elsewhere = platforms(admitting), platforms(refusing)
    return f"in part {numbers}" if set(here.split(", ")) & set(elsewhere.split(", ")) else f"{here}; else no {numbers}"


def narrower(spec: BackendSpec) -> str:
    """Say so where the backward takes less than the forward."""
    return ", narrower" if any(isinstance(item.backward, Backward) for item in spec.alternatives) else ""


def one(found: object, notes: Notes) -> str:
    """Return yes, or no with its reason."""
    return f"no {notes.refer([str(found)])}" if isinstance(found, No) else "yes"


def context_parallel(spec: BackendSpec, notes: Notes) -> str:
    """Return the modes in which a backend can serve."""
    support = spec.context_parallel
    return f"no {notes.refer([str(support)])}" if isinstance(support, No) else ", ".join(listing.parallel_modes(spec))


def on_hardware(spec: BackendSpec, runs: Collection[str], notes: Notes) -> str:
    """Return whether a run of the kit is recorded. A declaration that says otherwise than the records stops everything."""
    if spec.name in runs:
        assert spec.unverified is None, f"a run of {spec.name} is recorded; take unverified= out of its declaration"
        return "yes"
    return f"no {notes.refer([spec.unverified or 'no run of the kit is recorded yet'])}"


def rows(specs: list[BackendSpec], notes: Notes) -> Iterable[list[str]]:
    """Yield the table, a list of cells for each line, a column for each backend."""
    yield ["", *(f"`{spec.name}`" for spec in specs)]
    yield ["---"] * (len(specs) + 1)
    yield ["what it is", *(spec.summary for spec in specs)]
    yield ["also called", *(", ".join(f"`{alias}`" for alias in spec.aliases) or "-" for spec in specs)]
    yield ["platforms", *(platforms(spec.alternatives) for spec in specs)]
    if any(item.compute_capability for spec in specs for item in spec.alternatives):
        yield [
            "compute capability",
            *(in_each(spec, lambda item: describe_capability(item) or "any") for spec in specs),
        ]
    yield ["dtypes", *(in_each(spec, lambda item: listed(item.dtypes or ())) for spec in specs)]
    yield ["head dims", *(in_each(spec, lambda item: describe_head_dims(item.head_dims)) for spec in specs)]
    yield ["masks", *(in_each(spec, mask_kinds) for spec in specs)]
    for name, label in ABILITIES.items():
        more = narrower if name == "backward" else lambda _: ""
        yield [label, *(ability(spec, name, notes) + more(spec) for spec in specs)]
    yield ["`torch.compile`", *(one(spec.compile, notes) for spec in specs)]
    yield ["fit for context parallel", *(context_parallel(spec, notes) for spec in specs)]
    runs = hardware_runs()
    yield ["verified on hardware", *(on_hardware(spec, runs, notes) for spec in specs)]


def listed(names: Collection[str]) -> str:
    """Return names in order."""
    return ", ".join(sorted(names))


def table(specs: list[BackendSpec]) -> str:
    """Return the table and, under it, the reasons."""
    notes = Notes()
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(specs, notes)]
    reasons = [f"{number}. {reason}" for number, reason in enumerate(notes.reasons, 1)]
    return "\n".join([*lines, "", "Why not:", "", *reasons])
