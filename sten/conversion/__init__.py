"""From dense to sparse and back: which weights, what each becomes, the move between its forms, and the report of it."""

from .api import attach, densify, finalize, plan, sparsify, trainable
from .fuse import fuse, unfuse
from .permute import permute
from .recipe import Recipe
from .report import summary
from .sensitivity import Sensitivity, sensitivity
from .sparse_op import sparse_op
from .tensor_parallel import parallelize_module

__all__ = [
    "Recipe",
    "Sensitivity",
    "attach",
    "densify",
    "finalize",
    "fuse",
    "parallelize_module",
    "permute",
    "plan",
    "sensitivity",
    "sparse_op",
    "sparsify",
    "summary",
    "trainable",
    "unfuse",
]
