"""Makes the tensors and options of a drawn call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attn_core.masks import KeyPadding, Packed

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
        name: _number(shape, layout, case, random) for (name, shape), layout in zip(shapes.items(), case.layouts, strict=True)
    }
    grad_out = _number((case.batch, case.queries, heads, value_dim), case.grad_layout, case, random)
    options = _options(case)
    mask = _mask(case, (case.batch, heads, case.queries, keys), random)
    if mask is not None:
        options["attn_mask"] = mask
    if case.spoiled is not None:
        _SPOIL[case.spoiled](tensors, options)
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


def lay_out(
    shape: tuple[int, ...], layout: str, fresh: Callable[[tuple[int, ...]], torch.Tensor]
) -> torch.Tensor:
    """Make a 4-D tensor of ``shape`` whose strides are those of ``layout``, from what ``fresh(shape)`` makes."""
    a, b, c, d = shape
    if layout == "transposed":
        return fresh((a, c, b, d)).transpose(1, 2)
    if layout == "sliced":
        return fresh((a, b + 2, 3, c, d))[:, 1 : b + 1, 1]
    if layout == "offset":
        return fresh((a * b * c * d + 3,))[3:].view(shape)
    if layout == "last strided":
        return fresh((a, b, c, 2 * d))[..., ::2]
    if layout in ("expanded batch", "expanded"):
        return fresh((1, b, c, d)).expand(shape) if layout == "expanded batch" else fresh((1, 1, 1, 1)).expand(shape)
    if layout == "expanded keys":
        return fresh((a, 1, c, d)).expand(shape)
    return fresh(shape)


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
        numbers = torch.randn(shape, generator=random, dtype=torch.float64).masked_fill(~visible, -torch.inf)
        return numbers.to(case.device, dtype)

    return lay_out(shape, case.mask_layout, fresh)


def _visible(case: Case, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    if case.mask_hides == "nothing":
        return torch.ones(shape, dtype=torch.bool)
    if case.mask_hides == "everything":
        return torch.zeros(shape, dtype=torch.bool)
    visible = torch.rand(shape, generator=random) < 0.7
    if case.mask_hides == "rows":
        visible = visible & (torch.rand((*shape[:-1], 1), generator=random) < 0.6)
    return visible


def _documents(queries: int, keys: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of up to four documents, empty ones included; alike on both sides where the lengths allow it."""
    count = int(torch.randint(0, 4, (), generator=random))
    cuts = [torch.randint(0, length + 1, (count,), generator=random).sort().values for length in (queries, keys)]
    if queries == keys:
        cuts[1] = cuts[0]
    ends = [torch.tensor([0, *cut.tolist(), length], dtype=torch.int32) for cut, length in zip(cuts, (queries, keys), strict=True)]
    return ends[0], ends[1]


# --- calls that make no sense -----------------------------------------------------------------------------------------


