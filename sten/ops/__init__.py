"""What operators do with a SparseTensor: each file fills the tables of `sten.tensor` and `sten.dispatch`."""

from . import (
    attention,
    attributes,
    collectives,
    conv,
    embedding,
    flops,
    fused,
    linear,
    others,
    padding,
    pointwise,
    pointwise_functions,
    recurrent,
    storage,
    views,
    which,
)

__all__ = [
    "attention", "attributes", "collectives", "conv", "embedding", "flops", "fused", "linear", "others", "padding",
    "pointwise", "pointwise_functions", "recurrent", "storage", "views", "which",
]  # fmt: skip
