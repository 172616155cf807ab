from . import fmha

__all__ = ["fmha"]