def _option(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def spoil(tensors: dict[str, Any], options: dict[str, Any]) -> None:  # noqa: ARG001
        options[name] = value

    return spoil


def _tensor(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def spoil(tensors: dict[str, Any], options: dict[str, Any]) -> None:  # noqa: ARG001
        tensors[name] = change(tensors[name])

    return spoil


def _like_query(tensors: dict[str, Any], options: dict[str, Any], change: Callable[[int, int, int, int], Any]) -> None:
    batch, queries, heads, _ = tensors["query"].shape
    options["attn_mask"] = change(batch, heads, queries, tensors["key"].shape[1])


def _mask_of(change: Callable[[int, int, int, int], Any]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, options: _like_query(tensors, options, change)


def _other_dtype(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor.double()


def _ends(*offsets: int) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


def _longer(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.narrow(dim, 0, 1) if tensor.shape[dim] else tensor.new_zeros(_one(tensor, dim))], dim)


def _one(tensor: torch.Tensor, dim: int) -> list[int]:
    return [1 if n == dim else size for n, size in enumerate(tensor.shape)]


def _repeated(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor[:, :, :1].repeat(1, 1, heads, 1)


def _batch_of_documents(tensors: dict[str, Any], options: dict[str, Any]) -> None:
    tensors.update({name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()})
    options["attn_mask"] = Packed(_ends(0, tensors["query"].shape[1]), _ends(0, tensors["key"].shape[1]))


_SPOIL: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "key of another dtype": _tensor("key", _other_dtype),
    "value of another dtype": _tensor("value", _other_dtype),
    "query of integers": _tensor("query", lambda tensor: tensor.long()),
    "query of three dimensions": _tensor("query", lambda tensor: tensor.reshape(-1, *tensor.shape[2:])),
    "value of five dimensions": _tensor("value", lambda tensor: tensor[None]),
    "key is None": _tensor("key", lambda tensor: None),
    "query is a list": _tensor("query", lambda tensor: tensor.tolist()),
    "batch of key": _tensor("key", lambda tensor: _longer(tensor, 0)),
    "length of value": _tensor("value", lambda tensor: _longer(tensor, 1)),
    "heads of value": _tensor("value", lambda tensor: _longer(tensor, 2)),
    "heads that do not divide": lambda tensors, options: tensors.update(  # noqa: ARG005
        query=_repeated(tensors["query"], 3), key=_repeated(tensors["key"], 2), value=_repeated(tensors["value"], 2)
    ),
    "head dim of key": _tensor("key", lambda tensor: _longer(tensor, 3)),
    "key elsewhere": _tensor("key", lambda tensor: tensor.to("meta")),
    "scale is NaN": _option("scale", float("nan")),
    "scale is infinite": _option("scale", float("inf")),
    "scale is a string": _option("scale", "0.5"),
    "scale is a bool": _option("scale", True),  # noqa: FBT003
    "softcap of zero": _option("softcap", 0.0),
    "softcap below zero": _option("softcap", -1.0),
    "softcap is NaN": _option("softcap", float("nan")),
    "dropout of one": _option("dropout_p", 1.0),
    "dropout below zero": _option("dropout_p", -0.1),
    "dropout is NaN": _option("dropout_p", float("nan")),
    "window of one side": _option("window_size", (1,)),
    "window below minus one": _option("window_size", (2, -2)),
    "window of halves": _option("window_size", (1.5, 0)),
    "window is a number": _option("window_size", 3),
    "window of bools": _option("window_size", (True, False)),
    "causal is a string": _option("causal", "yes"),
    "causal is None": _option("causal", None),
    "return_lse is a string": _option("return_lse", "no"),
    "mask is a list": _option("attn_mask", [[True]]),
    "mask of integers": _mask_of(lambda b, h, i, j: torch.ones(b, 1, i, j, dtype=torch.int64)),
    "mask of two dimensions": _mask_of(lambda b, h, i, j: torch.ones(i, j, dtype=torch.bool)),
    "mask of three dimensions": _mask_of(lambda b, h, i, j: torch.ones(b, i, j, dtype=torch.bool)),
    "mask too long": _mask_of(lambda b, h, i, j: torch.ones(1, 1, 1, j + 2, dtype=torch.bool)),
    "mask of too many heads": _mask_of(lambda b, h, i, j: torch.zeros(1, h + 1, 1, 1)),
    "mask of float64": lambda tensors, options: options.update(
        attn_mask=torch.zeros(1, 1, 1, 1, dtype=torch.float16 if tensors["query"].dtype == torch.float64 else torch.float64)
    ),
    "padding too long": _mask_of(lambda b, h, i, j: KeyPadding(torch.ones(b, j + 1, dtype=torch.bool))),
    "padding of another batch": _mask_of(lambda b, h, i, j: KeyPadding(torch.ones(b + 1, j, dtype=torch.bool))),
    "documents too long": _mask_of(lambda b, h, i, j: Packed(_ends(0, i), _ends(0, j + 1))),
    "documents in a batch": lambda tensors, options: _batch_of_documents(tensors, options),
}
SPOILS = tuple(_SPOIL)
