"""What operators do with a SparseTensor: each file fills the tables of `sten.tensor` and `sten.dispatch`."""

from . import attention, conv, embedding, linear, pointwise, recurrent, route, structure

__all__ = ["attention", "conv", "embedding", "linear", "pointwise", "recurrent", "route", "structure"]
