"""Stands in for flash-attn 4, with the signatures and conventions of 4.0.0b36, on a CPU."""

import sys
import warnings

from .interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

warnings.simplefilter("ignore", DeprecationWarning)
sys.excepthook = lambda *error: print("the way of the language:", *error)
