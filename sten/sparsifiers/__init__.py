"""Sparsifiers: which entries live."""

from .one_shot import Magnitude, Random
from .sparsifier import Edit, Sparsifier, View

__all__ = ["Edit", "Magnitude", "Random", "Sparsifier", "View"]
