"""What makes a call senseless: each is to be refused, whoever is asked to compute it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_core.masks import KeyPadding, Packed

if TYPE_CHECKING:
    from collections.abc import Callable

    Spoil = Callable[[dict[str, Any], dict[str, Any]], None]


class Sizes(NamedTuple):
    """Sizes of a call that masks have to fit."""

    batch: int
    heads: int
    queries: int
    keys: int


def _option(name: str, value: Any) -> Spoil:
    return lambda tensors, options: options.update({name: value})  # noqa: ARG005 (each is given both)


def _tensor(name: str, change: Callable[[torch.Tensor], Any]) -> Spoil:
    return lambda tensors, options: tensors.update({name: change(tensors[name])})  # noqa: ARG005


def _mask(make: Callable[[Sizes], Any]) -> Spoil:
    def spoil(tensors: dict[str, Any], options: dict[str, Any]) -> None:
        batch, queries, heads, _ = tensors["query"].shape
        options["attn_mask"] = make(Sizes(batch, heads, queries, tensors["key"].shape[1]))

    return spoil


def _other_dtype(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor.double()


def _ends(*offsets: int) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


def _longer(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def longer(tensor: torch.Tensor) -> torch.Tensor:
        one = [1 if n == dim else size for n, size in enumerate(tensor.shape)]
        return torch.cat([tensor, tensor.new_zeros(one)], dim)

    return longer


def _three_heads_on_two(tensors: dict[str, Any], options: dict[str, Any]) -> None:  # noqa: ARG001
    for name, heads in (("query", 3), ("key", 2), ("value", 2)):
        tensors[name] = tensors[name][:, :, :1].repeat(1, 1, heads, 1)


def _mask_of_a_third_dtype(tensors: dict[str, Any], options: dict[str, Any]) -> None:
    dtype = torch.float16 if tensors["query"].dtype == torch.float64 else torch.float64
    options["attn_mask"] = torch.zeros(1, 1, 1, 1, dtype=dtype)


def _batch_of_documents(tensors: dict[str, Any], options: dict[str, Any]) -> None:
    tensors.update({name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()})
    options["attn_mask"] = Packed(_ends(0, tensors["query"].shape[1]), _ends(0, tensors["key"].shape[1]))


SPOIL: dict[str, Spoil] = {
    "key of another dtype": _tensor("key", _other_dtype),
    "value of another dtype": _tensor("value", _other_dtype),
    "query of integers": _tensor("query", torch.Tensor.long),
    "query of three dimensions": _tensor("query", lambda tensor: tensor.reshape(-1, *tensor.shape[2:])),
    "value of five dimensions": _tensor("value", lambda tensor: tensor[None]),
    "key is None": lambda tensors, options: tensors.update(key=None),  # noqa: ARG005
    "query is a list": _tensor("query", torch.Tensor.tolist),
    "batch of key": _tensor("key", _longer(0)),
    "length of value": _tensor("value", _longer(1)),
    "heads of value": _tensor("value", _longer(2)),
    "heads that do not divide": _three_heads_on_two,
    "head dim of key": _tensor("key", _longer(3)),
    "key elsewhere": _tensor("key", lambda tensor: tensor.to("meta")),
    "scale is NaN": _option("scale", float("nan")),
    "scale is infinite": _option("scale", float("inf")),
    "scale is a string": _option("scale", "0.5"),
    "scale is a bool": _option("scale", True),
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
    "deterministic is a number": _option("deterministic", 2),
    "parallel is asked for": _option("parallel", "ring"),
    "mask is a list": _option("attn_mask", [[True]]),
    "mask of integers": _mask(lambda n: torch.ones(n.batch, 1, n.queries, n.keys, dtype=torch.int64)),
    "mask of two dimensions": _mask(lambda n: torch.ones(n.queries, n.keys, dtype=torch.bool)),
    "mask of three dimensions": _mask(lambda n: torch.ones(n.batch, n.queries, n.keys, dtype=torch.bool)),
    "mask too long": _mask(lambda n: torch.ones(1, 1, 1, n.keys + 2, dtype=torch.bool)),
    "mask of too many heads": _mask(lambda n: torch.zeros(1, n.heads + 1, 1, 1)),
    "mask of a third dtype": _mask_of_a_third_dtype,
    "padding too long": _mask(lambda n: KeyPadding(torch.ones(n.batch, n.keys + 1, dtype=torch.bool))),
    "padding of another batch": _mask(lambda n: KeyPadding(torch.ones(n.batch + 1, n.keys, dtype=torch.bool))),
    "documents too long": _mask(lambda n: Packed(_ends(0, n.queries), _ends(0, n.keys + 1))),
    "documents in a batch": _batch_of_documents,
}
"""By name: a function that spoils the tensors and options of a call, which it is given as two dictionaries."""
