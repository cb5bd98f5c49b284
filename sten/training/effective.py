"""EffectiveWeight: what `module.weight` reads as while a method trains a dense weight. It is computed at each use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch_private import must_apply, no_function
from ..read_only import ReadOnlyTensor
from ..tensor import SparseTensor

if TYPE_CHECKING:
    from .dense_weight import DenseWeight

# run as they are: the forward pass, whose results share no memory with the weight
PRODUCTS = frozenset((F.linear, F.conv1d, F.conv2d, F.conv3d, F.embedding, torch.addmm, torch.matmul))


class EffectiveWeight(ReadOnlyTensor):
    """A read-only tensor, differentiable, whose `.data =`, `.grad` and `requires_grad_` are those of the Parameter.

    Attributes:
        trained: the DenseWeight that it was computed from.
    """

    trained: DenseWeight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            with no_function():
                return func(*args, **(kwargs or {}))
        if func in OF_THE_PARAMETER and isinstance(args[0], cls):
            return OF_THE_PARAMETER[func](*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def effective(w: Tensor, weight: DenseWeight) -> Tensor:
    """Make what a method computed a tensor that refuses writes, which would be lost, and knows its Parameter.

    Under torch.compile, torch.func and for other subclasses it is returned as it is.
    """
    if must_apply() or type(w) not in (Tensor, SparseTensor):
        return w
    if type(w) is Tensor:
        w = w.as_subclass(EffectiveWeight)
    w.trained = weight
    w.instead = (
        f"what {type(weight.method).__name__} makes of the trained Parameter of {weight.name}; assign to the module's "
        f'attribute, or write to module._parameters["{weight.attribute}"]'
    )
    return w


def _set_data(w: EffectiveWeight, new: Tensor) -> None:
    w.trained.assign(w.trained.param, new)


def _get_grad(w: EffectiveWeight) -> Tensor | None:
    return w.trained.grad


def _set_grad(w: EffectiveWeight, grad: Tensor | None) -> None:
    w.trained.grad = grad


def _requires_grad_(w: EffectiveWeight, requires_grad: bool = True) -> EffectiveWeight:
    w.trained.param.requires_grad_(requires_grad)
    return w


def _hook(w: EffectiveWeight, hook) -> None:
    w.trained.refuse_hook()


OF_THE_PARAMETER = {
    Tensor.data.__set__: _set_data,
    Tensor.grad.__get__: _get_grad,
    Tensor.grad.__set__: _set_grad,
    Tensor.requires_grad_: _requires_grad_,
    Tensor.requires_grad.__set__: _requires_grad_,
    Tensor.register_hook: _hook,
    Tensor.register_post_accumulate_grad_hook: _hook,
}
