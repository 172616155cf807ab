"""How far from the float64 reference an honest kernel may be, derived from dtype and reduction length.

What is allowed, and no more:

- inputs are taken as they are, rounded: the reference runs on the same numbers, so their rounding costs nothing;
- scores, softmax and sums are computed in the accumulation dtype: float64 for float64, float32 for all others, whose eps
  is ``a`` below. A sum of n rounded terms is off by ``growth(n) = (4 + 3 sqrt(n)) a`` of the sum of their magnitudes: the
  worst case has n, but a sum exceeds 6 sqrt(n) u with negligible probability (Higham & Mary, A new approach to
  probabilistic rounding error analysis, 2019; u = a / 2);
- in half precision (eps ``e``) a probability or a score's gradient is rounded before it enters a product (e/2), partial results
  (of heads of a group, of parts of the keys) are rounded before they are added (e/2), and the result is rounded (e/2);
- twice the sum of all that, for what first-order analysis leaves out.

``bounds`` follows these through the computation, element by element, so that a bound is as small as the call allows: with
P the probabilities and M = |scale| |Q||K|^T the magnitude of the scores,

    scores          dT = growth(D) M + 4 a (|capped| + |mask|); beside a large number that a row's keys have in common,
                    2 |capped| in place of 4 a |mask|: it may swallow the scores, and that is all
    probabilities   dP = P (dT + sum_j P dT + growth(Skv)), and 1 at most
    result          dO = dP |V| + r(Skv) P |V|                          r(n) = growth(n) + 1.5 e in half precision
    lse             dL = sum_j P dT + growth(Skv) + 4 a |lse|
    gradients       dS = dP |G - D| + P (growth(Dv) |g||V|^T + |g| dO + growth(Dv) |g||O|) + 4 a P (|G| + |D|)
                    where G = g V^T and D = rowsum(g O), and each product with it as the result's product with P.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch

from attn_core.testing.reference import weights

SAFETY = 2
_FAR = 1e4  # from here on a sum in float32 rounds off more of a score than honest kernels are off elsewhere
_FREE = 13.8  # a score that is off by so much, with that of other keys, may have got any probability


def accumulation_eps(dtype: torch.dtype) -> float:
    """The eps of what a kernel for ``dtype`` computes in: float64 for itself, float32 for all others."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def growth(dtype: torch.dtype, length: int) -> float:
    """Relative error of a sum of ``length`` rounded terms in the accumulation dtype."""
    return (4 + 3 * sqrt(length)) * accumulation_eps(dtype)


def tolerance(dtype: torch.dtype, length: int = 1) -> float:
    """Allowed error of a sum of ``length`` terms that ends in ``dtype``, relative to the sum of the terms' magnitudes.

    Args:
        dtype: of query, key and value.
        length: of the reduction: Skv for the result, Sq for the gradients of key and value.

    Example:
        >>> import torch
        >>> tolerance(torch.bfloat16) == 2 * (1.5 * 2**-7 + 7 * 2**-23)
        True
    """
    return SAFETY * _product(dtype, length)


def _product(dtype: torch.dtype, length: int) -> float:
    half = torch.finfo(dtype).bits < 32
    return growth(dtype, length) + (1.5 * torch.finfo(dtype).eps if half else 0)


