"""What is declared as No is refused with its reason, and the kernel does not run."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attn_core import call, loading
from attn_core.declaration import No
from attn_core.errors import AttnError
from attn_core.facts import MASKS, Facts
from attn_core.guard import Raised, attempt
from attn_core.testing.checking import check
from attn_core.testing.outcomes import CheckFailed, NotChecked
from attn_core.testing.spoiling import SPOIL
from attn_core.testing.subject import said_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from attn_core.declaration import BackendSpec, Constraints
    from attn_core.testing.drawing import Case
    from attn_core.testing.subject import Subject

_ALL = ("query", "key", "value")
ASKED: Mapping[str, Mapping[str, Any]] = {
    "causal": {"causal": True},
    "gqa": {"heads": (4, 2)},
    "cross_lengths": {"queries": 5, "keys": 17},
    "value_head_dim": {"value_dim": 24},
    "window_size": {"window_size": (3, 1)},
    "softcap": {"softcap": 5.0},
    "dropout": {},
    "lse": {"return_lse": True},
    "deterministic": {"deterministic": True},
    "mask_gradient": {"mask": "float", "gradients": ("attn_mask",)},
    "backward": {"gradients": _ALL},
    "vmap": {},
    "forward_mode": {},
    **{f"masks: {kind}": {"mask": kind, "mask_hides": "some"} for kind in MASKS if kind != "none"},
}
"""For each ability, the fields of a call that asks for it."""


def _refused_abilities(spec: BackendSpec) -> Iterable[str]:
    return [name for name in ASKED if any(isinstance(said_of(item, name), No) for item in spec.alternatives)]


class Spy:
    """Counts the calls of a kernel that is not to run."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        """Count, and call the kernel."""
        self.calls += 1
        return function(*tensors, **options)


@contextmanager
def watched(subject: Subject) -> Iterator[Spy]:
    """Watch the kernel: what was admitted before is forgotten, so that every call goes by the declaration."""
    spy, own = Spy(), subject.adapter
    backward = None if own.backward is None else partial(spy, own.backward)
    call.forget()
    try:
        with loading.replaced(subject.spec, loading.Adapter(partial(spy, own.forward), backward)):
            yield spy
    finally:
        call.forget()


def expect_refusal(subject: Subject, make: Callable[[], Any], reasons: Iterable[str], what: str) -> str:
    """Fail unless the call is refused in one of these words, without the kernel having run."""
    with watched(subject) as spy:
        outcome = attempt(make)
    if not isinstance(outcome, Raised):
        msg = f"{what}: admitted, although it is declared as No: {'; '.join(sorted(set(reasons)))}"
        raise CheckFailed(msg)
    if spy.calls:
        msg = f"{what}: the kernel ran before the call was refused ({outcome})"
        raise CheckFailed(msg)
    if not isinstance(outcome.error, AttnError):
        msg = f"{what}: raises {outcome}, not an AttnError with the declared reason"
        raise CheckFailed(msg)
    if not any(reason in str(outcome.error) for reason in reasons):
        msg = f"{what}: refused, but not with the declared reason ({'; '.join(sorted(set(reasons)))}): {outcome.error}"
        raise CheckFailed(msg)
    return f"refused: {next(iter(reasons))}"


@check("refused", each=_refused_abilities, cheap=True)
def refused(subject: Subject, ability: str) -> str:
    """What is declared as No is refused with that reason, and the kernel does not run."""
    found = [said_of(item, ability) for item in subject.alternatives]
    reasons = [no.reason for no in found if isinstance(no, No)]
    if len(reasons) < len(found):
        msg = f"{ability} is declared for {subject.device}, by another alternative"
        raise NotChecked(msg)
    case = _asking(subject, ability)
    return expect_refusal(subject, partial(_ask, subject, case, ability), reasons, ability)


def _asking(subject: Subject, ability: str) -> Case:
    """The plainest call that asks for an ability, and for nothing else that is refused."""
    fields = dict(ASKED[ability])
    dims = [item["dim"] for item in subject.factors["dims"]]
    if ability == "value_head_dim":
        fields["value_dim"] = next((dim for dim in dims if dim != subject.plain.dim), subject.plain.dim + 8)
    return subject.case(subject.plain_fragment, fields)


def _ask(subject: Subject, case: Case, ability: str) -> Any:
    built = case.build()
    tensors = (built.query, built.key, built.value)
    options = dict(built.options)
    if ability == "dropout":
        options["dropout_p"] = 0.5
    if ability == "vmap":
        several = [torch.stack([tensor, tensor]) for tensor in tensors]
        return torch.func.vmap(lambda *each: subject.call(*each, **options))(*several)
    if ability == "forward_mode":
        forward_ad = torch.autograd.forward_ad
        with forward_ad.dual_level():
            return subject.call(
                forward_ad.make_dual(built.query, torch.ones_like(built.query)), *tensors[1:], **options
            )
    return subject.call(*tensors, **options)


@check("refused-dtypes", cheap=True)
def refused_dtypes(subject: Subject) -> str:
    """Dtypes that are not declared are refused, with those that are."""
    declared = {name for item in subject.alternatives for name in item.dtypes or ()}
    others = [name for name in ("float16", "bfloat16", "float32", "float64") if name not in declared]
    for name in others:
        case = subject.case(subject.plain_fragment, dtype=name)
        expect_refusal(subject, partial(_ask, subject, case, ""), [f"dtype: found {name}"], f"dtype {name}")
    return f"{', '.join(others)} refused" if others else "every dtype is declared"


@check("refused-head-dims", when=lambda spec: any(item.head_dims is not None for item in spec.alternatives), cheap=True)
def refused_head_dims(subject: Subject) -> str:
    """Head dims that are not declared are refused, with those that are."""
    tried = []
    for dim in (1, 7, 33, 65, 129, 257, 520):
        case = subject.case(subject.plain_fragment, dim=dim, value_dim=None)
        if any(_admits_dim(item, dim) for item in subject.alternatives):
            continue
        expect_refusal(subject, partial(_ask, subject, case, ""), [f"head_dim: found {dim}"], f"head dim {dim}")
        tried.append(str(dim))
    return f"{', '.join(tried)} refused" if tried else "every head dim is declared"


def _admits_dim(alternative: Constraints, dim: int) -> bool:
    return not alternative.head_dim_reasons(Facts(head_dim=dim, value_head_dim=dim))


@check("refused-compile", when=lambda spec: isinstance(spec.compile, No), cheap=True)
def refused_compile(subject: Subject) -> str:
    """A backend that does not trace is refused in compiled code, and the kernel does not run there."""
    reason = str(subject.spec.compile)
    case = replace(subject.plain, gradients=())
    torch.compiler.reset()
    compiled = torch.compile(subject.call, fullgraph=True, backend="eager")
    built = case.build()
    with watched(subject) as spy:
        outcome = attempt(lambda: compiled(built.query, built.key, built.value, **built.options))
    torch.compiler.reset()
    if not isinstance(outcome, Raised) or spy.calls:
        msg = f"runs in compiled code, although compile is declared as No: {reason}"
        raise CheckFailed(msg)
    if reason not in str(outcome.error):
        msg = f"refused in compiled code, but not with the declared reason ({reason}): {outcome}"
        raise CheckFailed(msg)
    return f"refused: {reason}"


@check("senseless", cheap=True)
def senseless(subject: Subject) -> str:
    """Calls that make no sense (shapes, dtypes, options) are refused before the kernel runs."""
    for name in SPOIL:
        case = replace(subject.plain, spoiled=name)
        with watched(subject) as spy:
            outcome = attempt(partial(_ask, subject, case, ""))
        if not isinstance(outcome, Raised) or not isinstance(outcome.error, AttnError) or spy.calls:
            shown = outcome if isinstance(outcome, Raised) else "admitted"
            msg = f"{name}: {shown}; expected a refusal before the kernel runs"
            raise CheckFailed(msg)
    return f"{len(SPOIL)} calls refused"
