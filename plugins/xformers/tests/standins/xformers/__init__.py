"""Stands in for xformers 0.0.35 on a CPU."""

__version__ = "0.0.35"
