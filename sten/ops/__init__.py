"""What operators do with a SparseTensor: each file fills the tables of `sten.tensor` and `sten.dispatch`."""

from . import attention, attributes, conv, embedding, linear, pattern, pointwise, recurrent, structure, which

__all__ = [
    "attention", "attributes", "conv", "embedding", "linear", "pattern", "pointwise", "recurrent", "structure", "which",
]  # fmt: skip