def rounding(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The error of rounding ``exact`` to ``dtype``: of a gradient, to the dtype of an input that was cast on the way in."""
    return torch.finfo(dtype).eps * exact.detach().double().abs() + _underflow(dtype)


def _underflow(dtype: torch.dtype) -> float:
    """Below this a number may become 0: subnormal numbers are kept in float16 only."""
    finfo = torch.finfo(dtype)
    return max(finfo.tiny * finfo.eps, torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The largest honest error of each element of what a call returns, and of its gradients where asked for."""

    out: torch.Tensor
    lse: torch.Tensor
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None


def bounds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    grad_out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Bounds:
    """Bound the error of each element of a call's result, lse and gradients.

    Args:
        query: (B, Sq, Hq, D), as given to the kernel.
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        grad_out: (B, Sq, Hq, Dv), the gradient of the result; None where no gradient is compared.
        dtype: what the kernel is given; query's when not named.
        **options: those of ``reference``.

    Returns:
        Bounds of the same shapes as the results, float64.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 4, 2, 8)
        >>> bool(bounds(q, q, q, causal=True).out.max() < 1e-3)
        True
    """
    return _Analysis(query, key, value, dtype or query.dtype, options).bounds(grad_out)


class _Analysis:
    """The error analysis of one call; matrices are (B, Hq, Sq, Skv), the others (B, Hq, S, D)."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        self.dtype = dtype
        self.eps = accumulation_eps(dtype)
        self.group = query.shape[2] // key.shape[2]
        self.query = query.detach().double().transpose(1, 2)
        self.key, self.value = (
            tensor.detach().double().transpose(1, 2).repeat_interleave(self.group, 1) for tensor in (key, value)
        )
        scale = options.get("scale")
        self.scale = abs(query.shape[3] ** -0.5 if scale is None else float(scale))
        self.softcap = None if options.get("softcap") is None else float(options["softcap"])
        mask = options.get("attn_mask")
        self.mask = mask.detach() if isinstance(mask, torch.Tensor) and mask.dtype != torch.bool else None
        options = dict(options)
        kept, dropout_p = options.pop("kept", None), options.pop("dropout_p", 0.0)
        self.dropout = 1 if kept is None else kept / (1 - dropout_p)
        with torch.no_grad():
            self.probabilities, self.lse = weights(query, key, **options)
            self.swallowed = self._swallowed(query, key, options)
        self.score_error = self._score_error()
        mean_error = (self.probabilities * self.score_error).sum(-1, keepdim=True)
        error = self.score_error + mean_error + growth(dtype, key.shape[1])
        self.mean_error = mean_error[..., 0]
        # a probability is 1 at most, whatever its score has become
        changed = (self.probabilities * error.clamp(max=_FREE).expm1()).masked_fill(self.swallowed & (error > _FREE), 1)
        self.probability_error = changed.clamp(max=1) + _underflow(dtype)

    def _swallowed(self, query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Which scores a sum with the mask may lose: in rows whose keys have a large number in common, those of such keys."""
        if self.mask is None or not key.shape[1]:
            return torch.zeros_like(self.probabilities, dtype=torch.bool)
        mask = self.mask.double().expand(self.probabilities.shape)
        common = mask.gather(-1, self.probabilities.argmax(-1, keepdim=True))
        seen = weights(query * 0, key * 0, **{**options, "attn_mask": None})[0] > 0
        return seen & (mask == common) & (common.abs() > _FAR) & common.isfinite()

    def bounds(self, grad_out: torch.Tensor | None) -> Bounds:
        out_error = self._product(self.probability_error * self.dropout, self.probabilities * self.dropout, self.value)
        lse_error = (
            self.mean_error + growth(self.dtype, self.key.shape[2]) + 4 * self.eps * self.lse.abs().nan_to_num(posinf=0)
        )
        results = {"out": out_error.transpose(1, 2), "lse": SAFETY * lse_error}
        if grad_out is not None:
            results.update(self._gradients(grad_out.detach().double().transpose(1, 2), out_error / SAFETY))
        return Bounds(**results)

    def _score_error(self) -> torch.Tensor:
        magnitude: torch.Tensor = self.scale * (self.query.abs() @ self.key.abs().mT)
        scores = self.scale * (self.query @ self.key.mT)
        self.capped = scores if self.softcap is None else self.softcap * (scores / self.softcap).tanh()
        error: torch.Tensor = growth(self.dtype, self.query.shape[3]) * magnitude + 4 * self.eps * self.capped.abs()
        self.capped_error = error
        if self.mask is None:
            return error
        rounded: torch.Tensor = 4 * self.eps * self.mask.double().abs().nan_to_num(posinf=0)
        return error + torch.where(self.swallowed, rounded.minimum(2 * self.capped.abs()), rounded)

    def _product(self, error: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The error of ``left @ right`` when left is off by ``error``."""
        rounding = _product(self.dtype, left.shape[-1])
        found: torch.Tensor = (error + rounding * left.abs()) @ right.abs()
        return SAFETY * found + _underflow(self.dtype)

    def _gradients(self, grad_out: torch.Tensor, out_error: torch.Tensor) -> dict[str, torch.Tensor]:
        weights, size = self.probabilities, grad_out.abs()
        out = (weights * self.dropout) @ self.value
        dot = growth(self.dtype, grad_out.shape[-1])
        to_weights = (grad_out @ self.value.mT) * self.dropout
        to_row = (grad_out * out).sum(-1, keepdim=True)
        magnitude = (size @ self.value.abs().mT) * self.dropout
        row_error = (size * (out_error + dot * out.abs())).sum(-1, keepdim=True)
        scores = weights * (to_weights - to_row)
        error = (
            self.probability_error * (to_weights - to_row).abs()
            + weights * (dot * magnitude + row_error)
            + 4 * self.eps * weights * (to_weights.abs() + to_row.abs())
            + _underflow(self.dtype)
        )
        found = {}
        if self.mask is not None:
            found["attn_mask"] = self._mask_gradient(self.mask.shape, scores, error)
        if self.softcap is not None:
            slope = 1 - (self.capped / self.softcap) ** 2
            error = error * slope.abs() + scores.abs() * (2 * self.capped_error / self.softcap + 4 * self.eps)
            scores = scores * slope
        dropped = weights * self.dropout
        last = _underflow(self.dtype)  # of the result, which is rounded after the scale
        found["query"] = (self.scale * self._product(error, scores, self.key) + last).transpose(1, 2)
        found["key"] = self._of_key_heads(self.scale * self._product(error.mT, scores.mT, self.query) + last)
        found["value"] = self._of_key_heads(
            self._product((self.probability_error * self.dropout).mT, dropped.mT, grad_out)
        )
        return found

    def _of_key_heads(self, error: torch.Tensor) -> torch.Tensor:
        batch, heads, length, dim = error.shape
        return error.reshape(batch, heads // self.group, self.group, length, dim).sum(2).transpose(1, 2)

    def _mask_gradient(self, shape: torch.Size, scores: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        count = scores.numel() // max(shape.numel(), 1)
        error = error + _product(self.dtype, count) * scores.abs()
        return SAFETY * error.sum_to_size(shape)


def assert_close(
    found: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype,
    what: str,
    *,
    bound: torch.Tensor | float | None = None,
) -> None:
    """Raise an AssertionError, with the worst element, where ``found`` is further from ``expected`` than allowed.

    NaN and infinities have to be where they are expected.

    Args:
        found: of the kernel.
        expected: of the reference, the same shape.
        dtype: what the kernel was given.
        what: what is compared ("out", "lse", "gradient of key"), for the message.
        bound: allowed difference, of each element or of all. When it is not given, that of a sum of as many terms as the longest
            side of ``expected``, each of the size of its largest element and at least 1: for numbers drawn from randn.

    Example:
        >>> import torch
        >>> assert_close(torch.ones(2), torch.ones(2).double(), torch.float32, "out")
    """
    if found.shape != expected.shape:
        msg = f"{what}: shape {tuple(found.shape)} where {tuple(expected.shape)} is expected"
        raise AssertionError(msg)
    if not expected.numel():
        return
    found, expected = found.detach().double(), expected.detach().double().to(found.device)
    if bound is None:
        size = expected.abs().nan_to_num(posinf=0).max().clamp(min=1)
        bound = float(tolerance(dtype, max(expected.shape, default=1)) * size)
    allowed = torch.as_tensor(bound, dtype=torch.float64, device=found.device).expand(expected.shape)
    difference = (found - expected).abs()
    same = (found == expected) | (found.isnan() & expected.isnan())
    wrong = ~same & ~(difference <= allowed)
    if bool(wrong.any()):
        raise AssertionError(_worst(what, dtype, found, expected, allowed, wrong))


def _worst(
    what: str,
    dtype: torch.dtype,
    found: torch.Tensor,
    expected: torch.Tensor,
    allowed: torch.Tensor,
    wrong: torch.Tensor,
) -> str:
    excess = ((found - expected).abs() / allowed).nan_to_num(nan=torch.inf).masked_fill(~wrong, -1)
    place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    return (
        f"{what} ({dtype}): {int(wrong.sum())} of {wrong.numel()} elements are off, the worst at {place}: found "
        f"{found[place].item():.9g}, expected {expected[place].item():.9g}, allowed difference {allowed[place].item():.3g}"
    )
