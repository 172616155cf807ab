"""Says for each backend that is known whether it admits a call, and every reason why not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from attn_core import loading, registry, selection
from attn_core.admission import refusals
from attn_core.errors import AttnError, BackendNotUsable, CallRefused
from attn_core.parallel import scope
from attn_core.reading import read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attn_core.declaration import BackendSpec
    from attn_core.facts import Facts
    from attn_core.masks import Description
    from attn_core.parallel import ContextParallel
    from attn_core.parallel.explaining import Spreading
    from attn_core.parallel.kind import Kind
    from attn_core.registry import Row


_MOST_BYTES = 2**63


@dataclass(frozen=True)
class Verdict:
    """What one backend says of the call.

    Attributes:
        name: the backend.
        status: as ``attn list-backends`` has it, or "not installed".
        admitted: whether it would run the call here and now.
        reasons: why not, each with the value found and the values accepted; empty when admitted.
        distribution: the wheel that brings it.
    """

    name: str
    status: str
    admitted: bool
    reasons: tuple[str, ...]
    distribution: str | None


@dataclass(frozen=True)
class Explanation:
    """The answer of ``explain``: structured, and readable as text.

    Attributes:
        facts: the facts of the call, or None where the call itself makes no sense.
        refusal: why the call makes no sense whoever computes it, or None.
        chosen: the backend that ``attention`` would run, or None.
        chosen_by: who chose: the call, a scope, the process, the environment or the default.
        error: the error that ``attention`` would raise, as text, or None.
        verdicts: one for each backend that is known.
        parallel: how the call is spread over ranks and what that costs, or None where it is on one.
    """

    facts: Facts | None
    refusal: str | None
    chosen: str | None
    chosen_by: str
    error: str | None
    verdicts: tuple[Verdict, ...]
    parallel: Spreading | None = None

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"The call is refused, whichever backend is chosen: {self.refusal}"
        here = [verdict for verdict in self.verdicts if verdict.status != registry.NOT_INSTALLED]
        width = max((len(verdict.name) for verdict in here), default=0)
        lines = [f"Call: {_shown(self.facts)}"] if self.facts is not None else []
        if self.parallel is not None:
            lines.append(f"Context parallel: {self.parallel}")
        outcome = f"Runs on: {self.chosen}" if self.chosen else "Refused"
        lines.append(f"{outcome} (chosen by {self.chosen_by})" + (f": {self.error}" if self.error else ""))
        for verdict in here:
            mark = "yes" if verdict.admitted else "no "
            lines.append(f"  {mark}  {verdict.name.ljust(width)}  {'; '.join(verdict.reasons)}".rstrip())
        return "\n".join([*lines, *self._elsewhere()])

    def _elsewhere(self) -> list[str]:
        """A line for each known wheel that is not installed."""
        names: dict[str, list[str]] = {}
        for verdict in self.verdicts:
            if verdict.status == registry.NOT_INSTALLED:
                names.setdefault(str(verdict.distribution), []).append(verdict.name)
        return [f"  not installed: {wheel} ({', '.join(found)}): pip install {wheel}" for wheel, found in names.items()]

    def as_data(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | Description | None = None,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | Sequence[str] | None = None,
    parallel: ContextParallel | None = None,
) -> Explanation:
    """Say what ``attention`` would do with the same arguments, and what every backend says of the call.

    Covers backends that are not installed or not usable here too. Nothing is computed, nothing is raised for a call that
    would be refused.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 16, 4, 8)
        >>> explain(q, q, q, softcap=30.0, backend="native").chosen is None
        True
    """
    options = {
        "attn_mask": attn_mask, "causal": causal, "scale": scale, "window_size": window_size, "softcap": softcap,
        "dropout_p": dropout_p, "deterministic": deterministic, "return_lse": return_lse,
    }  # fmt: skip
    parallel = scope.in_force() if parallel is None else parallel
    try:
        if parallel is not None:
            from attn_core.parallel.explaining import kind_of_parts

            call, kind = kind_of_parts(parallel, query, key, value, options)
            return explain_facts(call.facts, backend, kind, here=True)
        facts = read(query, key, value, options).facts
    except CallRefused as error:
        return Explanation(None, str(error), None, "the call", str(error), ())
    return explain_facts(facts, backend, here=True)


def explain_shapes(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    dtype: str,
    device: str,
    grid: tuple[int, int, str] | None = None,
    *,
    backward: bool = False,
    **options: Any,
) -> Explanation:
    """``explain`` for tensors that are only described, on a device that need not be here.

    Args:
        query: shape; of the whole sequence where it is spread.
        key: the same.
        value: the same.
        dtype: by name.
        device: by name.
        grid: over how many ranks the sequence is spread: places of the ring, of ulysses, and the order.
        backward: whether gradients are asked for.
        options: of ``attention``.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        msg = f"dtype: found {dtype!r}; accepted: a dtype of torch such as bfloat16, float16, float32"
        raise CallRefused(msg)
    backend = options.pop("backend", None)
    try:
        for label, shape in (("query", query), ("key", key), ("value", value)):
            _check_size(label, shape, kind)
        first, second, third = (
            torch.empty(tuple(shape), dtype=kind, device="meta", requires_grad=backward)
            for shape in (query, key, value)
        )
        call = read(first, second, third, options)
        facts = replace(call.facts, **_device_facts(device))
        kind = None
        if grid is not None:
            from attn_core.parallel.explaining import kind_of_whole

            kind = kind_of_whole(replace(call, facts=facts), first, second, grid)
    except CallRefused as error:
        return Explanation(None, str(error), None, "the call", str(error), ())
    return explain_facts(facts, backend, kind)


