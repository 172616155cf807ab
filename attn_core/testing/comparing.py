"""Holds one drawn call to the reference: right within tolerance, or refused."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attn_core.declaration import Approximate, Exact
from attn_core.errors import AttnError
from attn_core.running import KernelError
from attn_core.testing.nearness import assert_near, error_at
from attn_core.testing.reference import reference
from attn_core.testing.tolerances import assert_close, bounds, rounding

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from attn_core.testing.building import Built
    from attn_core.testing.drawing import Case

_EXACT = Exact()


def compare(case: Case, call: Callable[..., Any], *, numerics: Exact | Approximate = _EXACT) -> AttnError | None:
    """Make the call and compare everything that comes back with the reference.

    Args:
        case: the call.
        call: takes what ``attention`` takes, such as ``partial(attention, backend="native")``.
        numerics: what the backend declares; one that is approximate is held to its error on top of rounding.

    Returns:
        None where the call is right, the refusal where it was refused.

    Raises:
        AssertionError: result, lse or a gradient is off, an input or the gradient of the result was changed, the backward
            changed a result, two tensors share memory, ...; what else the call raises passes through.
    """
    with torch.inference_mode() if case.mode == "inference" else nullcontext():
        return _compare(case, call, numerics)


def _compare(case: Case, call: Callable[..., Any], numerics: Exact | Approximate) -> AttnError | None:
    built = case.build()
    before = {name: _bits(tensor) for name, tensor in built.inputs().items()}
    try:
        result = called(case, built, call)
    except KernelError as lie:
        raise AssertionError(str(lie)) from lie
    except AttnError as refusal:
        expect("a refusal says why", holds=bool(str(refusal).strip()))
        return refusal
    expect(f"{case.spoiled}: admitted", holds=case.spoiled is None)
    out, lse = result if case.return_lse else (result, None)
    _check_results(case, built, out, lse)
    grad_out = built.grad_out.to(out.dtype)
    found = _checked_gradients(case, built, out, lse, grad_out)
    results = {"result": out, **({} if lse is None else {"lse": lse})}
    results |= {f"gradient of {name}": tensor for name, tensor in found.items()}
    _check_numbers(case, built, results, numerics)
    if case.deterministic:
        _check_same_bits(case, built, call, out, found)
    for name, tensor in built.inputs().items():
        expect(f"{name} was changed by the call", holds=_same(before[name], _bits(tensor)))
    check_own_memory(results, {**built.inputs(), "gradient of the result": grad_out})
    return None


def expect(message: str, *, holds: bool) -> None:
    """An assert that ``python -O`` keeps."""
    if not holds:
        raise AssertionError(message)


def called(case: Case, built: Built, call: Callable[..., Any]) -> Any:
    """Make the call with the autocast and the mode of the case (but for inference mode)."""
    device = torch.device(case.device).type
    autocast = nullcontext() if case.autocast is None else torch.autocast(device, getattr(torch, case.autocast))
    with autocast, torch.set_grad_enabled(case.mode == "grad"):
        return call(built.query, built.key, built.value, **built.options)


def _bits(tensor: Any) -> Any:
    """The numbers of a tensor, and how often it was written to."""
    if not isinstance(tensor, torch.Tensor):
        return None
    writes = 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 (no public name)
    return writes, tensor.detach().clone()


def _same(before: Any, after: Any) -> bool:
    return before is None or (before[0] == after[0] and same_bits(before[1], after[1]))


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two real tensors are of one shape and dtype and have the same bits: NaN is then equal to itself.

    >>> import torch
    >>> same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan])), same_bits(torch.zeros(1), torch.ones(1))
    (True, False)
    """
    if one.dtype != other.dtype:
        return False
    whole = _WHOLE[one.element_size()]  # of the same size: such a view is had of any strides
    return torch.equal(one.detach().view(whole), other.detach().view(whole))


def effective(case: Case) -> torch.dtype:
    """The dtype that the kernel is given."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    return dtype if case.autocast is None or dtype == torch.float64 else getattr(torch, case.autocast)


def _check_results(case: Case, built: Built, out: Any, lse: Any) -> None:
    dtype = effective(case)
    batch, queries, heads, _ = built.query.shape
    expect(f"the result is {type(out).__name__}", holds=isinstance(out, torch.Tensor))
    expect(f"shape of the result: {tuple(out.shape)}", holds=out.shape == (batch, queries, heads, built.value.shape[3]))
    expect(f"dtype of the result: {out.dtype}", holds=out.dtype == dtype)
    expect(f"device of the result: {out.device}", holds=out.device == built.query.device)
    graph = case.mode == "grad" and any(tensor.requires_grad for tensor in built.inputs().values())
    expect(f"the result requires_grad={out.requires_grad}", holds=out.requires_grad == graph)
    if lse is not None:
        expect(f"shape of lse: {tuple(lse.shape)}", holds=lse.shape == (batch, heads, queries))
        expect(
            f"dtype of lse: {lse.dtype}",
            holds=lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32),
        )
        expect("lse is not detached", holds=not lse.requires_grad)
    _check_storage(built, out, lse)


def _check_storage(built: Built, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Nothing returned shares memory with an input, nor with another result, nor within itself."""
    taken = {_address(tensor): name for name, tensor in built.inputs().items() if tensor.numel()}
    for name, tensor in {"result": out, "lse": lse}.items():
        if tensor is None or not tensor.numel():
            continue
        expect(f"{name} shares memory with {taken.get(_address(tensor))}", holds=_address(tensor) not in taken)
        taken[_address(tensor)] = name
        overlaps = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        expect(f"{name} is expanded", holds=not overlaps)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _wanted(built: Built) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in built.inputs().items() if tensor.requires_grad}


