"""Kernels of DualMask: dense products with the mask of each direction; the gradient of the values is dense."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from ..dispatch import kernel
from ..layouts import DualMask

CONV_INPUT = {3: conv_grad.conv1d_input, 4: conv_grad.conv2d_input, 5: conv_grad.conv3d_input}
CONV_WEIGHT = {3: conv_grad.conv1d_weight, 4: conv_grad.conv2d_weight, 5: conv_grad.conv3d_weight}


def linear(x: Tensor, weight: dict[str, Tensor], bias: Tensor | None, *, layout: DualMask, shape) -> Tensor:
    """Dense product with the forward mask."""
    return F.linear(x, layout.unpack(weight, shape), bias)


def linear_grad_input(grad: Tensor, weight: dict[str, Tensor], *, layout: DualMask, shape) -> Tensor:
    """Dense product with the backward mask."""
    return grad @ layout.unpack_backward(weight)


def linear_grad_weight(grad: Tensor, x: Tensor, weight: dict[str, Tensor], *, layout: DualMask, shape) -> Tensor:
    """The dense gradient."""
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def conv2d_grad_input(grad, weight, *, layout: DualMask, shape, size, stride, padding, dilation, groups) -> Tensor:
    """Dense transposed convolution with the backward mask."""
    dense = layout.unpack_backward(weight)
    return CONV_INPUT[len(shape)](size, dense, grad, stride, padding, dilation, groups)


def conv2d_grad_weight(grad, x, weight, *, layout: DualMask, shape, stride, padding, dilation, groups) -> Tensor:
    """The dense gradient."""
    return CONV_WEIGHT[len(shape)](x, shape, grad, stride, padding, dilation, groups)


for _function in (linear, linear_grad_input, linear_grad_weight, conv2d_grad_input, conv2d_grad_weight):
    kernel(_function.__name__, weight=DualMask, device="any")(_function)