def _check_size(label: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    if prod(max(size, 1) for size in shape) * dtype.itemsize >= _MOST_BYTES:
        msg = f"{label}: found shape {tuple(shape)}; accepted: one that a tensor can have, of fewer than 2**63 bytes"
        raise CallRefused(msg)


def explain_facts(
    facts: Facts, backend: str | Sequence[str] | None = None, kind: Kind | None = None, *, here: bool = False
) -> Explanation:
    """``explain`` from the facts of a call; ``kind`` says how it is spread, where it is.

    With ``here`` the call would be made on this machine, and what it would run on is loaded, as the call does.
    """
    parallel, reasons_of = None, partial(_reasons, facts=facts)
    if kind is not None:
        from attn_core.parallel.explaining import spreading
        from attn_core.parallel.preparation import reasons_against

        device = {"platform": facts.platform, "compute_capability": facts.compute_capability}
        parallel, reasons_of = spreading(kind), partial(reasons_against, kind=kind, device=device)
    verdicts = tuple(_verdict(row, reasons_of) for row in registry.known_rows())
    try:
        choice = selection.in_force() if backend is None else selection.normalized(backend)
    except AttnError as error:
        return Explanation(facts, None, None, "the call", str(error), verdicts, parallel)
    chosen_by = "the call" if backend is not None else selection.origin()
    chosen, errors = None, []
    for name in selection.listed(choice):
        try:
            row = registry.find(name)
        except AttnError as error:
            errors.append(str(error))
            if registry.mistyped(name):  # attention goes no further down the list
                break
            continue
        reasons = reasons_of(row.spec)  # type: ignore[arg-type]
        if not reasons and here:
            reasons = _load_reasons(row.spec)  # type: ignore[arg-type]
            verdicts = tuple(_with_reasons(verdict, row, reasons) for verdict in verdicts)
        if not reasons:
            chosen = row.name
            break
        errors.append(f"{row.name}: {'; '.join(reasons)}")
    return Explanation(facts, None, chosen, chosen_by, None if chosen else "\n".join(errors), verdicts, parallel)


def _reasons(spec: BackendSpec, facts: Facts) -> list[str]:
    return refusals(spec, facts)


def _verdict(row: Row, reasons_of: Callable[[BackendSpec], list[str]]) -> Verdict:
    reasons = [] if row.status == registry.AVAILABLE else [_status_reason(row)]
    if row.spec is not None:
        reasons += reasons_of(row.spec)
    return Verdict(row.name, row.status, not reasons, tuple(reasons), row.distribution)


def _load_reasons(spec: BackendSpec) -> list[str]:
    try:
        loading.load(spec)
    except BackendNotUsable as error:
        return [str(error)]
    return []


def _with_reasons(verdict: Verdict, row: Row, reasons: list[str]) -> Verdict:
    if not reasons or (verdict.name, verdict.distribution) != (row.name, row.distribution):
        return verdict
    return replace(verdict, admitted=False, reasons=tuple(reasons))


def _status_reason(row: Row) -> str:
    return ": ".join(part for part in (row.status, row.reason, row.next_step) if part)


def _device_facts(device: str) -> dict[str, Any]:
    from attn_core.facts import PLATFORMS
    from attn_core.reading import device_facts

    platform, colon, index = device.partition(":")
    if platform not in PLATFORMS or bool(colon) != (index.isascii() and index.isdigit()):
        msg = f"device: found {device!r}; accepted: {', '.join(PLATFORMS)}, and the number of one as in cuda:0"
        raise CallRefused(msg)
    if platform == "cuda" and int(index or 0) < torch.cuda.device_count():
        return device_facts(torch.device(device))
    return {"platform": platform, "compute_capability": None}


_SHOWN = (
    "causal",
    "window_size",
    "softcap",
    "dropout",
    "deterministic",
    "return_lse",
    "backward",
    "mask_gradient",
    "compiled",
)


def _shown(facts: Facts | None) -> str:
    if facts is None:
        return ""
    parts = [
        facts.platform + (" {}.{}".format(*facts.compute_capability) if facts.compute_capability else ""),
        facts.dtype,
        f"{facts.heads} heads" + (f" on {facts.key_heads} key heads" if facts.gqa else ""),
        f"head_dim {facts.head_dim}"
        + (f", value {facts.value_head_dim}" if facts.value_head_dim != facts.head_dim else ""),
        f"lengths {facts.lengths}",
        f"mask {facts.mask}",
    ]
    for name in _SHOWN:
        found = getattr(facts, name)
        if found is True:
            parts.append(name)
        elif found:
            parts.append(f"{name} {found}")
    return ", ".join(parts)
