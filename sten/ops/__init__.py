"""What operators do with a SparseTensor: each file fills the tables of `sten.tensor` and `sten.dispatch`."""

from . import attention, attributes, conv, embedding, linear, pattern, pointwise, recurrent, route, structure

__all__ = [
    "attention", "attributes", "conv", "embedding", "linear", "pattern", "pointwise", "recurrent", "route", "structure",
]  # fmt: skip
