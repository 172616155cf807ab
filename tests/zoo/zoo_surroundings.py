"""Kernels that lie about what is around a call: memory, the process, other calls, compilers. As in ``zoo_kernels``."""

from __future__ import annotations

import torch
from zoo_kernels import honest, honest_backward, lie

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
