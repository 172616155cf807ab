"""The part of a mask of the whole sequence that one piece of the work needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_core.masks import KeyPadding
from attn_core.parallel.gathering import taken
from attn_core.parallel.layout import cut

if TYPE_CHECKING:
    import torch

    from attn_core.parallel.layout import Segments
    from attn_core.parallel.sight import Piece


def options_of(piece: Piece, mask: torch.Tensor | None, kind: str, keys: Segments) -> dict[str, Any]:
    """What hides keys in a piece, as an adapter takes it.

    Args:
        piece: of this rank's queries and a chunk of keys.
        mask: ``keep`` of key padding for all keys, or a dense mask for this rank's queries and all keys.
        kind: of the mask, as ``Facts`` has it.
        keys: the positions of the chunk.
    """
    found: dict[str, Any] = {"causal": True} if piece.causal else {}
    if piece.window is not None:
        found["window_size"] = piece.window
    if mask is None:
        return found
    columns = cut(keys, *piece.keys)
    if kind == "key_padding":
        return {**found, "attn_mask": KeyPadding(taken(mask, 1, columns))}
    if mask.shape[2] > 1:
        mask = mask.narrow(2, piece.queries.start, piece.queries.length)
    if mask.shape[3] > 1:
        mask = taken(mask, 3, columns)
    return {**found, "attn_mask": mask}
