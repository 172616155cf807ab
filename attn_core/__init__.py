"""One call to attention, on whichever kernel is installed, with the same meaning on each of them.

The names below are imported when first asked for, so that ``import attn_core`` does not import torch.

Example:
    >>> import torch
    >>> from attn_core import attention
    >>> q = torch.randn(2, 128, 8, 64)
    >>> attention(q, q, q, causal=True).shape
    torch.Size([2, 128, 8, 64])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_core.binding import bind
    from attn_core.call import attention, plan
    from attn_core.errors import AttnError, BackendNotUsable, CallRefused
    from attn_core.explanation import explain
    from attn_core.masks import KeyPadding, Packed
    from attn_core.registry import list_backends
    from attn_core.selection import set_backend, use_backend

    __version__: str

__all__ = [
    "AttnError",
    "BackendNotUsable",
    "CallRefused",
    "KeyPadding",
    "Packed",
    "__version__",
    "attention",
    "bind",
    "explain",
    "list_backends",
    "plan",
    "set_backend",
    "use_backend",
]

_HOMES = {
    "AttnError": "errors",
    "BackendNotUsable": "errors",
    "CallRefused": "errors",
    "KeyPadding": "masks",
    "Packed": "masks",
    "attention": "call",
    "bind": "binding",
    "explain": "explanation",
    "list_backends": "registry",
    "plan": "call",
    "set_backend": "selection",
    "use_backend": "selection",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        found: object = version("attn-core")
    elif name in _HOMES:
        from importlib import import_module

        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
