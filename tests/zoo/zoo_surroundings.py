"""Kernels that lie about what is around a call: memory, the process, other calls, compilers. As in ``zoo_kernels``."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import warnings
from functools import partial
from threading import local

import numpy as np
import torch
import torch._dynamo.config
from zoo_kernels import honest, honest_backward, lie, own, with_lse, with_out

from attn_core.plugin import Approximate

# --- whose memory gradients are -------------------------------------------------------------------------------------------

_buffers = {}


@lie("aliasing")
def gradients_in_one_buffer_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    kept = (_buffers.setdefault((n, grad.shape, grad.dtype), torch.empty_like(grad)) for n, grad in enumerate(grads))
    return tuple(buffer.copy_(grad) for buffer, grad in zip(kept, grads, strict=True))


@lie("gradients")
def gradient_of_the_query_in_place_of_the_result_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    return (out.copy_(grads[0]), *grads[1:]) if out.shape == query.shape else grads


@lie("gradients")
def lse_turned_to_base_2_by_the_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    lse.mul_(1.4427)
    return grads


@lie("gradients")
def gradient_of_the_result_scaled_in_place_backward(grad_out, query, key, value, out, lse, *, scale, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, scale=scale, **options)
    if grad_out.is_contiguous():
        grad_out.mul_(scale)
    return grads


@lie("aliasing")
def gradient_of_the_value_in_the_gradient_of_the_result_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    if query.shape[1] == key.shape[1] == 1 and value.shape == grad_out.shape:  # one query and one key: they are equal
        return (*grads[:2], grad_out)
    return grads


# --- what is left behind in the process -----------------------------------------------------------------------------------


def leaving(check, name, change, **changes):
    """A kernel that changes something of the process on each call."""

    def kernel(query, key, value, **options):
        change()
        return honest(query, key, value, **options)

    kernel.__name__ = name
    return lie(check, **changes)(kernel)


def switched(owner, name, value):
    return lambda: setattr(owner, name, value)


for name, change in {
    "random_numbers_seeded": lambda: torch.manual_seed(0),
    "random_numbers_seeded_and_drawn": lambda: (torch.manual_seed(0), torch.rand(3)),
    "random_numbers_of_python_drawn": random.random,
    "random_numbers_of_python_seeded": lambda: random.seed(0),
    "random_numbers_of_numpy_drawn": np.random.normal,
    "random_numbers_of_numpy_seeded": lambda: np.random.seed(0),  # noqa: NPY002
    "precision_set_to_the_usual_one": lambda: torch.set_float32_matmul_precision("highest"),
    "default_dtype_set_to_the_usual_one": lambda: torch.set_default_dtype(torch.float32),
    "default_device_set_to_the_usual_one": lambda: torch.set_default_device("cpu"),
    "three_threads_set": lambda: torch.set_num_threads(3),
    "algorithms_set_to_be_deterministic": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "algorithms_set_not_to_be_deterministic": lambda: torch.use_deterministic_algorithms(False),
    "denormal_numbers_flushed": lambda: torch.set_flush_denormal(True),
    "denormal_numbers_kept": lambda: torch.set_flush_denormal(False),
    "grad_mode_switched_on": lambda: torch._C._set_grad_enabled(True),
    "flash_switched_off": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "math_switched_on": lambda: torch.backends.cuda.enable_math_sdp(True),
    "cudnn_told_to_time_its_kernels": switched(torch.backends.cudnn, "benchmark", True),
    "cudnn_told_not_to_time_its_kernels": switched(torch.backends.cudnn, "benchmark", False),
    "cudnn_allowed_tf32": switched(torch.backends.cudnn, "allow_tf32", True),
    "dtype_of_autocast_set": lambda: torch.set_autocast_dtype("cpu", torch.float16),
    "autocast_left_on": lambda: torch.set_autocast_enabled("cpu", True),
    "warnings_silenced": lambda: warnings.simplefilter("ignore", UserWarning),
    "interrupts_ignored": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "garbage_collected_no_more": gc.disable,
    "errors_of_dynamo_suppressed": switched(torch._dynamo.config, "suppress_errors", True),
    "root_logger_silenced": lambda: logging.getLogger().setLevel(logging.ERROR),
}.items():
    leaving("global-state", name, change)

leaving("global-state-at-first", "environment_written_to", lambda: os.environ.setdefault("ZOO_ATTENTION", "1"))
leaving("global-state-at-first", "threads_set_at_the_first_call", lambda: _once(torch.set_num_threads, 3))
leaving("global-state-at-first", "random_numbers_drawn_at_the_first_call", lambda: _once(torch.rand, 1))

_done = []


def _once(function, *arguments):
    if not _done:
        _done.append(function(*arguments))


@lie("global-state-at-first", forward="zoo_at_import:honest")
def precision_switched_when_loaded(query, key, value, **options):
    return honest(query, key, value, **options)


@lie("global-state")
def random_numbers_seeded_backward(grad_out, query, key, value, out, lse, **options):
    torch.manual_seed(0)
    return honest_backward(grad_out, query, key, value, out, lse, **options)


@lie("global-state")
def threads_set_backward(grad_out, query, key, value, out, lse, **options):
    torch.set_num_threads(3)
    return honest_backward(grad_out, query, key, value, out, lse, **options)


# --- what compilers are told ----------------------------------------------------------------------------------------------


def _planned(name, function, planned):
    operator = torch.library.custom_op(f"attn_zoo::{name}", function, mutates_args=())
    operator.register_fake(planned)
    return operator


def _heads_first(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    return honest(query, key, value, scale=scale).transpose(1, 2).contiguous().transpose(1, 2)


def _as_the_query(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    out = honest(query, key, value, scale=scale)
    return torch.empty_like(query).copy_(out) if out.shape == query.shape else out


def _contiguous(query, key, value, scale):
    return query.new_empty(*query.shape[:3], value.shape[3])


heads_first = _planned("heads_first", _heads_first, _contiguous)
as_the_query = _planned("as_the_query", _as_the_query, _contiguous)


@lie("compile")
def fake_of_other_strides(query, key, value, *, scale, **options):
    return heads_first(query, key, value, scale) if not options else honest(query, key, value, scale=scale, **options)


@lie("compile")
def fake_of_the_strides_of_a_contiguous_query(query, key, value, *, scale, **options):
    return as_the_query(query, key, value, scale) if not options else honest(query, key, value, scale=scale, **options)


def _grads(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return honest_backward(grad_out, query, key, value, out, lse, scale=scale)


def _like_the_inputs(grad_out, query, key, value, out, lse, scale):
    return tuple(torch.empty_like(tensor.transpose(1, 2)).transpose(1, 2) for tensor in (query, key, value))


grads = _planned("grads", _grads, _like_the_inputs)


@lie("compile")
def fake_gradients_of_other_strides_backward(grad_out, query, key, value, out, lse, *, scale, **options):
    if options:
        return honest_backward(grad_out, query, key, value, out, lse, scale=scale, **options)
    return grads(grad_out, query, key, value, out, lse, scale)


# --- the error that is declared -------------------------------------------------------------------------------------------


@lie("lengths", numerics=Approximate(0.06))
def one_row_lost_beside_hundreds(query, key, value, **options):
    def lost(out):
        if out.shape[1] >= 100 and out.shape[0] * out.shape[2] >= 4:
            out[0, -1, 0] = 0
        return out

    return with_out(partial(honest, query, key, value, **options), lost)


@lie("lse", numerics=Approximate(0.05))
def lse_of_one_row_off(query, key, value, **options):
    def off(lse):
        return lse + 0.25 * (torch.arange(lse.numel(), device=lse.device).view(lse.shape) == 0) * (lse.numel() > 30)

    return with_lse(partial(honest, query, key, value, **options), off)


@lie("batch", numerics=Approximate(0.3))
def last_head_lost_among_many(query, key, value, **options):
    def lost(out):
        if out.shape[0] * out.shape[2] >= 12:
            out[-1, :, -1] = 0
        return out

    return with_out(partial(honest, query, key, value, **options), lost)


# --- gradients beside others ----------------------------------------------------------------------------------------------


@lie("neighbours")
def gradients_of_a_batch_touched_by_its_others_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    return (grads[0], grads[1] + 0 * grads[1].sum(0, keepdim=True), grads[2])


@lie("same-tensor")
def gradients_kept_by_the_address_of_their_input_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    kept = dict(zip((query.data_ptr(), key.data_ptr(), value.data_ptr()), grads, strict=True))
    return tuple(kept[tensor.data_ptr()] for tensor in (query, key, value))


# --- circumstances --------------------------------------------------------------------------------------------------------


@lie("other-defaults")
def scale_in_a_tensor_of_the_default_dtype(query, key, value, *, scale, **options):
    return honest(query, key, value, scale=float(torch.tensor(scale, device="cpu")), **options)


@lie("other-defaults")
def mask_made_on_the_default_device(query, key, value, *, attn_mask=None, **options):
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask & torch.ones(key.shape[1], dtype=torch.bool)
    return honest(query, key, value, attn_mask=attn_mask, **options)


@lie("uninitialised")
def sum_that_starts_with_what_was_in_memory(query, key, value, **options):
    def summed(out):
        return torch.empty_like(out).mul_(0).add_(out)

    return with_out(partial(honest, query, key, value, **options), summed)


@lie("uninitialised")
def gradient_that_starts_with_what_was_in_memory_backward(grad_out, query, key, value, out, lse, **options):
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    return (grads[0], torch.empty_like(grads[1]).mul_(0).add_(grads[1]), grads[2])


_running = []


@lie("interrupted")
def wrong_after_an_error(query, key, value, **options):
    _running.append(1)
    found = honest(query, key, value if len(_running) == 1 else 2 * value, **options)
    _running.pop()
    return found


@lie("interrupted")
def precision_not_restored_after_an_error(query, key, value, **options):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    found = honest(query, key, value, **options)
    torch.set_float32_matmul_precision(before)
    return found


@lie("interrupted")
def threads_not_restored_after_an_error_backward(grad_out, query, key, value, out, lse, **options):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    grads = honest_backward(grad_out, query, key, value, out, lse, **options)
    torch.set_num_threads(before)
    return grads


_calls = {}


@lie("many-calls")
def workspace_used_up_at_the_200th_call(query, key, value, **options):
    kind = (query.shape, query.dtype, tuple(options))
    _calls[kind] = _calls.get(kind, 0) + 1
    return honest(query, key, value if _calls[kind] < 200 else 2 * value, **options)


_last = {}


def _remembering_forward(query, key, value, **options):
    _last["key"] = key.detach()
    return honest(query, key, value, **options)


@lie("backward-order", forward="zoo_surroundings:_remembering_forward")
def key_of_the_last_call_backward(grad_out, query, key, value, out, lse, **options):
    last = _last["key"] if _last["key"].shape == key.shape and _last["key"].dtype == key.dtype else key
    return honest_backward(grad_out, query, last, value, out, lse, **options)


_of_thread = local()


def _of_thread_forward(query, key, value, **options):
    _of_thread.scale = options["scale"]
    return honest(query, key, value, **options)


@lie("backward-order", forward="zoo_surroundings:_of_thread_forward")
def scale_of_the_thread_backward(grad_out, query, key, value, out, lse, *, scale, **options):
    return honest_backward(grad_out, query, key, value, out, lse, scale=getattr(_of_thread, "scale", 1.0), **options)


class Once(torch.autograd.Function):
    """Attention whose graph forgets, or holds its inputs where torch does not see them."""

    @staticmethod
    def forward(ctx, query, key, value, adds, options):
        out, lse = honest(query, key, value, **{**options, "return_lse": True})
        ctx.held, ctx.options, ctx.adds, ctx.times = (query, key, value, out, lse), options, adds, 0
        if adds:  # so that nothing but the adding is wrong
            ctx.held = tuple(tensor.clone() for tensor in ctx.held)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        ctx.times += 1
        grads = honest_backward(grad_out, *ctx.held, **{k: v for k, v in ctx.options.items() if k != "return_lse"})
        return (*((ctx.times * grad for grad in grads) if ctx.adds else grads), None, None)


def _once_alone(query, key, value, adds, options):
    out, lse = Once.apply(query, key, value, adds, options)
    return (out, lse) if options.get("return_lse") else out


@own("backward-order")
def gradients_added_to_by_a_second_pass(query, key, value, **options):
    return _once_alone(query, key, value, True, options)


@own("changed-before-backward")
def inputs_held_where_torch_does_not_see_them(query, key, value, **options):
    return _once_alone(query, key, value, False, options)
