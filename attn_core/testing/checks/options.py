"""Each option means what the table says it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_core.testing.checking import check, declared

if TYPE_CHECKING:
    from attn_core.testing.subject import Subject

AROUND = ("heads", "return_lse", "gradients")
"""What varies beside the option that is looked at."""

DIAGONALS = tuple(
    {"queries": queries, "keys": keys}
    for queries, keys in (
        (16, None), (5, 17), (33, 5), (1, 70), (70, 1), (130, None), (7, 130), (67, 129),
        (300, None), (9, 530), (140, 400), (400, 140), (1, 1030),
    )
)  # fmt: skip
"""Lengths on both sides of one another, within a block of a kernel and across several."""
ACROSS = (DIAGONALS[0], *DIAGONALS[-5:])
"""Lengths of one block, and of several."""
WIDE = ((32, 8), (64, 8), (16, 1))
"""Heads of models: many, and many to a key head."""
WINDOWS = ((3, 0), (2, 1), (0, 0), (-1, 2), (5, -1), (1, 4), (40, 40), (100, 0), (260, 130), (-1, 200), (300, -1))


@check("results", cheap=True)
def results(subject: Subject) -> str:
    """Plain calls of every dtype are what the reference says."""
    return subject.hold(subject.draw(9, "lengths", "batch", *AROUND, each=subject.factors["dtype"]))


@check("scale")
def scale(subject: Subject) -> str:
    """The scale is the one given: none, 0, negative ones and numpy's numbers too."""
    scales = (0.3, 2, 0, -0.5, None, 0.05, 1.0)
    each = [{**lengths, "scale": value} for value in scales for lengths in ACROSS[:3]]
    return subject.hold(subject.draw(21, "dtype", "causal", *AROUND, each=each))


@check("causal", when=declared("causal"))
def causal(subject: Subject) -> str:
    """Causal is aligned bottom-right, with as many, fewer and more queries than keys."""
    each = [{**lengths, "causal": True} for lengths in DIAGONALS]
    cases = subject.draw(16, "dtype", *AROUND, each=each)
    return subject.hold(subject.require(cases, "causal"))


@check("window_size", when=declared("window_size"))
def window_size(subject: Subject) -> str:
    """The window has as many keys on each side of the diagonal as it says."""
    each = [{**lengths, "window_size": window} for lengths in DIAGONALS for window in WINDOWS]
    cases = subject.draw(28, "causal", *AROUND, each=subject.random("windows").sample(each, len(each)))
    return subject.hold(subject.require(cases, "window_size"))


@check("softcap", when=declared("softcap"))
def softcap(subject: Subject) -> str:
    """Scores are capped before they are masked."""
    caps = [{"softcap": cap, "amplitude": size} for cap in (2.0, 30, 0.5) for size in (1.0, 4.0)]
    each = [{**lengths, **cap} for cap in caps for lengths in ACROSS]
    cases = subject.draw(36, "mask", "causal", "scale", "dtype", *AROUND, each=each)
    return subject.hold(subject.require(cases, "softcap"))


@check("gqa", when=declared("gqa"))
def gqa(subject: Subject) -> str:
    """Query head h reads key head h // (Hq / Hkv)."""
    pairs = ((4, 2), (6, 2), (4, 1), (6, 3), (8, 2), (8, 1))
    each = [{**lengths, "heads": heads} for heads in pairs for lengths in ACROSS]
    wide = [
        {**lengths, "heads": heads, "batch": 1} for heads in WIDE for lengths in (ACROSS[0], {"queries": 1, "keys": 70})
    ]
    each += subject.admitted(wide)
    cases = subject.draw(len(each), "mask", "causal", "dtype", "return_lse", "gradients", each=each)
    return subject.hold(subject.require(cases, "gqa"))


@check("cross_lengths", when=declared("cross_lengths"))
def cross_lengths(subject: Subject) -> str:
    """Queries and keys may be of different numbers."""
    cases = subject.draw(12, "mask", "dtype", *AROUND, each=[item for item in DIAGONALS if item["keys"]])
    return subject.hold(subject.require(cases, "cross_lengths"))


@check("value_head_dim", when=declared("value_head_dim"))
def value_head_dim(subject: Subject) -> str:
    """Values may have another head dim than queries and keys."""
    each = [item for item in subject.many_dims if item["value_dim"] is not None]
    cases = subject.draw(8, "lengths", "dtype", "causal", *AROUND, each=each) if each else []
    return subject.hold(subject.require(cases, "value_head_dim"))


@check("head_dims")
def head_dims(subject: Subject) -> str:
    """Each head dim that is declared; of a long range, those of many divisors, the ends, and a few others."""
    each = [item for item in subject.many_dims if item["value_dim"] is None]
    return subject.hold(subject.draw(12, "lengths", "dtype", *AROUND, each=each or subject.factors["dims"]))


@check("lse", when=declared("lse"))
def lse(subject: Subject) -> str:
    """The log-sum-exp is natural, (B, Hq, Sq), of the scaled, capped, masked scores, and detached."""
    each = [{"return_lse": True, **lengths} for lengths in DIAGONALS]
    varied = ("mask", "causal", "scale", "softcap", "window_size", "heads", "dtype", "batch", "gradients")
    cases = subject.draw(24, *varied, each=each, where=lambda case: case.return_lse)
    return subject.hold(subject.require(cases, "lse"))


@check("deterministic", when=declared("deterministic"))
def deterministic(subject: Subject) -> str:
    """The same bits twice, forward and backward."""
    each: list[dict[str, Any]] = [{"queries": length, "batch": 2} for length in ((64,) if subject.quick else (300, 64))]
    if not subject.quick:  # long enough to be split among blocks, whose parts are added up
        each += subject.admitted([{"queries": 1, "keys": 4500, "batch": 1, "causal": False}])
        many = {"batch": 1, "causal": False, "gradients": ("query", "key", "value")}
        each += subject.admitted([{**many, "queries": 1100, "keys": 33}, {**many, "queries": 600}])[:1]
    each = [{**item, "deterministic": True} for item in each]
    cases = subject.draw(12, "dtype", "heads", "causal", "gradients", "return_lse", each=each)
    return subject.hold(case for case in subject.require(cases, "deterministic") for _ in range(2))


@check("autocast")
def autocast(subject: Subject) -> str:
    """Under autocast tensors and float masks are cast first, and the result has autocast's dtype."""
    each = [{"autocast": dtype, "dtype": "float32"} for dtype in ("bfloat16", "float16")]
    cases = subject.draw(8, "mask", "causal", *AROUND, each=each)
    return subject.hold(cases) if cases else "no dtype of autocast is declared"


@check("modes")
def modes(subject: Subject) -> str:
    """Under no_grad and in inference mode, also of tensors that require gradients."""
    each = [
        {"mode": mode, "gradients": names} for mode in ("no_grad", "inference") for names in ((), ("query", "value"))
    ]
    return subject.hold(subject.draw(6, "mask", "causal", "heads", "return_lse", each=each))
