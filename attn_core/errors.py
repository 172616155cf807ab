"""The errors people meet. Each message says who refused, what, the value found, the values accepted and what to do next."""

from __future__ import annotations


class AttnError(Exception):
    """Every error that attn raises on purpose is one of these."""


class BackendNotUsable(AttnError):
    """A backend that was asked for is unknown, missing, broken, disabled, or cannot run on this machine."""


class CallRefused(AttnError):
    """The call makes no sense, or no backend that it allows can compute exactly what it asks for."""
