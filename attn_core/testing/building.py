"""Makes the tensors and options of a drawn call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attn_core.masks import KeyPadding, Packed
from attn_core.testing.spoiling import SPOIL

if TYPE_CHECKING:
    from collections.abc import Callable

    from attn_core.testing.drawing import Case


@dataclass(frozen=True, kw_only=True)
class Built:
    """The tensors and options of a drawn call, as they are passed.

    Attributes:
        query: first argument.
        key: second argument.
        value: third argument.
        options: by keyword.
        grad_out: the gradient of the result.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]
    grad_out: torch.Tensor

    def inputs(self) -> dict[str, torch.Tensor]:
        """Every tensor that the call is given, those inside a described mask included."""
        found = {"query": self.query, "key": self.key, "value": self.value}
        mask = self.options.get("attn_mask")
        if isinstance(mask, torch.Tensor):
            found["attn_mask"] = mask
        elif isinstance(mask, KeyPadding):
            found["keep"] = mask.keep
        elif isinstance(mask, Packed):
            found["cu_seqlens_q"], found["cu_seqlens_k"] = mask.cu_seqlens_q, mask.cu_seqlens_k
        return found


def build(case: Case) -> Built:
    """Make the tensors and options of ``case``, the same ones each time."""
    random = torch.Generator().manual_seed(case.seed)
    heads, key_heads = case.heads
    keys = case.queries if case.keys is None else case.keys
    value_dim = case.dim if case.value_dim is None else case.value_dim
    shapes = {
        "query": (case.batch, case.queries, heads, case.dim),
        "key": (case.batch, keys, key_heads, case.dim),
        "value": (case.batch, keys, key_heads, value_dim),
    }
    tensors = {
        name: _number(shape, layout, case, random)
        for (name, shape), layout in zip(shapes.items(), case.layouts, strict=True)
    }
    grad_out = _number((case.batch, case.queries, heads, value_dim), case.grad_layout, case, random)
    options = _options(case)
    mask = _mask(case, (case.batch, heads, case.queries, keys), random)
    if mask is not None:
        options["attn_mask"] = mask
    if case.spoiled is not None:
        SPOIL[case.spoiled](tensors, options)
    _require_gradients(case, tensors, options)
    return Built(**tensors, options=options, grad_out=grad_out)


def _require_gradients(case: Case, tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    for name in case.gradients:
        tensor = options.get(name) if name == "attn_mask" else tensors[name]
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_()


def _options(case: Case) -> dict[str, Any]:
    """The options that differ from their defaults."""
    given = {
        "causal": case.causal, "scale": _scalar(case.scale), "window_size": case.window_size, "softcap": _scalar(case.softcap),
        "deterministic": case.deterministic, "return_lse": case.return_lse,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None and value is not False}


def _scalar(value: Any) -> Any:
    """The numpy scalar that a string such as "numpy.float32(0.25)" stands for."""
    if not isinstance(value, str):
        return value
    import numpy as np

    kind, _, number = value.removeprefix("numpy.").rstrip(")").partition("(")
    return getattr(np, kind)(float(number))


# --- tensors of all strides -------------------------------------------------------------------------------------------


def _number(shape: tuple[int, ...], layout: str, case: Case, random: torch.Generator) -> torch.Tensor:
    def fresh(shape: tuple[int, ...]) -> torch.Tensor:
        numbers = torch.randn(shape, generator=random, dtype=torch.float64) * case.amplitude
        return numbers.to(case.device, getattr(torch, case.dtype))

    return lay_out(shape, layout, fresh)


def lay_out(shape: tuple[int, ...], layout: str, fresh: Callable[[tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
    """Make a 4-D tensor of ``shape`` whose strides are those of ``layout``, from what ``fresh(shape)`` makes."""
    a, b, c, d = shape
    made = {
        "contiguous": lambda: fresh(shape),
        "transposed": lambda: fresh((a, c, b, d)).transpose(1, 2),
        "sliced": lambda: fresh((a, b + 2, 3, c, d))[:, 1 : b + 1, 1],
        "offset": lambda: fresh((a * b * c * d + 3,))[3:].view(shape),
        "last strided": lambda: fresh((a, b, c, 2 * d))[..., ::2],
        "expanded batch": lambda: fresh((1, b, c, d)).expand(shape),
        "expanded keys": lambda: fresh((a, 1, c, d)).expand(shape),
        "expanded": lambda: fresh((1, 1, 1, 1)).expand(shape),
    }
    return made[layout]()


# --- masks ------------------------------------------------------------------------------------------------------------


def _mask(case: Case, full: tuple[int, int, int, int], random: torch.Generator) -> Any:
    if case.mask == "key_padding":
        return KeyPadding(_visible(case, (full[0], full[3]), random).to(case.device))
    if case.mask == "packed":
        ends_q, ends_k = _documents(full[2], full[3], random)
        return Packed(ends_q.to(case.device), ends_k.to(case.device))
    if case.mask not in ("bool", "float"):
        return None
    shape = tuple(1 if once else size for size, once in zip(full, case.mask_once, strict=True))

    def fresh(shape: tuple[int, ...]) -> torch.Tensor:
        visible = _visible(case, shape, random)
        if case.mask == "bool":
            return visible.to(case.device)
        dtype = getattr(torch, case.dtype if case.mask_dtype == "same" else case.mask_dtype)
        hidden = torch.finfo(dtype).min if case.mask_hides == "far" else -torch.inf
        size = 200 if case.mask_hides == "large" else 1
        numbers = size * torch.randn(shape, generator=random, dtype=torch.float64)
        return numbers.masked_fill(~visible, hidden).to(case.device, dtype)

    return lay_out(shape, case.mask_layout, fresh)


def _visible(case: Case, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    if case.mask_hides == "nothing":
        return torch.ones(shape, dtype=torch.bool)
    if case.mask_hides == "everything":
        return torch.zeros(shape, dtype=torch.bool)
    if case.mask_hides in ("left", "right"):
        hidden = torch.randint(1, max(shape[-1], 2), (*shape[:-1], 1), generator=random)
        place = torch.arange(shape[-1])
        return place >= hidden if case.mask_hides == "left" else place < shape[-1] - hidden
    visible = torch.rand(shape, generator=random) < 0.7
    if case.mask_hides in ("rows", "far"):
        visible = visible & (torch.rand((*shape[:-1], 1), generator=random) < 0.6)
    return visible


def _documents(queries: int, keys: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of one to four documents, or of twelve, empty ones included; of equal lengths, mostly alike on both sides."""
    count = (0, 1, 2, 3, 11)[int(torch.randint(0, 5, (), generator=random))]
    cuts = [torch.randint(0, length + 1, (count,), generator=random).sort().values for length in (queries, keys)]
    if queries == keys and int(torch.randint(0, 4, (), generator=random)):
        cuts[1] = cuts[0]
    ends_q, ends_k = [0, *cuts[0].tolist(), queries], [0, *cuts[1].tolist(), keys]
    return torch.tensor(ends_q, dtype=torch.int32), torch.tensor(ends_k, dtype=torch.int32)
