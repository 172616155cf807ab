"""Draws calls of attention with every option of the table together, good ones and, now and then, senseless ones.

A drawn call is plain data: it prints as code that makes it again. Who draws decides how: hypothesis, a seeded
``random.Random``, or by hand. The first value of each list is the plainest, so that hypothesis shrinks towards it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from attn_core.testing.building import Built, build
from attn_core.testing.spoiling import SPOIL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")


class Choose(Protocol):
    """Picks one of several values."""

    def __call__(self, values: Sequence[T], /) -> T:
        """Return one of them."""


NUMPY = "numpy."
LENGTHS = (4, 1, 2, 3, 5, 7, 8, 16, 17, 33, 0, 65, 130) * 3

CHOICES: dict[str, Sequence[Any]] = {
    "dtype": ("float32", "float32", "bfloat16", "float16", "float64"),
    "batch": (1, 2, 2, 3, 0),
    "queries": (*LENGTHS, 300, 770),
    "keys": (*(None,) * 6, *LENGTHS, 300, 600),
    "heads": ((1, 1), (2, 2), (2, 1), (4, 2), (6, 2), (3, 3)),
    "dim": (8, 1, 3, 16, 24, 32, 64, 80, 128),
    "value_dim": (None, None, None, 8, 1, 5, 16, 64),
    "mask": ("none", "none", "bool", "float", "key_padding", "packed"),
    "mask_once": tuple(
        tuple(once == "1" for once in pattern)
        for pattern in ("0000", "1100", "0110", "0100", "1001", "1110", "1111", "0010")
    ),
    "mask_dtype": ("same", "same", "float32"),
    "mask_hides": ("some", "nothing", "rows", "far", "left", "right", "everything", "large"),
    "causal": (False, True),
    "window_size": (None, None, None, (-1, -1), (0, 0), (2, 1), (1, -1), (-1, 2), (3, 0), (40, 40), (0, -1), (-1, 0)),
    "scale": (None, None, None, 0.5, 0, -0.3, 2, f"{NUMPY}float32(0.25)", f"{NUMPY}int64(1)", 0.0),
    "softcap": (None, None, None, None, 2.0, 30, 0.5, f"{NUMPY}float64(5.0)"),
    "deterministic": (False, False, True),
    "return_lse": (False, True),
    "gradients": (
        *((), ()),
        *(("query", "key", "value"), ("query", "key", "value")),
        *(("query",), ("key",), ("value",), ("key", "value")),
        *(("attn_mask",), ("query", "attn_mask"), ("query", "key", "value", "attn_mask")),
    ),
    "layouts": ("contiguous", "transposed", "sliced", "last strided", "expanded batch", "expanded keys", "offset"),
    "grad_layout": ("contiguous", "expanded", "transposed", "last strided", "offset"),
    "mask_layout": ("contiguous", "sliced", "transposed", "expanded", "last strided"),
    "autocast": (None,) * 9 + ("bfloat16", "float16"),
    "mode": (*("grad",) * 7, "no_grad", "inference"),
    "amplitude": (1.0, 1.0, 1.0, 4.0, 1e-3),
    "spoiled": (None,) * 400 + tuple(SPOIL),
    "seed": tuple(range(50)),
}
"""What each field is drawn from; a value listed twice is drawn twice as often."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Case:
    """One drawn call, as data.

    Attributes:
        dtype: of query, key and value, a torch name.
        batch: B.
        queries: Sq.
        keys: Skv; None is Sq.
        heads: (Hq, Hkv).
        dim: D.
        value_dim: Dv; None is D.
        mask: kind of attn_mask, one of ``attn_core.facts.MASKS``.
        mask_once: which of (B, Hq, Sq, Skv) a dense mask gives once for all.
        mask_dtype: of a float mask, "same" as query's.
        mask_hides: which keys a mask hides: "nothing", "some", "rows" (all keys of some queries, too) or "everything"; "left" and
            "right", as many as padding on that side does; "far" is as "rows", and a float mask has the most negative finite
            number there in place of -inf, which hides nothing; "large" is as "some", and a float mask adds hundreds.
        causal: as in ``attention``.
        window_size: as in ``attention``.
        scale: as in ``attention``; a string that begins with "numpy." stands for that numpy scalar.
        softcap: as in ``attention``; the same.
        deterministic: as in ``attention``.
        return_lse: as in ``attention``.
        gradients: the inputs that require a gradient.
        layouts: strides of (query, key, value).
        grad_layout: strides of the gradient of the result.
        mask_layout: strides of a dense mask.
        autocast: dtype that autocast is on with, or None.
        mode: "grad"; "no_grad" or "inference" is a call inside ``torch.no_grad()`` or ``torch.inference_mode()``.
        amplitude: size of the numbers.
        spoiled: what makes the call senseless, one of ``spoiling.SPOIL``, or None.
        seed: of the numbers.
        device: of the tensors.
    """

    dtype: str = "float32"
    batch: int = 1
    queries: int = 4
    keys: int | None = None
    heads: tuple[int, int] = (1, 1)
    dim: int = 8
    value_dim: int | None = None
    mask: str = "none"
    mask_once: tuple[bool, bool, bool, bool] = (False, False, False, False)
    mask_dtype: str = "same"
    mask_hides: str = "some"
    causal: bool = False
    window_size: tuple[int, int] | None = None
    scale: Any = None
    softcap: Any = None
    deterministic: bool = False
    return_lse: bool = False
    gradients: tuple[str, ...] = ()
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    grad_layout: str = "contiguous"
    mask_layout: str = "contiguous"
    autocast: str | None = None
    mode: str = "grad"
    amplitude: float = 1.0
    spoiled: str | None = None
    seed: int = 0
    device: str = "cpu"

    def __repr__(self) -> str:
        told = (
            f"{item.name}={getattr(self, item.name)!r}"
            for item in fields(self)
            if getattr(self, item.name) != item.default
        )
        return f"Case({', '.join(told)})"

    def build(self) -> Built:
        """Make the tensors and options of the call, the same ones each time."""
        return build(self)


def draw(choose: Choose, limits: Mapping[str, Sequence[Any]] | None = None, *, device: str = "cpu") -> Case:
    """Draw a call.

    Args:
        choose: picks one of several values, such as ``random.Random(0).choice``.
        limits: for some fields, the values to draw from instead of ``CHOICES``.
        device: of the tensors.

    Example:
        >>> import random
        >>> case = draw(random.Random(0).choice, {"dtype": ["float64"]})
        >>> case.dtype
        'float64'
    """
    limits = limits or {}
    given = {name: choose(limits.get(name, values)) for name, values in CHOICES.items() if name != "layouts"}
    layouts = limits.get("layouts", CHOICES["layouts"])
    alike = choose((True, True, False))
    first = choose(layouts)
    given["layouts"] = (first, first, first) if alike else (first, choose(layouts), choose(layouts))
    if given["mask"] == "packed":
        given["batch"] = 1
    given.update({} if given["mask"] in ("bool", "float") else {"mask_once": (False,) * 4, "mask_layout": "contiguous"})
    if given["mask"] != "float":
        given["mask_dtype"] = "same"
        given["gradients"] = tuple(name for name in given["gradients"] if name != "attn_mask")
    return Case(**given, device=device)
