"""The trainable forms of a sparse weight."""

from .pattern import SparseWeight

__all__ = ["SparseWeight"]
