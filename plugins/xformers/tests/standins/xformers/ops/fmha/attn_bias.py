"""The bias classes that the adapter uses, with their fields, checks and meanings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass
class _SeqLenInfo:
    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list

    def intervals(self):
        yield from pairwise(self.seqstart_py)


class AttentionBias:
    pass


class LowerTriangularMask(AttentionBias):
    """Top-left."""


class LowerTriangularFromBottomRightMask(AttentionBias):
    pass


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    _window_size: int

    def __post_init__(self):
        if self._window_size <= 0:
            raise ValueError


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    window_left: int
    window_right: int

    def __post_init__(self):
        if self.window_left < 0 or self.window_right < 0:
            raise ValueError


@dataclass
class BlockDiagonalMask(AttentionBias):
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: object = None


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def __post_init__(self):
        for (q_start, q_end), (k_start, k_end) in zip(
            self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True
        ):
            if k_end - k_start < q_end - q_start:
                raise ValueError


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    _window_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self._window_size <= 0:
            raise ValueError
