"""From dense to sparse and back: which weights, what each becomes, the move between its forms, and the report of it."""

from .api import attach, densify, finalize, plan, sparsify, trainable
from .fuse import fuse, unfuse
from .permute import permute
from .recipe import Recipe
from .report import summary
from .tensor_parallel import parallelize_module

__all__ = [
    "Recipe",
    "attach",
    "densify",
    "finalize",
    "fuse",
    "parallelize_module",
    "permute",
    "plan",
    "sparsify",
    "summary",
    "trainable",
    "unfuse",
]
