"""Sparsifiers: which entries of a weight are active, and when that changes."""

from .activation import ActivationMethod
from .activations import MVUE24, BatchTopK, RandomFraction, Threshold, TopK
from .bidirectional import BDWP, BiMask, Transposable
from .block_prune_grow import BlockPruneGrow
from .cast import CAST
from .chain import chain
from .decaying import DecayingMask, DecayingStructure
from .drop_grow import DSTEE, SET, RigL, Static
from .dsnot import DSnoT
from .gradual import Gradual, Rewind
from .jump_relu import JumpReLU
from .one_shot import Magnitude, Random
from .sparse_gpt import SparseGPT
from .sparse_momentum import SparseMomentum
from .sparse_swaps import SparseSwaps
from .sparsifier import DenseWeightMethod, Edit, PatternMethod, Sparsifier, State, View, check_needs
from .srigl import SRigL
from .straight_through import SRSTE, STE
from .wanda import Wanda
from .weight_update import ADMM, LeastSquares

__all__ = [
    "ADMM", "BDWP", "CAST", "DSTEE", "MVUE24", "SET", "SRSTE", "STE", "ActivationMethod", "BatchTopK", "BiMask",
    "BlockPruneGrow", "DSnoT", "DecayingMask", "DecayingStructure", "DenseWeightMethod", "Edit", "Gradual", "JumpReLU",
    "LeastSquares", "Magnitude", "PatternMethod", "Random", "RandomFraction", "Rewind", "RigL", "SRigL", "SparseGPT",
    "SparseMomentum", "SparseSwaps", "Sparsifier", "State", "Static", "Threshold", "TopK", "Transposable", "View",
    "Wanda", "chain", "check_needs",
]  # fmt: skip
