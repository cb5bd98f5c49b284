"""Finalized: the attribute of a layer whose weight is a SparseTensor Parameter, of which torch.compile sees the parts.

A SparseTensor that is an input of a compiled graph is taken apart at each call, by Python: about 10 us a weight, more
than a product of one token takes a GPU. Assembled inside the graph, from parts that are its inputs, it costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._torch_private import exports
from ..layouts.base import Layout
from ..tensor import SparseTensor


class Finalized:
    """The Parameter `name` of a module, as `nn.Module` would find it.

    While Dynamo traces a call that needs no gradient of the weight, it is the same SparseTensor, made of the parts.
    Not a property, so that an attribute of the instance, as `torch.nn.utils.prune` sets one, comes first.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None):
        if module is None:
            return self
        w = module._parameters.get(self.name)
        if w is None:
            raise AttributeError(self.name)  # then Python asks nn.Module.__getattr__, which has the words
        if (
            torch.compiler.is_dynamo_compiling()
            and isinstance(w, SparseTensor)
            and not exports()
            and not (w.requires_grad and torch.is_grad_enabled())
        ):
            names, (layout, shape, transposed) = w.flat
            return _assembled(layout, shape, transposed, names, *[getattr(w, name) for name in names])
        return w


@torch.compiler.allow_in_graph
def _assembled(
    layout: Layout, shape: tuple[int, ...], transposed: bool, names: tuple[str, ...], *parts: Tensor
) -> SparseTensor:
    return SparseTensor.__tensor_unflatten__(
        dict(zip(names, parts, strict=True)), (layout, shape, transposed), None, None
    )
