"""Chooses few calls among all combinations of values, so that each pair of values meets in at least one of them.

Greedy, row by row, as in Cohen, Dalal, Fredman and Patton, The AETG system: an approach to testing based on combinatorial
design, IEEE Transactions on Software Engineering 23 (1997); combinations that are not admitted are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from random import Random

Row = tuple[int, ...]
"""For each factor, which of its values."""
Pair = tuple[tuple[int, int], ...]
"""One or two (factor, value), by factor."""

CANDIDATES = 6
"""How many completions of a pair are compared."""
ATTEMPTS = 30
"""How many such completions of a pair are tried."""
COMPLETIONS = 300
"""How many of the plainest completions are tried after them, before a pair counts as refused."""


@dataclass(frozen=True)
class Covering:
    """The rows that were chosen.

    Attributes:
        rows: for each call, the index of the value of each factor.
        covered: how many pairs of values (single values, for strength 1) they contain.
        refused: the pairs for which no admitted row was found.
    """

    rows: tuple[Row, ...]
    covered: int
    refused: tuple[Pair, ...]


def cover(
    sizes: Sequence[int],
    admitted: Callable[[Row], bool],
    random: Random,
    *,
    strength: int = 2,
    plainest: Sequence[Row] | None = None,
    met: Collection[Pair] = (),
) -> Covering:
    """Choose rows in which every admitted pair of values meets.

    Args:
        sizes: how many values each factor has; value 0 of each is its plainest.
        admitted: whether a row may be chosen.
        random: where choices among equals come from.
        strength: 2 for pairs, 1 for single values.
        plainest: rows that are admitted, around which others are looked for; that of values 0 where not given.
        met: pairs (single values) that are covered without these rows.

    Example:
        >>> from random import Random
        >>> found = cover([2, 2, 2], lambda row: True, Random(0))
        >>> len(found.rows) < 8, found.covered
        (True, 12)
    """
    every = [pair for group in combinations(range(len(sizes)), strength) for pair in _pairs(group, sizes)]
    uncovered = {pair: None for pair in every if pair not in met}
    rows: list[Row] = []
    refused: list[Pair] = []
    for pair in every:
        if pair not in uncovered:
            continue
        row = _best_row(pair, plainest or [(0,) * len(sizes)], sizes, admitted, uncovered, random)
        if row is None:
            refused.append(pair)
            del uncovered[pair]
            continue
        rows.append(row)
        for contained in combinations(enumerate(row), strength):
            uncovered.pop(contained, None)
    return Covering(tuple(rows), len(every) - len(refused), tuple(refused))


def _pairs(group: tuple[int, ...], sizes: Sequence[int]) -> Iterable[Pair]:
    found: list[Pair] = [()]
    for factor in group:
        found = [(*pair, (factor, value)) for pair in found for value in range(sizes[factor])]
    return found


def _best_row(
    pair: Pair,
    plainest: Sequence[Row],
    sizes: Sequence[int],
    admitted: Callable[[Row], bool],
    uncovered: dict[Pair, None],
    random: Random,
) -> Row | None:
    found = []
    for _ in range(ATTEMPTS):
        row = _greedy(pair, sizes, uncovered, random)
        if admitted(row):
            found.append(row)
        if len(found) == CANDIDATES:
            break
    if not found:
        found = [row for base in plainest for row in _nearly_plain(pair, base, sizes, admitted)]
    strength = len(pair)
    return max(
        found, key=lambda row: sum(item in uncovered for item in combinations(enumerate(row), strength)), default=None
    )


def _greedy(pair: Pair, sizes: Sequence[int], uncovered: dict[Pair, None], random: Random) -> Row:
    """Complete a pair, factor by factor in random order, each time with a value that meets most others for the first time."""
    chosen = dict(pair)
    others = [factor for factor in range(len(sizes)) if factor not in chosen]
    random.shuffle(others)
    for factor in others:
        values = list(range(sizes[factor]))
        random.shuffle(values)
        gains = {value: _gain((factor, value), chosen, uncovered, len(pair)) for value in values}
        chosen[factor] = max(values, key=gains.__getitem__)
    return tuple(chosen[factor] for factor in range(len(sizes)))


def _gain(item: tuple[int, int], chosen: dict[int, int], uncovered: dict[Pair, None], strength: int) -> int:
    if strength == 1:
        return (item,) in uncovered
    return sum((min(other, item), max(other, item)) in uncovered for other in chosen.items())


def _nearly_plain(pair: Pair, base: Row, sizes: Sequence[int], admitted: Callable[[Row], bool]) -> list[Row]:
    """Complete a pair with a base's values, all of them, or all but as few as will do."""
    fixed = dict(pair)
    free = [factor for factor in range(len(sizes)) if factor not in fixed]
    others = [(factor, value) for factor in free for value in range(sizes[factor]) if value != base[factor]]
    several = chain.from_iterable(combinations(others, count) for count in range(len(free) + 1))
    distinct = (changes for changes in several if len(dict(changes)) == len(changes))
    for changes in islice(distinct, COMPLETIONS):
        chosen = {**dict(enumerate(base)), **dict(changes), **fixed}
        row = tuple(chosen[factor] for factor in range(len(sizes)))
        if admitted(row):
            return [row]
    return []
