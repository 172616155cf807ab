"""Other lengths for a call that a kernel refuses when run: lengths are not among the facts that a declaration speaks of."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attn_core.testing.drawing import Case

BLOCKS = (64, 128)
"""What kernels want lengths to be multiples of."""


def other_lengths(case: Case) -> Iterator[Case]:
    """The call at lengths that are multiples of a block, and of one query, as where a kernel serves decoding alone.

    >>> from attn_core.testing import Case
    >>> list(other_lengths(Case(queries=5, keys=70)))[:2]
    [Case(queries=64, keys=128), Case(queries=1, keys=70)]
    """
    keys = case.queries if case.keys is None else case.keys
    first = BLOCKS[0]
    lengths = [(_up(case.queries, first), _up(keys, first)), (1, keys), (1, _up(keys, first))]
    lengths += [
        pair for block in BLOCKS[1:] for pair in ((_up(case.queries, block), _up(keys, block)), (1, _up(keys, block)))
    ]
    for queries, others in lengths:
        same = case.keys is None and queries == others
        changed = replace(case, queries=queries, keys=None if same else others)
        if changed != case:
            yield changed


def _up(length: int, block: int) -> int:
    return -(-length // block) * block
