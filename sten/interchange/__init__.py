"""Weights and masks of other libraries: what comes in is checked, so that no kernel sees an index out of range."""

from .bitmask import from_compressed_tensors, to_compressed_tensors
from .masks import load_masks, save_masks
from .scipy_sparse import from_scipy, to_scipy
from .torch_sparse import from_torch, to_torch

__all__ = [
    "from_compressed_tensors", "from_scipy", "from_torch", "load_masks", "save_masks", "to_compressed_tensors",
    "to_scipy", "to_torch",
]  # fmt: skip