def check_own_memory(results: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Raise an AssertionError where a result or gradient is made of bytes of another, or of something that was given.

    Parts of one storage that do not overlap are allowed: a backward may make its gradients in one piece.

    Example:
        >>> import torch
        >>> pair = torch.zeros(2, 4)
        >>> check_own_memory({"gradient of key": pair[0], "gradient of value": pair[1]}, {"key": torch.zeros(4)})
    """
    every = [*given.items(), *results.items()]
    for place, (name, tensor) in enumerate(every[len(given) :], len(given)):
        for other, item in every[:place]:
            expect(f"the {name} shares memory with the {other}", holds=not _overlap(tensor, item))


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not (one.numel() and other.numel()) or _address(one) != _address(other):
        return False
    return bool(torch.isin(_bytes(one), _bytes(other)).any())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Where in its storage each byte of a tensor is."""
    size = tensor.element_size()
    first: int = int(tensor.storage_offset()) * size
    found: torch.Tensor = torch.arange(first, first + size)
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride and length > 1:
            found = (found[:, None] + torch.arange(length) * stride * size).flatten()
    return found


def _checked_gradients(
    case: Case, built: Built, out: torch.Tensor, lse: torch.Tensor | None, grad_out: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The gradients, of a backward that changes neither what it is given nor what the call returned."""
    held = {"the result": out, "lse": lse, "the gradient of the result": grad_out}
    before = {name: _bits(tensor) for name, tensor in held.items()}
    found = _gradients(case, built, out, grad_out)
    for name, tensor in held.items():
        expect(f"{name} was changed by the backward", holds=_same(before[name], _bits(tensor)))
    return found


def _gradients(case: Case, built: Built, out: torch.Tensor, grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    wanted = _wanted(built)
    if not wanted or case.mode != "grad":
        return {}
    found = torch.autograd.grad(out, list(wanted.values()), grad_out)
    return dict(zip(wanted, found, strict=True))


def _check_numbers(case: Case, built: Built, results: dict[str, torch.Tensor], numerics: Exact | Approximate) -> None:
    for name, tensor in built.inputs().items():
        gradient = results.get(f"gradient of {name}", tensor)
        expect(f"dtype of the gradient of {name}: {gradient.dtype}", holds=gradient.dtype == tensor.dtype)
    close = partial(assert_close, dtype=effective(case))
    if isinstance(numerics, Approximate):
        query, key = _given(built.query, case), _given(built.key, case)
        close = partial(assert_near, error=error_at(numerics, query, key, built.options.get("scale")))
    for name, (expected, bound) in expectations(case, built, results).items():
        close(results[name], expected, what=name, bound=bound)


def expectations(case: Case, built: Built, names: Collection[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the reference has, and how far from it an honest kernel may be: of "result", "lse", "gradient of key", ...

    Args:
        case: the call.
        built: its tensors and options.
        names: of what is wanted.
    """
    wanted = [name for name in built.inputs() if f"gradient of {name}" in names]
    inputs = {name: _given(tensor, case).requires_grad_(name in wanted) for name, tensor in built.inputs().items()}
    options = {name: option for name, option in built.options.items() if name not in ("deterministic", "return_lse")}
    if isinstance(options.get("attn_mask"), torch.Tensor):
        options["attn_mask"] = inputs["attn_mask"]
    tensors = inputs["query"], inputs["key"], inputs["value"]
    out, lse = reference(*tensors, **options)
    dtype = effective(case)
    grad_out = built.grad_out.to(dtype) if wanted else None
    allowed = bounds(*tensors, grad_out=grad_out, dtype=dtype, **options)
    found = {"result": (out.detach(), allowed.out), "lse": (lse, allowed.lse)}
    if grad_out is not None:
        gradients = torch.autograd.grad(out, [inputs[name] for name in wanted], grad_out.double())
        for name, gradient in zip(wanted, gradients, strict=True):
            bound = getattr(allowed, name) + rounding(gradient, built.inputs()[name].dtype)
            found[f"gradient of {name}"] = (gradient, bound)
    return {name: item for name, item in found.items() if name in names}


def _given(tensor: torch.Tensor, case: Case) -> torch.Tensor:
    """What the kernel is given of an input, after autocast, as exact float64 (bool masks as they are)."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor.clone()
    if case.autocast is not None and tensor.dtype != torch.float64:
        tensor = tensor.to(getattr(torch, case.autocast))
    return tensor.double().clone()


def _check_same_bits(
    case: Case, built: Built, call: Callable[..., Any], out: torch.Tensor, found: dict[str, torch.Tensor]
) -> None:
    again = called(case, built, call)
    again = again[0] if case.return_lse else again
    expect("not the same result twice", holds=same_bits(out, again))
    for name, gradient in _gradients(case, built, again, built.grad_out.to(again.dtype)).items():
        expect(f"not the same gradient of {name} twice", holds=same_bits(found[name], gradient))
    if out.numel():
        expect("two results share memory", holds=_address(out) != _address(again))
