"""Kernels that refuse lengths when they are run, since lengths are no facts that a declaration could speak of."""

from attn_core.errors import CallRefused
from attn_example import adapter


def in_blocks(query, key, value, **options):
    """Serves multiples of 64 alone."""
    if query.shape[1] % 64 or key.shape[1] % 64:
        msg = "lengths have to be multiples of 64"
        raise CallRefused(msg)
    return adapter.forward(query, key, value, **options)


def decoding(query, key, value, **options):
    """Serves one query alone."""
    if query.shape[1] != 1:
        msg = "it is for decoding, one query at a time"
        raise CallRefused(msg)
    return adapter.forward(query, key, value, **options)


def softcap_beside_causal(query, key, value, *, softcap=None, causal=False, **options):
    """Refuses when run what its declaration, which has the facts, admits."""
    if softcap is not None and causal:
        msg = "softcap and causal exclude one another"
        raise CallRefused(msg)
    return adapter.forward(query, key, value, softcap=softcap, causal=causal, **options)
