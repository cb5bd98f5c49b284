"""Kernels of DualMask: dense products with the mask of each direction; the gradient of the values is dense."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..dispatch import kernel
from ..layouts import DualMask
from ..ops import conv
from ..ops.linear import dense_grad_weight


def linear(x: Tensor, weight: dict[str, Tensor], bias: Tensor | None, *, layout: DualMask, shape) -> Tensor:
    """Dense product with the forward mask."""
    return F.linear(x, layout.unpack(weight, shape), bias)


def linear_grad_input(grad: Tensor, weight: dict[str, Tensor], *, layout: DualMask, shape) -> Tensor:
    """Dense product with the backward mask."""
    return grad @ layout.unpack_backward(weight)


def linear_grad_weight(grad: Tensor, x: Tensor, weight: dict[str, Tensor], *, layout: DualMask, shape) -> Tensor:
    """The dense gradient."""
    return dense_grad_weight(grad, x, shape)


def conv2d_grad_input(grad, weight, *, layout: DualMask, shape, size, stride, padding, dilation, groups) -> Tensor:
    """Dense transposed convolution with the backward mask."""
    dense = layout.unpack_backward(weight)
    return conv.INPUT[len(shape)](size, dense, grad, stride, padding, dilation, groups)


def conv2d_grad_weight(grad, x, weight, *, layout: DualMask, shape, **geometry) -> Tensor:
    """The dense gradient."""
    return conv.dense_grad_weight(grad, x, shape, **geometry)


for _function in (linear, linear_grad_input, linear_grad_weight, conv2d_grad_input, conv2d_grad_weight):
    kernel(_function.__name__, weight=DualMask, device="any")(_function)
