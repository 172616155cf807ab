"""What other versions of torch lack, for the tests that meet it."""

from __future__ import annotations

import pytest
import torch

from attn_core import selection

FOLLOWS_SCOPES = selection.guarded_choice is not None
follows_scopes = pytest.mark.skipif(
    not FOLLOWS_SCOPES, reason="before torch 2.11 compiled code refuses a scope that is open around it"
)
TAKES_TANGENTS = torch.__version__ < (2, 14)
"""Whether code compiled as one graph takes inputs with tangents; torch 2.14 refuses them itself, whatever the backend."""
knows_hooks = pytest.mark.skipif(
    not selection._hooks_known,
    reason="before torch 2.8 nobody can ask for saved-tensor hooks: recomputation is refused",
)


def told(text, fullgraph=True):
    """A pattern for a refusal in compiled code, of which torch 2.7 to 2.9 tell the type only where it is one graph."""
    hidden = fullgraph and (2, 7) <= torch.__version__ < (2, 10)
    return rf"{text}|raised exception UserDefined\w+\((BackendNotUsable|CallRefused)\)" if hidden else text
