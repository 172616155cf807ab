"""Adapters of hub kernels that have the functions of flash-attention.

Dense and packed calls go to the public functions. Their graph is the core's, whose backward calls the function that the
library's own graph calls. Not all of that traces, so in traced code two operators made here stand for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_core.masks import traced
from attn_core.packed_calls import Mask, Options, Starts, attend, differentiate, options_of
from attn_core.shaping import natural_lse

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from attn_core.shaping import Tensors


class Library(NamedTuple):
    """A hub kernel with ``flash_attn_func`` and ``flash_attn_varlen_func``, and its convention.

    Attributes:
        name: of the backend.
        module: the kernel.
        gradients: what its graph calls, brought into one form: of the module, the six tensors of a backward, where
            sequences start, the options, and ``lengths`` as below; None where it has no backward.
        fronted: of one that reads on behind a sequence, its dense call of keys of which ``lengths`` says how many are real:
            of the module, query, key, value, ``lengths``, and the options that are given to each of its functions.
        room: how many zeros there have to be behind the keys of each sequence then.
        step: of the head dims that it takes.
        lse_option: the option that asks for the lse, which is then the second result.
        always_tuple: whether the lse is returned, maybe as None, where it is not asked for.
        knows_deterministic: whether it takes ``deterministic``.
        nothing: the lse of a query that sees nothing, and of one that met a NaN.
    """

    name: str
    module: ModuleType
    gradients: Callable[..., Tensors] | None = None
    fronted: Callable[..., Any] | None = None
    room: int = 0
    step: int = 8
    lse_option: str = "return_attn_probs"
    always_tuple: bool = False
    knows_deterministic: bool = True
    nothing: float = float("inf")

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: torch.Tensor | None,
        starts: Starts | None,
        options: Options,
        *,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Result and lse, without a graph."""
        given: dict[str, Any] = {"softmax_scale": options.scale, "causal": options.causal, self.lse_option: return_lse}
        if self.knows_deterministic:
            given["deterministic"] = options.deterministic
        with torch.no_grad():
            if lengths is not None:
                assert self.fronted is not None  # noqa: S101 - there are no lengths otherwise
                found = self.fronted(self.module, query, key, value, lengths, given)
            elif starts is None:
                found = self.module.flash_attn_func(query, key, value, **given)
            else:
                found = self.module.flash_attn_varlen_func(query, key, value, *starts.bounded(options), **given)
        if not return_lse:
            return found[0] if self.always_tuple else found, None
        # without any key in a packed call it is +inf in all of them, or -inf as it is meant
        nothing = self.nothing if key.numel() else float("inf")
        all_see = starts is None and lengths is None and options.all_see(query, key)
        return found[0], natural_lse(found[1], found[0], nothing, all_see=all_see)


class _Kernel:
    """The library; ``lengths``, of a dense call, says how many keys of each sequence are real, the first ones."""

    def __init__(self, library: Library, operators: tuple[Any, Any], lengths: torch.Tensor | None = None) -> None:
        self.library = library
        self.operators = operators
        self.lengths = lengths

    def widths(self, head_dim: int, value_head_dim: int, _: torch.device) -> tuple[int, int]:
        """One for all, in steps."""
        width = max(head_dim, value_head_dim)
        width += -width % self.library.step
        return width, width

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: Starts | None,
        options: Options,
        *,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Result and lse."""
        if not traced(query):
            return self.library.run(query, key, value, self.lengths, starts, options, return_lse=return_lse)
        out, lse = self.operators[0](query, key, value, *_flat(self.lengths, starts, options))
        return out, lse

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        starts: Starts | None,
        options: Options,
    ) -> Tensors:
        """The gradients."""
        tensors = (grad_out, query, key, value, out, lse)
        if traced(query):
            dq, dk, dv = self.operators[1](*tensors, *_flat(self.lengths, starts, options))
            return dq, dk, dv
        assert self.library.gradients is not None  # noqa: S101 - its declaration has no backward otherwise
        return self.library.gradients(self.library.module, *tensors, starts, options, self.lengths)


class _ReadingOn(_Kernel):
    """One that reads on behind a sequence, which leaves the NaN of the next what it is where it is weighed with 0."""

    @property
    def room(self) -> int:
        return self.library.room

    def fronted(self, lengths: torch.Tensor) -> _ReadingOn:
        return _ReadingOn(self.library, self.operators, lengths)


def flash(library: Library) -> tuple[Callable[..., Any], Callable[..., Tensors]]:
    """Make the two functions of the adapter."""
    kernel = (_Kernel if library.fronted is None else _ReadingOn)(library, _operators(library))

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        attn_mask: Mask = None,
        causal: bool = False,
        deterministic: bool = False,
        return_lse: bool = False,
    ) -> Any:
        options = options_of(scale, causal, None, None, deterministic=deterministic)
        return attend(kernel, query, key, value, attn_mask, options, return_lse=return_lse)

    def backward(
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        attn_mask: Mask = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Tensors:
        options = options_of(scale, causal, None, None, deterministic=deterministic)
        return differentiate(kernel, grad_out, query, key, value, out, lse, attn_mask, options)

    return forward, backward


# --- operators for traced code ------------------------------------------------------------------------------------------

_GIVEN = (
    "Tensor? seqused_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "float scale, bool causal, bool deterministic"
)


def _flat(lengths: torch.Tensor | None, starts: Starts | None, options: Options) -> tuple[Any, ...]:
    """What an operator is given of them, in the order of its schema."""
    return (lengths, *(starts or (None,) * 4), options.scale, options.causal, options.deterministic)


def _unflat(given: tuple[Any, ...]) -> tuple[torch.Tensor | None, Starts | None, Options]:
    scale, causal, deterministic = given[5:]
    options = options_of(scale, causal, None, None, deterministic=deterministic)
    return given[0], None if given[1] is None else Starts(*given[1:5]), options


def _operators(library: Library) -> tuple[Any, Any]:
    def run(query: Any, key: Any, value: Any, *given: Any) -> Any:
        out, lse = library.run(query, key, value, *_unflat(given), return_lse=True)
        assert lse is not None  # noqa: S101 - it was asked for
        return out.contiguous(), lse.contiguous()

    def plan(query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32).transpose(-1, -2).contiguous()
        return query.new_empty((*query.shape[:-1], value.shape[-1])), lse

    schema = f"(Tensor query, Tensor key, Tensor value, {_GIVEN}) -> (Tensor, Tensor)"
    forward = torch.library.custom_op(f"attn_hub::{library.name}", run, mutates_args=(), schema=schema)
    forward.register_fake(plan)
    gradients = library.gradients
    if gradients is None:
        return forward, None

    def run_backward(*given: Any) -> Any:
        lengths, starts, options = _unflat(given[6:])
        return tuple(grad.contiguous() for grad in gradients(library.module, *given[:6], starts, options, lengths))

    def plan_backward(
        _: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any
    ) -> Tensors:
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)

    backward = torch.library.custom_op(
        f"attn_hub::{library.name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_GIVEN}) "
        "-> (Tensor, Tensor, Tensor)",
    )
    backward.register_fake(plan_backward)
    return forward, backward
