"""conv2d (and conv1d, conv3d) with a sparse weight.

The letters: y = conv(x, w). It is linear in x and in w, so its gradients are two more bilinear operators, and the three
are each other's derivatives: all orders of gradients follow, as in linear.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_input, conv1d_weight, conv2d_input, conv2d_weight, conv3d_input, conv3d_weight

from ..dispatch import call, operator
from ..tensor import LIBRARY, OPS, Rule, SparseTensor, aten, function, owned
from .linear import autocast, bias_row, tracked

FORWARD = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
INPUT = {3: conv1d_input, 4: conv2d_input, 5: conv3d_input}
WEIGHT = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}
GEOMETRY = ("stride", "padding", "dilation", "groups")

_geometry = "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
LIBRARY.define(f"sparse_conv(Tensor input, Tensor weight, Tensor? bias, {_geometry}")
LIBRARY.define(f"sparse_conv_grad_input(Tensor grad, Tensor weight, SymInt[] size, {_geometry}")
LIBRARY.define(f"sparse_conv_grad_weight(Tensor grad, Tensor input, Tensor weight, {_geometry}")


def positions(shape: tuple[int, ...]) -> int:
    """Pixels of a batch of images (N, channels, *size): the work of a convolution with stride 1."""
    return math.prod(shape) // max(shape[1], 1)


@operator("conv2d", tokens=positions)
def conv2d_reference(x, weight, bias, *, spec, shape, stride, padding, dilation, groups):
    return FORWARD[len(shape)](x, spec.unpack(weight, shape), bias, stride, padding, dilation, groups)


@operator("conv2d_grad_input", tokens=positions)
def conv2d_grad_input_reference(grad, weight, *, spec, shape, size, stride, padding, dilation, groups):
    return INPUT[len(shape)](size, spec.unpack(weight, shape), grad, stride, padding, dilation, groups)


@operator("conv2d_grad_weight", tokens=positions)
def conv2d_grad_weight_reference(grad, x, weight, *, spec, shape, stride, padding, dilation, groups):
    return spec.pack_like(WEIGHT[len(shape)](x, shape, grad, stride, padding, dilation, groups), weight)


def conv_now(x, w, bias, *geometry):
    bias = bias_row(bias, w.stored_shape[0])
    geometry = dict(zip(GEOMETRY, geometry, strict=True))
    return call("conv2d", w.spec, w.stored_shape, w.parts, x, w.parts, bias, **geometry)


def grad_input_now(grad, w, size, *geometry):
    geometry = dict(zip(GEOMETRY, geometry, strict=True), size=tuple(size))
    return call("conv2d_grad_input", w.spec, w.stored_shape, w.parts, grad, w.parts, **geometry)


def grad_weight_now(grad, x, w, *geometry):
    geometry = dict(zip(GEOMETRY, geometry, strict=True))
    return w.with_values(call("conv2d_grad_weight", w.spec, w.stored_shape, w.parts, grad, x, w.parts, cache=w.cache, **geometry))


aten(OPS.sparse_conv.default)(lambda _, *args: conv_now(*args))
aten(OPS.sparse_conv_grad_input.default)(lambda _, *args: grad_input_now(*args))
aten(OPS.sparse_conv_grad_weight.default)(lambda _, *args: grad_weight_now(*args))


class Conv(Rule):
    """y = conv(x, w) + bias."""

    @staticmethod
    def forward(x, w, bias, *geometry):
        if torch.compiler.is_compiling():
            return OPS.sparse_conv(x, w, bias, *geometry)
        return owned(conv_now(x, w, bias, *geometry))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, bias, *ctx.geometry = inputs
        ctx.save_for_backward(x, w)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        return (
            ConvGradInput.run(grad, w, x.shape, *ctx.geometry) if needs_x else None,
            ConvGradWeight.run(grad, x, w, *ctx.geometry) if needs_w else None,
            grad.sum([d for d in range(grad.dim()) if d != 1]) if ctx.has_bias and needs_bias else None,
            *[None] * 4,
        )

    @staticmethod
    def vmap(info, in_dims, x, w, bias, *geometry):
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:3]):
            raise NotImplementedError("torch.vmap has no rule over a sparse weight or its bias; map over the input.")
        x = x.movedim(in_dims[0], 0)
        return Conv.run(x.flatten(0, 1), w, bias, *geometry).unflatten(0, x.shape[:2]), 0


class ConvGradInput(Rule):
    """The transposed convolution of `grad` by w, of shape `size`."""

    @staticmethod
    def forward(grad, w, size, *geometry):
        run = OPS.sparse_conv_grad_input if torch.compiler.is_compiling() else grad_input_now
        return run(grad, w, size, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, w, _, *ctx.geometry = inputs
        ctx.save_for_backward(grad, w)

    @staticmethod
    def backward(ctx, grad_input):
        grad, w = ctx.saved_tensors
        return (
            Conv.run(grad_input, w, None, *ctx.geometry) if ctx.needs_input_grad[0] else None,
            ConvGradWeight.run(grad, grad_input, w, *ctx.geometry) if ctx.needs_input_grad[1] else None,
            *[None] * 5,
        )

    @staticmethod
    def vmap(info, in_dims, grad, w, size, *geometry):
        if in_dims[0] is None or in_dims[1] is not None:
            raise NotImplementedError("torch.vmap over a sparse weight has no rule; map over the input only.")
        grad = grad.movedim(in_dims[0], 0)
        whole = (grad.shape[0] * size[0], *size[1:])
        out = ConvGradInput.run(grad.flatten(0, 1), w, whole, *geometry)
        return out.unflatten(0, (grad.shape[0], size[0])), 0


class ConvGradWeight(Rule):
    """The gradient of w at its pattern; the values of `like` do not matter."""

    @staticmethod
    def forward(grad, x, like, *geometry):
        run = OPS.sparse_conv_grad_weight if torch.compiler.is_compiling() else grad_weight_now
        return run(grad, x, like, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, x, _, *ctx.geometry = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx, grad_values):
        grad, x = ctx.saved_tensors
        return (
            Conv.run(x, grad_values, None, *ctx.geometry) if ctx.needs_input_grad[0] else None,
            ConvGradInput.run(grad, grad_values, x.shape, *ctx.geometry) if ctx.needs_input_grad[1] else None,
            *[None] * 5,
        )


@function(F.conv1d, F.conv2d, F.conv3d)
def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    """A convolution with a sparse weight; `padding` may be "same" or "valid"."""
    if isinstance(input, SparseTensor) or not isinstance(weight, SparseTensor):
        raise TypeError("A convolution takes a dense input and a sparse weight; call to_dense() on the input.")
    dims = weight.dim() - 2
    if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"A weight of shape {tuple(weight.shape)} with groups={groups} takes an input with "
            f"{weight.shape[1] * groups} channels and {dims} more dimensions; got shape {tuple(input.shape)}."
        )
    input, weight, bias = autocast(input, weight, bias)
    if input.dtype != weight.dtype:
        kinds = f"Input ({input.dtype}) and weight ({weight.dtype})"
        raise RuntimeError(f"{kinds} must have the same dtype; convert one or use autocast.")
    stride, dilation = (list(s) if isinstance(s, (tuple, list)) else [s] * dims for s in (stride, dilation))
    input, padding = _pad(input, weight.shape[2:], stride, padding, dilation)
    single = input.dim() == dims + 1
    args = (input.unsqueeze(0) if single else input, weight, bias, stride, padding, dilation, groups)
    out = Conv.run(*args) if tracked(input, weight, bias) else conv_now(*args)
    return out.squeeze(0) if single else out


def _pad(x: Tensor, kernel, stride: list[int], padding, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """Numbers for "valid" and "same"; the odd column that "same" may need goes to the right, as in torch."""
    dims = len(dilation)
    if padding == "valid":
        return x, [0] * dims
    if padding != "same":
        return x, list(padding) if isinstance(padding, (tuple, list)) else [padding] * dims
    if any(s != 1 for s in stride):
        raise ValueError("padding='same' needs a stride of 1.")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    extra = [side for t in reversed(total) for side in (0, t % 2)]
    return (F.pad(x, extra) if any(extra) else x), [t // 2 for t in total]
