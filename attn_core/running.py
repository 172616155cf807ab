"""Builds what runs a kind of call: the adapter, with what the core adds around it and nothing else."""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from attn_core.errors import AttnError, CallRefused
from attn_core.guard import one_line
from attn_core.masks import Description, traced
from attn_core.offset import without_offset
from attn_core.reading import cast, without_autocast

if TYPE_CHECKING:
    from collections.abc import Callable

    from attn_core.declaration import No
    from attn_core.loading import Adapter
    from attn_core.reading import Call


class KernelError(AttnError):
    """A kernel returned something other than what its declaration promises, or raised."""


class KernelFailed(KernelError, RuntimeError):  # noqa: N818 - it reads as what happened
    """A kernel raised while it computed a call that its declaration admits; what it raised is the cause of this."""


class KernelOutOfMemory(KernelFailed, torch.OutOfMemoryError):
    """A kernel found no memory."""


KERNELS_RAISE = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What a kernel's own failure is. Others, as torch's signals to itself, pass as they are."""


def raise_failure(name: str, error: Exception, query: Any, key: Any, value: Any) -> NoReturn:
    """Raise what a backend raised, with the backend, the call and what to do.

    A refusal passes as it is, and so does anything in traced code, whose tracer may wait for its own errors.
    """
    if isinstance(error, AttnError) or traced(query, key, value):
        raise error
    shown = ", ".join(
        f"{label} {tuple(tensor.shape)}" for label, tensor in (("query", query), ("key", key), ("value", value))
    )
    call = f"{shown}, {str(query.dtype).removeprefix('torch.')} on {query.device}"
    if isinstance(error, torch.OutOfMemoryError):
        msg = (
            f"{name}: its kernel found no memory for {call}: {error}. Next: a smaller batch or shorter sequences, or a backend "
            "that needs less, such as a fused one where this one writes scores out"
        )
        raise KernelOutOfMemory(msg) from error
    msg = (
        f"{name}: its kernel raised {one_line(error)}; the call: {call}. Next: name another backend (attn explain shows which "
        "take the call), and report it to the authors of the wheel if it should"
    )
    raise KernelFailed(msg) from error


def runner(name: str, adapter: Adapter, call: Call, *, own_graph: bool, once: No | None = None) -> Callable[..., Any]:
    """Make the function of (query, key, value, **options) that computes calls of this kind.

    Args:
        name: the backend, for messages.
        adapter: its loaded functions.
        call: a call of the kind.
        own_graph: whether the adapter's result carries its graph; otherwise the core makes one from its backward.
        once: why an own graph has no gradient of the gradient, if it has none.
    """
    facts = call.facts
    run: Callable[..., Any] = adapter.forward
    if call.empty:
        run = empty_result
    elif facts.backward and not own_graph:
        run = partial(with_backward, adapter)
    elif facts.backward:
        run = partial(_checked_graph, name, run)
        if once is not None and not (call.facts.compiled or call.facts.vmap):
            run = partial(_once_differentiable, partial(_refuse_second, name, once), run, {})
    if facts.backward and facts.return_lse:
        run = partial(_detached_lse, run)
    if call.autocast is not None:
        run = partial(_cast_first, run, call.autocast)
    return run


def empty_result(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    """Answer a call without queries or without keys: zeros, an lse of -inf, and gradients of zero."""
    shape = (*query.shape[:3], value.shape[3])
    out = query.new_zeros(shape)
    for tensor in (query, key, value, options.get("attn_mask")):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            out = out + tensor.flatten()[:0].sum().to(out.dtype)  # nothing, but joined to the graph
    if not options.get("return_lse"):
        return out
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_full((shape[0], shape[2], shape[1]), float("-inf"), dtype=dtype)


def _cast_first(run: Callable[..., Any], dtype: torch.dtype, query: Any, key: Any, value: Any, **options: Any) -> Any:
    if "attn_mask" in options:
        options["attn_mask"] = cast(options["attn_mask"], dtype)
    with torch.autocast(query.device.type, enabled=False):
        return run(cast(query, dtype), cast(key, dtype), cast(value, dtype), **options)


def _checked_graph(name: str, run: Callable[..., Any], query: Any, key: Any, value: Any, **options: Any) -> Any:
    result = run(query, key, value, **options)
    out = result[0] if type(result) is tuple else result
    if not out.requires_grad:
        msg = (
            f"{name}: its result carries no graph although its declaration says that it has a backward; "
            "report it to the author of the wheel, and use another backend for training"
        )
        raise KernelError(msg)
    return result


_LENGTHS_REMEMBERED = 256


def _once_differentiable(
    refuse: Callable[[torch.Tensor], None], run: Callable[..., Any], seen: dict[Any, bool], *given: Any, **options: Any
) -> Any:
    """Refuse a gradient of the gradient where Python computes the first one: it may be differentiable, and wrong.

    torch's own kernels refuse it themselves, where it is used and not before, and pay next to nothing here: ``seen`` keeps
    whether there is Python in the graphs of calls of these lengths, by which an adapter may choose.
    """
    result = run(*given, **options)
    out = result[0] if type(result) is tuple else result
    query, key, *_ = given
    lengths = query.shape, key.shape
    if lengths not in seen:
        if len(seen) >= _LENGTHS_REMEMBERED:
            seen.clear()
        inputs = [tensor for tensor in (*given, options.get("attn_mask")) if isinstance(tensor, torch.Tensor)]
        seen[lengths] = _has_python(out.grad_fn, inputs)
    if seen.get(lengths, True):  # another thread may have cleared it
        out.register_hook(refuse)
    return result


def _has_python(node: Any, inputs: list[torch.Tensor]) -> bool:
    """Whether a node written in Python lies between a result and its inputs."""
    nodes, known = [node], {tensor.grad_fn for tensor in inputs}
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def _refuse_second(name: str, reason: No, _: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        msg = (
            f"{name} refused the backward: a gradient of the gradient (create_graph=True) is not supported: {reason}. "
            "Next: use a backend that declares double_backward, as native_math does"
        )
        raise CallRefused(msg)


def _detached_lse(run: Callable[..., Any], query: Any, key: Any, value: Any, **options: Any) -> Any:
    out, lse = run(query, key, value, **options)
    return out, lse.detach()


# --- the graph that the core makes from a backend's backward ------------------------------------------------------------


watching: ContextVar[Callable[[Adapter], Adapter] | None] = ContextVar("attn_core.watching", default=None)
"""Gives the adapter of a graph that is being made a backward of which somebody hears; none in compiled code."""


class _WithBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, adapter: Any, options: dict[str, Any]) -> Any:
        out, lse = adapter.forward(query, key, value, **{**options, "return_lse": True})
        mask = options.get("attn_mask")  # saved too, so that a change of it before the backward is found
        described = mask.tensors if isinstance(mask, Description) else () if mask is None else (mask,)
        if not torch.compiler.is_compiling():  # inference tensors don't count their changes, and can't be saved
            described = tuple(tensor for tensor in described if not tensor.is_inference())
        ctx.save_for_backward(query, key, value, out, lse, *described)
        watch = None if torch.compiler.is_compiling() else watching.get()
        ctx.adapter = adapter if watch is None else watch(adapter)
        ctx.options = {name: option for name, option in options.items() if name not in ("return_lse", "deterministic")}
        if options.get("deterministic"):
            ctx.options["deterministic"] = True
        ctx.mark_non_differentiable(lse)
        # Dynamo of torch 2.11 loses the gradient of a saved result that ends in a ``to`` of its own dtype
        if torch.compiler.is_compiling():
            out = out.view_as(out)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Any, _: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            msg = (
                "backward: a gradient of the gradient (create_graph=True) is not supported where the core makes the graph; "
                "use a backend whose own graph has it"
            )
            raise CallRefused(msg)
        query, key, value, out, lse, *_mask = ctx.saved_tensors
        with torch.no_grad(), without_autocast(query.device.type):
            if torch.compiler.is_compiling():
                grads = ctx.adapter.backward(grad_out, query, key, value, out, lse, **ctx.options)
            else:
                grads = _differentiated(ctx.adapter, grad_out, query, key, value, out, lse, ctx.options)
        return (*grads, None, None)


def _differentiated(adapter: Adapter, grad_out: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
    *others, options = rest
    backward: Any = adapter.backward
    try:
        return backward(grad_out, query, key, value, *others, **options)
    except KERNELS_RAISE as error:
        raise_failure(f"{adapter.name}, backward", error, query, key, value)


def with_backward(adapter: Adapter, query: Any, key: Any, value: Any, **options: Any) -> Any:
    """Run a forward whose graph the core makes from the backend's ``backward``, by way of the lse.

    A float mask is given without what a whole row of it has in common: its lse would have lost all else.
    """
    if key is query:  # Dynamo takes no tensor twice
        key = key.view_as(key)
    if value is query or value is key:
        value = value.view_as(value)
    causal, window_size = options.get("causal", False), options.get("window_size")
    near, offset = without_offset(
        options.get("attn_mask"),
        query.shape[1],
        key.shape[1],
        causal=causal,
        window_size=window_size,
        dtype=query.dtype,
    )
    if offset is not None:
        options["attn_mask"] = near
    apply: Any = _WithBackward.apply
    out, lse = apply(query, key, value, adapter, options)
    if not options.get("return_lse"):
        return out
    return out, lse if offset is None else lse + offset


# --- the first result of a kind -----------------------------------------------------------------------------------------


def check_result(name: str, result: Any, query: torch.Tensor, value: torch.Tensor, call: Call) -> None:
    """Hold the first result of a kind of call to shape, dtype and form; a kernel that lies is found here."""
    wanted_shape: tuple[int, ...] = (*query.shape[:3], value.shape[3])
    wanted_dtype = getattr(torch, call.facts.dtype)
    out, lse = result if call.facts.return_lse and type(result) is tuple and len(result) == 2 else (result, None)
    if not isinstance(out, torch.Tensor) or tuple(out.shape) != wanted_shape or out.dtype != wanted_dtype:
        _lied(name, "result", out, wanted_shape, wanted_dtype)
    if not call.facts.return_lse:
        return
    wanted_shape = (query.shape[0], query.shape[2], query.shape[1])
    wanted_dtype = torch.float64 if wanted_dtype == torch.float64 else torch.float32
    if not isinstance(lse, torch.Tensor) or tuple(lse.shape) != wanted_shape or lse.dtype != wanted_dtype:
        _lied(name, "lse", lse, wanted_shape, wanted_dtype)


def _lied(name: str, what: str, found: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    shown = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else type(found).__name__
    msg = (
        f"{name}: its kernel returned as {what} {shown}; promised: {shape} {dtype}. "
        "Report it to the author of the wheel, and use another backend"
    )
    raise KernelError(msg)
