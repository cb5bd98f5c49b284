"""Sparsifiers: which entries live."""

from .blocks import BlockPruneGrow
from .cast import CAST
from .drop_grow import DSTEE, SET, RigL, Static
from .gradual import Gradual, Rewind
from .masks import SRSTE, STE, DecayingMask, DecayingStructure
from .one_shot import Magnitude, Random
from .sparse_momentum import SparseMomentum
from .sparsifier import Edit, Sparsifier, State, View
from .srigl import SRigL
from .two_way import BDWP, BiMask, Transposable, TwoFaced

__all__ = [
    "BDWP", "CAST", "DSTEE", "SET", "SRSTE", "STE", "BiMask", "BlockPruneGrow", "DecayingMask", "DecayingStructure",
    "Edit", "Gradual", "Magnitude", "Random", "Rewind", "RigL", "SRigL", "SparseMomentum", "Sparsifier", "State",
    "Static", "Transposable", "TwoFaced", "View",
]  # fmt: skip
