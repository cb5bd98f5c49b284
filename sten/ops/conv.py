"""conv2d (and conv1d, conv3d) with a sparse weight.

y = conv(x, w) is linear in x and in w, so its gradients are two more bilinear operators, and the three are each other's
derivatives: all orders of gradients follow, as in linear.py.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_input, conv1d_weight, conv2d_input, conv2d_weight, conv3d_input, conv3d_weight

from .._torch_private import autocast_somewhere
from ..dispatch import operator, planned
from ..rule import Rule, save_operands, saved_operands
from ..tensor import SparseTensor, function
from .linear import autocast, bias_row
from .padding import gradient
from .traceable import traceable

FORWARD = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
INPUT = {3: conv1d_input, 4: conv2d_input, 5: conv3d_input}
WEIGHT = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}
GEOMETRY = ("stride", "padding", "dilation", "groups")

SCHEMA = "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"


def positions(shape: tuple[int, ...]) -> int:
    """Pixels of a batch of images (N, channels, *size): the work of a convolution with stride 1."""
    return math.prod(shape) // max(shape[1], 1)


@operator("conv2d", tokens=positions)
def conv2d_reference(x, weight, bias, *, layout, shape, stride, padding, dilation, groups):
    return FORWARD[len(shape)](x, layout.unpack(weight, shape), bias, stride, padding, dilation, groups)


@operator("conv2d_grad_input", tokens=positions)
def conv2d_grad_input_reference(grad, weight, *, layout, shape, size, stride, padding, dilation, groups):
    return INPUT[len(shape)](size, layout.unpack(weight, shape), grad, stride, padding, dilation, groups)


def dense_grad_weight(grad, x, shape, stride, padding, dilation, groups):
    return WEIGHT[len(shape)](x, shape, grad, stride, padding, dilation, groups)


@operator("conv2d_grad_weight", tokens=positions)
def conv2d_grad_weight_reference(grad, x, weight, *, layout, shape, **geometry):
    return layout.pack_like(dense_grad_weight(grad, x, shape, **geometry), weight)


def named_geometry(stride, padding, dilation, groups) -> dict:
    """The geometry as keywords of a kernel; tuples, as part of the signature."""
    return {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation), "groups": groups}


def compute_conv(x, w, bias, stride, padding, dilation, groups, intercepted):
    geometry, parts = named_geometry(stride, padding, dilation, groups), w.parts
    return planned("conv2d", w, (x, parts, bias), geometry, intercepted).run(x, parts, bias, **geometry)


def compute_grad_input(grad, w, size, stride, padding, dilation, groups, intercepted):
    geometry, parts = {**named_geometry(stride, padding, dilation, groups), "size": tuple(size)}, w.parts
    return planned("conv2d_grad_input", w, (grad, parts), geometry, intercepted).run(grad, parts, **geometry)


def compute_grad_weight(grad, x, w, stride, padding, dilation, groups, intercepted):
    geometry = named_geometry(stride, padding, dilation, groups)
    return gradient("conv2d_grad_weight", dense_grad_weight, w, (grad, x), geometry, intercepted)


@traceable(f"sparse_conv(Tensor input, Tensor weight, Tensor? bias, {SCHEMA}")
class Conv(Rule):
    """y = conv(x, w) + bias."""

    weight_position = 1
    compute = staticmethod(compute_conv)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, bias, *ctx.geometry = inputs
        save_operands(ctx, inputs, output)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, grad):
        x, w = saved_operands(ctx)
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        return (
            ConvGradInput.call(grad, w, x.shape, *ctx.geometry) if needs_x else None,
            ConvGradWeight.call(grad, x, w, *ctx.geometry) if needs_w else None,
            grad.sum([d for d in range(grad.dim()) if d != 1]) if ctx.has_bias and needs_bias else None,
            *[None] * 4,
        )

    @staticmethod
    def vmap(info, in_dims, x, w, bias, *geometry):
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:3]):
            raise NotImplementedError("Expected torch.vmap over the input only, got a batch of weights or biases.")
        x = x.movedim(in_dims[0], 0)
        return Conv.call(x.flatten(0, 1), w, bias, *geometry).unflatten(0, x.shape[:2]), 0


@traceable(f"sparse_conv_grad_input(Tensor grad, Tensor weight, SymInt[] size, {SCHEMA}")
class ConvGradInput(Rule):
    """The transposed convolution of `grad` by w, of shape `size`."""

    weight_position = 1
    compute = staticmethod(compute_grad_input)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, _, *ctx.geometry = inputs
        save_operands(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_input):
        grad, w = saved_operands(ctx)
        return (
            Conv.call(grad_input, w, None, *ctx.geometry) if ctx.needs_input_grad[0] else None,
            ConvGradWeight.call(grad, grad_input, w, *ctx.geometry) if ctx.needs_input_grad[1] else None,
            *[None] * 5,
        )

    @staticmethod
    def vmap(info, in_dims, grad, w, size, *geometry):
        if in_dims[0] is None or in_dims[1] is not None:
            raise NotImplementedError("Expected torch.vmap over the input only, got a batch of sparse weights.")
        grad = grad.movedim(in_dims[0], 0)
        whole = (grad.shape[0] * size[0], *size[1:])
        out = ConvGradInput.call(grad.flatten(0, 1), w, whole, *geometry)
        return out.unflatten(0, (grad.shape[0], size[0])), 0


@traceable(f"sparse_conv_grad_weight(Tensor grad, Tensor input, Tensor weight, {SCHEMA}")
class ConvGradWeight(Rule):
    """The gradient of w at its pattern; the values of `like` do not matter."""

    weight_position = 2
    compute = staticmethod(compute_grad_weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, x, _, *ctx.geometry = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx, grad_values):
        grad, x = ctx.saved_tensors
        return (
            Conv.call(x, grad_values, None, *ctx.geometry) if ctx.needs_input_grad[0] else None,
            ConvGradInput.call(grad, grad_values, x.shape, *ctx.geometry) if ctx.needs_input_grad[1] else None,
            *[None] * 5,
        )


@function(F.conv1d, F.conv2d, F.conv3d)
def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    """A convolution with a sparse weight; `padding` may be "same" or "valid"."""
    if isinstance(input, SparseTensor) or not isinstance(weight, SparseTensor):
        raise TypeError("Expected a dense input and a sparse weight, got a sparse input; call to_dense() on it.")
    dims = weight.dim() - 2
    if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"Expected an input with {weight.shape[1] * groups} channels and {dims} more dimensions for a weight of "
            f"shape {tuple(weight.shape)} with groups={groups}, got shape {tuple(input.shape)}."
        )
    if autocast_somewhere():
        input, weight, bias = autocast(input, weight, bias)
    if input.dtype != weight.dtype:
        got = f"input {input.dtype}, weight {weight.dtype}"
        raise RuntimeError(f"Expected operands of one dtype, got {got}; convert one or use autocast.")
    stride, dilation = _sizes(stride, dims), _sizes(dilation, dims)
    if isinstance(padding, str):
        input, padding = _pad(input, weight.shape[2:], stride, padding, dilation)
    geometry = stride, _sizes(padding, dims), dilation, groups
    if bias is not None:
        bias = bias_row(bias, weight.shape[0])
    if input.dim() == dims + 1:
        return Conv.call(input.unsqueeze(0), weight, bias, *geometry).squeeze(0)
    return Conv.call(input, weight, bias, *geometry)


def _sizes(sizes, dims: int) -> tuple[int, ...]:
    """One number for each dimension."""
    return tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,) * dims


def _pad(
    x: Tensor, kernel, stride: tuple[int, ...], padding: str, dilation: tuple[int, ...]
) -> tuple[Tensor, int | tuple]:
    """Replace "valid" and "same" by numbers; "same" may pad one more column on the right, as in torch."""
    if padding == "valid":
        return x, 0
    if padding != "same":
        raise ValueError(f"Expected a padding of numbers, 'same' or 'valid', got {padding!r}.")
    if any(s != 1 for s in stride):
        raise ValueError(f"Expected a stride of 1 for padding='same', got {stride}.")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    extra = [side for t in reversed(total) for side in (0, t % 2)]
    return (F.pad(x, extra) if any(extra) else x), tuple(t // 2 for t in total)
