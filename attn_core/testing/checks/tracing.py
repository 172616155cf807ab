"""What torch traces, exports, maps and differentiates means the same as what it runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attn_core.guard import Raised, attempt
from attn_core.testing.building import Built
from attn_core.testing.checking import check, declared
from attn_core.testing.comparing import expect
from attn_core.testing.kinds import wished
from attn_core.testing.outcomes import CheckFailed
from attn_core.testing.plans import held_to_plan
from attn_core.testing.reference import reference
from attn_core.testing.trying import made, reference_of, results_and_gradients, within

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from attn_core.declaration import BackendSpec
    from attn_core.testing.drawing import Case
    from attn_core.testing.subject import Subject

ALL = ("query", "key", "value")


def _compiles(spec: BackendSpec) -> bool:
    return bool(spec.compile)


def _traced_cases(subject: Subject, count: int, *varied: str, each: Sequence[Any] = ({},)) -> list[Case]:
    """Calls that the declaration admits inside compiled code."""

    def admitted(case: Case) -> bool:
        return not subject.spec.reasons(replace(subject.facts(case), compiled=True))

    return subject.draw(count, *varied, each=each, where=admitted)


@check("compile", when=_compiles)
def compiled(subject: Subject) -> str:
    """Traced with ``torch.compile(fullgraph=True)``, results stay what they are, and each operator returns what was planned."""
    shape = {"queries": 33, "keys": None}
    each: list[dict[str, Any]] = [{**shape, "causal": True, "gradients": ALL}, {**shape, "return_lse": True}, shape]
    each += [{**shape, "mask": kind, "gradients": ALL} for kind in ("key_padding", "bool", "float")]
    each += [
        {**shape, **item, "gradients": ALL} for item in ({"window_size": (3, 0)}, {"softcap": 5.0}, {"mask": "packed"})
    ]
    each += [{"queries": 5, "keys": 17}, {"queries": 5, "keys": 17, "causal": True, "gradients": ALL}]
    each += [{**shape, "layouts": ("transposed",) * 3, "gradients": names} for names in ((), ALL)]
    if subject.quick:  # without a backward, whose compiler alone takes longer to import than all else here
        each = [{**shape, "return_lse": True}, shape, {}]
    nearest = (subject.admitted(wished(fields))[:1] for fields in each)  # without gradients where there are none
    each = ([item for found in nearest for item in found] or [{}])[: 1 if subject.quick else None]
    cases = _traced_cases(subject, len(each), "scale", "dtype", "heads", each=each)[: 1 if subject.quick else None]
    for case in cases:
        torch.compiler.reset()
        subject.hold([case], torch.compile(subject.call, fullgraph=True, dynamic=False, backend=held_to_plan))
    torch.compiler.reset()
    return f"{len(cases)} calls"


@check("compile-dynamic", when=_compiles)
def compiled_for_any_length(subject: Subject) -> str:
    """Traced once for all lengths, it is right at each."""
    subject.leave_out_if_quick()
    each = [{"queries": length, "keys": None} for length in (33, 70, 130)]
    cases = _traced_cases(subject, 3, each=[{**item, "gradients": names} for names in ((), ALL) for item in each])
    cases += _traced_cases(subject, 3, each=[{**item, "causal": True} for item in each])
    torch.compiler.reset()
    return subject.hold(cases, torch.compile(subject.call, fullgraph=True, dynamic=True, backend=held_to_plan))


class _Model(torch.nn.Module):
    def __init__(self, call: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.call, self.options = call, options

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return self.call(query, key, value, **self.options)


@check("export", when=_compiles)
def exported(subject: Subject) -> str:
    """A program made by ``torch.export`` is right, for its own lengths and, where it takes others, for those."""
    subject.leave_out_if_quick()
    cases = _traced_cases(subject, 2, "causal", each=[{"queries": 32, "keys": None, "mask": "none"}])
    cases = [case for case in cases if case.mask == "none"]
    for case in cases:
        built = made(case)
        model = _Model(subject.call, built.options)
        given = (built.query, built.key, built.value)
        lengths = {name: {1: torch.export.Dim.AUTO} for name in ALL}
        for shapes in () if subject.refuses_when_run(case) else (None, lengths):
            program = torch.export.export(model, given, dynamic_shapes=shapes).module()
            for queries in (32, 45) if shapes else (32,):
                other = made(case, queries=queries)
                found = attempt(partial(program, other.query, other.key, other.value))
                if isinstance(found, Raised) and queries == case.queries:
                    msg = f"the exported program raises {found}, in {case!r}"
                    raise CheckFailed(msg) from found.error
                if isinstance(found, Raised):
                    continue  # made for one length, and it says so
                out = found.value[0] if isinstance(found.value, tuple) else found.value
                expected, allowed = reference_of(other, replace(case, queries=queries))
                within(out, expected["out"], allowed["out"], subject, "result of the exported program", case)
    return f"{len(cases)} programs" if cases else "it admits no plain call without a mask"


@check("fake-tensors", when=_compiles)
def fake_tensors(subject: Subject) -> str:
    """With fake tensors, shapes, dtypes and devices are those of the real results and gradients."""
    each: list[dict[str, Any]] = [{"mask": "none", "queries": 5, "keys": 17}, {"mask": "none", "heads": (4, 2)}]
    each += [{"mask": "none", "causal": causal, "return_lse": True} for causal in (True, False)]
    each += [{"mask": kind, "queries": 3, "keys": keys} for kind in ("bool", "float") for keys in (None, 7)]
    each = subject.admitted(each)
    if not each:
        return "it admits no plain call but with a described mask, which is read and can't be fake"
    cases = _traced_cases(subject, len(each), each=each)
    cases += _traced_cases(subject, 2 * len(each), "causal", "dims", "dtype", "return_lse", each=each)
    cases += _traced_cases(subject, 4, "heads", "lengths", "layouts", each=[{"mask": "none", "gradients": ALL}])
    cases = [case for case in cases if case.mask in ("none", "bool", "float")]
    for case in cases:
        real = results_and_gradients(subject, case, case.build())
        if not real:
            continue
        with FakeTensorMode() as mode:
            fake = results_and_gradients(subject, case, _faked(case.build(), mode))
        expect(
            f"fake are the {', '.join(fake)}, real the {', '.join(real)}, in {case!r}", holds=fake.keys() == real.keys()
        )
        for name, tensor in real.items():
            kinds = [(tuple(item.shape), item.dtype, item.device) for item in (fake[name], tensor)]
            expect(f"the fake {name} is {kinds[0]}, the real one {kinds[1]}, in {case!r}", holds=kinds[0] == kinds[1])
    return f"{len(cases)} calls"


def _faked(built: Built, mode: FakeTensorMode) -> Built:
    fakes = {name: mode.from_tensor(tensor) for name, tensor in built.inputs().items()}
    options = {name: fakes.pop(name, item) for name, item in built.options.items()}
    return Built(**fakes, options=options, grad_out=mode.from_tensor(built.grad_out))


@check("vmap", when=declared("vmap"))
def vmap(subject: Subject) -> str:
    """Under ``torch.func.vmap`` each sample gets its own result."""
    cases = subject.draw(3, "causal", "heads", each=[{"mask": "none"}], where=lambda case: case.mask == "none")
    for case in cases:
        several = [made(case, seed=case.seed + n) for n in range(3)]
        stacked = [torch.stack([getattr(built, name) for built in several]) for name in ALL]
        options = several[0].options
        found = torch.func.vmap(lambda *tensors, options=options: subject.call(*tensors, **options))(*stacked)
        out = found[0] if isinstance(found, tuple) else found
        for built, result in zip(several, out, strict=True):
            expected, allowed = reference_of(built, case)
            within(result, expected["out"], allowed["out"], subject, "result under vmap", case)
        for mapped in (("query",), ("key", "value")):  # the others are one for all samples
            _map_some(subject, case, several, mapped)
    return f"{9 * len(cases)} samples"


def _map_some(subject: Subject, case: Case, several: Sequence[Built], mapped: Collection[str]) -> None:
    options = several[0].options
    samples = [replace(several[0], **{name: getattr(built, name) for name in mapped}) for built in several]
    given = [
        torch.stack([getattr(built, name) for built in samples]) if name in mapped else getattr(samples[0], name)
        for name in ALL
    ]
    dims = tuple(0 if name in mapped else None for name in ALL)
    found = torch.func.vmap(lambda *tensors: subject.call(*tensors, **options), in_dims=dims)(*given)
    for built, result in zip(samples, found[0] if isinstance(found, tuple) else found, strict=True):
        expected, allowed = reference_of(built, case)
        within(result, expected["out"], allowed["out"], subject, f"result under vmap of {' and '.join(mapped)}", case)


@check("forward-mode", when=declared("forward_mode"))
def forward_mode(subject: Subject) -> str:
    """Forward-mode derivatives are those of the reference."""
    cases = subject.draw(3, "causal", "heads", each=[{"mask": "none"}], where=lambda case: case.mask == "none")
    for case in cases:
        built, other = made(case), made(case, seed=case.seed + 1)
        options = {name: item for name, item in built.options.items() if name != "return_lse"}
        found = _tangent(lambda *tensors, options=options: subject.call(*tensors, **options), built, other)
        exact = _tangent(lambda *tensors, options=options: reference(*tensors, **options)[0], built, other, double=True)
        _near(found, exact, f"forward-mode derivative, in {case!r}")
    return f"{len(cases)} calls"


def _tangent(call: Callable[..., Any], built: Any, other: Any, *, double: bool = False) -> torch.Tensor:
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        pairs = [(getattr(built, name), getattr(other, name)) for name in ALL]
        duals = [forward_ad.make_dual(*((a.double(), b.double()) if double else (a, b))) for a, b in pairs]
        tangent: torch.Tensor | None = forward_ad.unpack_dual(call(*duals)).tangent
    if tangent is None:
        msg = "forward mode gives no derivative"
        raise CheckFailed(msg)
    return tangent


@check("double-backward", when=lambda spec: any(item.double_backward for item in spec.alternatives))
def double_backward(subject: Subject) -> str:
    """The gradient of a gradient is that of the reference."""
    each = [{"mask": "none", "gradients": ALL}]
    cases = subject.draw(
        3, "causal", "heads", each=each, where=lambda case: case.mask == "none" and bool(case.gradients)
    )
    for case in cases:
        built = case.build()
        options = {name: item for name, item in built.options.items() if name not in ("return_lse", "deterministic")}
        leaves = [getattr(built, name) for name in ALL]
        doubles = [tensor.detach().double().requires_grad_() for tensor in leaves]
        found = _second(subject.call(*leaves, **options), leaves)
        exact = _second(reference(*doubles, **options)[0], doubles)
        for name, gradient, wanted in zip(ALL, found, exact, strict=True):
            _near(gradient, wanted, f"second gradient of {name}, in {case!r}")
    return f"{len(cases)} calls"


def _second(out: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    total = torch.stack([gradient.square().sum() for gradient in first]).sum()
    return torch.autograd.grad(total, leaves)


def _near(found: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """Close in norm: derivatives of higher order have no bound of their own here."""
    off = float((found.double() - exact).norm() / exact.norm().clamp(min=1e-12))
    allowed = 4096 * torch.finfo(found.dtype).eps
    expect(f"{what}: off by {off:.2g} (relative), allowed {allowed:.2g}", holds=off <= allowed)
