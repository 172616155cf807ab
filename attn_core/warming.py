"""Kernels that compile at the first call of a kind: said before the wait, refused inside a CUDA graph, made ahead by a plan.

What is warm is remembered by kind and by part: a forward that has run says nothing of its backward.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_core.errors import CallRefused
from attn_core.masks import capturing

if TYPE_CHECKING:
    from collections.abc import Callable

    from attn_core.facts import Facts
    from attn_core.loading import Adapter

log = logging.getLogger("attn_core")

FORWARD, BACKWARD = "call", "backward"
KINDS_REMEMBERED = 4096
"""How many are remembered before the memory starts over."""


class Kind(NamedTuple):
    """What a kernel is compiled for, as far as it is known: the backend, the device and the facts of the call."""

    name: str
    device: torch.device
    facts: Facts


_warm: set[tuple[Kind, str]] = set()


def is_warm(kind: Kind, part: str) -> bool:
    """Whether this part of such a call has run before."""
    return (kind, part) in _warm


def before(kind: Kind, part: str, tensor: torch.Tensor) -> None:
    """Say that a cold part may take long, and refuse it where compiling would become part of a CUDA graph.

    Raises:
        CallRefused: a CUDA graph is being captured on the current stream.
    """
    if is_warm(kind, part):
        return
    _refuse_while_capturing(kind, part, tensor)
    log.info("%s compiles at the first %s of a kind, which can take from seconds to minutes", kind.name, part)


def _refuse_while_capturing(kind: Kind, part: str, tensor: torch.Tensor) -> None:
    if capturing(tensor):
        msg = (
            f"{kind.name} refused the {part}: it compiles at the first {part} of a kind, which can't be done while a CUDA "
            f"graph is captured. Make one {part} of this kind (dtype, head dims, mask, options, gradients), or a plan() of "
            "it, before the capture"
        )
        raise CallRefused(msg)


def note(kind: Kind, part: str) -> None:
    """Remember that this part has run."""
    if len(_warm) >= KINDS_REMEMBERED:
        _warm.clear()
    _warm.add((kind, part))


def forget() -> None:
    """Forget what is warm, as when backends are discovered again."""
    _warm.clear()


def watched(adapter: Adapter, kind: Kind) -> Adapter:
    """The adapter with a backward whose first call is treated as that of the forward is."""
    return adapter if adapter.backward is None else replace(adapter, backward=_Backward(adapter.backward, kind))


class _Backward:
    def __init__(self, run: Callable[..., Any], kind: Kind) -> None:
        self.run = run
        self.kind = kind
        self.warm = False

    def __call__(self, grad_out: torch.Tensor, *tensors: torch.Tensor, **options: Any) -> Any:
        if self.warm:
            return self.run(grad_out, *tensors, **options)
        before(self.kind, BACKWARD, grad_out)
        grads = self.run(grad_out, *tensors, **options)
        note(self.kind, BACKWARD)
        self.warm = True
        return grads


def warm_up(
    run: Callable[..., Any], kind: Kind, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object
) -> Any:
    """Make one call, with its backward where it has one, unless that is warm. Nothing is left of it but what was compiled.

    Args:
        run: a function of query, key and value.
        kind: of the call.
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        mask: that of the call, whose gradient may be wanted too.

    Returns:
        What the call returned, or None where nothing was cold.

    Raises:
        CallRefused: a CUDA graph is being captured on the current stream.
    """
    cold = [part for part in (FORWARD, BACKWARD)[: 1 + kind.facts.backward] if not is_warm(kind, part)]
    if not cold:
        return None
    _refuse_while_capturing(kind, cold[0], query)
    tensors = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (query, key, value)]
    with torch.random.fork_rng(devices=[query.device] if query.is_cuda else []):
        before(kind, FORWARD, query)
        result = run(*tensors)
        note(kind, FORWARD)
        if kind.facts.backward:
            out = result[0] if type(result) is tuple else result
            wanted = [item for item in (*tensors, mask) if isinstance(item, torch.Tensor) and item.requires_grad]
            torch.autograd.grad(out, wanted, torch.zeros_like(out), allow_unused=True)
            note(kind, BACKWARD)
    return result
