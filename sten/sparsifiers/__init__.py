"""Sparsifiers: which entries live."""

from .drop_grow import DSTEE, SET, RigL, Static
from .gradual import Gradual, Rewind
from .masks import SRSTE, STE, DecayingMask, DecayingStructure
from .one_shot import Magnitude, Random
from .sparsifier import Edit, Sparsifier, State, View

__all__ = [
    "DSTEE", "SET", "SRSTE", "STE", "DecayingMask", "DecayingStructure", "Edit", "Gradual", "Magnitude", "Random", "Rewind",
    "RigL", "Sparsifier", "State", "Static", "View",
]  # fmt: skip
