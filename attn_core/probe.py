"""Tries a backend on this machine: loads it, makes one tiny call, and looks at what comes out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attn_core import loading
from attn_core.admission import refusals
from attn_core.errors import BackendNotUsable
from attn_core.facts import DTYPES, MASKS, Facts
from attn_core.guard import Raised, attempt, plain
from attn_core.masks import KeyPadding, Packed
from attn_core.reading import default_scale, device_facts
from attn_core.record import AVAILABLE, BROKEN, UNSUPPORTED, WORKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attn_core.declaration import BackendSpec, Constraints
    from attn_core.record import Row

log = logging.getLogger("attn_core")

LENGTH = 128
HEADS = 2

_HEAD_DIMS = (64, 128, 32, 256, 16, 8)
_PREFERRED = ("bfloat16", "float16", "float32", "float64")
_TOLERANCES = {"float64": 1e-6, "float32": 1e-2, "float16": 2e-2, "bfloat16": 5e-2}
"""Relative error (Frobenius norm) that still counts as working: loose, since this is no conformance test."""


class WrongResultError(Exception):
    """A kernel ran and returned something else than attention."""


@dataclass(frozen=True)
class Trial:
    """One call to try, and where."""

    facts: Facts
    device: torch.device

    def __str__(self) -> str:
        capability = self.facts.compute_capability
        return f"{self.facts.platform}{' {}.{}'.format(*capability) if capability else ''} in {self.facts.dtype}"


def probe(row: Row) -> Row:
    """Try an available backend: ``works``, ``unsupported`` (this machine) or ``broken``. Other rows stay as they are."""
    spec = row.spec
    if row.status != AVAILABLE or spec is None:
        return row
    trials = list(_trials(spec))
    trial = next((item for item in trials if not refusals(spec, item.facts)), None)
    if trial is None:
        closest = min((refusals(spec, item.facts) for item in trials), key=len)
        return replace(
            row, status=UNSUPPORTED, reason="; ".join(closest), next_step="use it on a machine that it is made for"
        )
    step = f"repair or reinstall what it needs, or report it to the authors of {row.distribution}"
    try:
        adapter = loading.load(spec)
    except BackendNotUsable as error:
        if loading.refuses_itself(error):
            return replace(row, status=UNSUPPORTED, reason=plain(str(error)), next_step="")
        return replace(row, status=BROKEN, reason=plain(f"does not load: {loading.cause(error)}"), next_step=step)
    if spec.first_call_compiles:
        log.info("%s compiles at the first call of a kind, which can take from seconds to minutes", spec.name)
    tried = attempt(partial(_try, spec, adapter.forward, trial))
    if isinstance(tried, Raised):
        reason = f"a call on {trial} " + (
            str(tried.error) if isinstance(tried.error, WrongResultError) else f"raises {tried}"
        )
        return replace(row, status=BROKEN, reason=plain(reason), next_step=step)
    return replace(row, status=WORKS, reason=f"tried on {trial}", next_step="")


def _trials(spec: BackendSpec) -> Iterator[Trial]:
    for device in devices():
        for alternative in spec.alternatives:
            head_dim, value_head_dim = _head_dims(alternative)
            yield Trial(
                Facts(
                    **device_facts(device),
                    dtype=_first(alternative.dtypes, (*_PREFERRED, *DTYPES)),
                    head_dim=head_dim,
                    value_head_dim=value_head_dim,
                    heads=HEADS,
                    key_heads=HEADS,
                    mask=next(kind for kind in MASKS if alternative.masks[kind]),  # type: ignore[index]
                ),
                device,
            )


def devices() -> list[torch.device]:
    """The kinds of device that this machine has, the fastest first."""
    accelerator = getattr(torch, "accelerator", None)
    names = [str(accelerator.current_accelerator())] if accelerator is not None and accelerator.is_available() else []
    if not names:
        names = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    return [torch.device(name, 0) if name == "cuda" else torch.device(name) for name in (*names, "cpu")]


def _first(declared: Any, order: tuple[str, ...]) -> str:
    return next(name for name in order if name in declared)


def _head_dims(alternative: Constraints) -> tuple[int, int]:
    declared = alternative.head_dims
    if declared is None:
        return 64, 64
    common = next((number for number in _HEAD_DIMS if number in declared), None)
    ends = (*declared[:1], *declared[-1:]) if isinstance(declared, range) else declared
    chosen = common if common is not None else min(ends, key=lambda item: (isinstance(item, tuple), item))
    return chosen if isinstance(chosen, tuple) else (chosen, chosen)


def _try(spec: BackendSpec, forward: Callable[..., Any], trial: Trial) -> None:
    facts = trial.facts
    dtype = getattr(torch, facts.dtype)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, LENGTH, HEADS, size, generator=generator).to(dtype).to(trial.device)
        for size in (facts.head_dim, facts.head_dim, facts.value_head_dim)
    )
    mask = _mask(facts.mask, dtype, trial.device)
    scale = default_scale(facts.head_dim)
    with torch.no_grad():
        out = forward(query, key, value, scale=scale, **({} if mask is None else {"attn_mask": mask}))
    _check(out, _attention(query, key, value, scale), facts.dtype, spec)


def _mask(kind: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Make a mask of a kind that hides nothing."""
    if kind == "bool":
        return torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=device)
    if kind == "float":
        return torch.zeros(1, 1, LENGTH, LENGTH, dtype=dtype, device=device)
    if kind == "key_padding":
        return KeyPadding(torch.ones(1, LENGTH, dtype=torch.bool, device=device))
    if kind == "packed":
        ends = torch.tensor([0, LENGTH], dtype=torch.int32, device=device)
        return Packed(ends, ends, max_seqlen_q=LENGTH, max_seqlen_k=LENGTH)
    return None


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    heads_first = [tensor.cpu().double().transpose(1, 2) for tensor in (query, key, value)]
    scores = heads_first[0] @ heads_first[1].mT * scale
    return (scores.softmax(-1) @ heads_first[2]).transpose(1, 2)


def _check(out: Any, expected: torch.Tensor, dtype: str, spec: BackendSpec) -> None:
    if not isinstance(out, torch.Tensor) or out.shape != expected.shape:
        found = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        msg = f"returns {found} where {tuple(expected.shape)} is due"
        raise WrongResultError(msg)
    difference = (out.detach().cpu().double() - expected).norm() / expected.norm()
    accepted = max(_TOLERANCES.get(dtype, 0.5), 3 * getattr(spec.numerics, "error", 0.0))
    if not difference <= accepted:  # NaN compares false
        msg = f"is off by {difference:.2g} (relative); accepted: {accepted:.2g}"
        raise WrongResultError(msg)
