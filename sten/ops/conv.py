"""conv2d (and conv1d, conv3d) with a sparse weight, and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_input, conv1d_weight, conv2d_input, conv2d_weight, conv3d_input, conv3d_weight

from ..dispatch import call, operator
from ..tensor import LIBRARY, OPS, SparseTensor, aten, function
from .linear import autocast, needs_grad

FORWARD = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
INPUT = {3: conv1d_input, 4: conv2d_input, 5: conv3d_input}
WEIGHT = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}

LIBRARY.define(
    "sparse_conv(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
)
LIBRARY.define(
    "sparse_conv_grad_input(Tensor grad, Tensor weight, SymInt[] size, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor"
)
LIBRARY.define(
    "sparse_conv_grad_weight(Tensor grad, Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor"
)


@operator("conv2d")
def conv2d_reference(x, weight, bias, *, spec, shape, stride, padding, dilation, groups):
    return FORWARD[len(shape)](x, spec.unpack(weight, shape), bias, stride, padding, dilation, groups)


@operator("conv2d_grad_input")
def conv2d_grad_input_reference(grad, weight, *, spec, shape, size, stride, padding, dilation, groups):
    return INPUT[len(shape)](size, spec.unpack(weight, shape), grad, stride, padding, dilation, groups)


@operator("conv2d_grad_weight")
def conv2d_grad_weight_reference(grad, x, weight, *, spec, shape, stride, padding, dilation, groups):
    return spec.pack_like(WEIGHT[len(shape)](x, shape, grad, stride, padding, dilation, groups), weight)


GEOMETRY = ("stride", "padding", "dilation", "groups")


def _forward(x, w, bias, *geometry):
    geometry = dict(zip(GEOMETRY, geometry, strict=True))
    return call("conv2d", w.spec, w.stored_shape, w.parts, x, w.parts, bias, **geometry)


def _grad_input(grad, w, size, *geometry):
    geometry = dict(zip(GEOMETRY, geometry, strict=True), size=tuple(size))
    return call("conv2d_grad_input", w.spec, w.stored_shape, w.parts, grad, w.parts, **geometry)


def _grad_weight(grad, x, w, *geometry):
    geometry = dict(zip(GEOMETRY, geometry, strict=True))
    return w.with_values(call("conv2d_grad_weight", w.spec, w.stored_shape, w.parts, grad, x, w.parts, **geometry))


aten(OPS.sparse_conv.default)(lambda _, *args: _forward(*args))
aten(OPS.sparse_conv_grad_input.default)(lambda _, *args: _grad_input(*args))
aten(OPS.sparse_conv_grad_weight.default)(lambda _, *args: _grad_weight(*args))


class Conv(torch.autograd.Function):
    """A convolution; its gradients are those of torch.nn.grad, at the pattern."""

    @staticmethod
    def forward(x, w, bias, stride, padding, dilation, groups):
        run = OPS.sparse_conv if torch.compiler.is_compiling() else _forward
        return run(x, w, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, bias, *ctx.geometry = inputs
        ctx.save_for_backward(x, w)
        ctx.has_bias = bias is not None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        compiling = torch.compiler.is_compiling()
        grad_input, grad_weight = (
            (OPS.sparse_conv_grad_input, OPS.sparse_conv_grad_weight) if compiling else (_grad_input, _grad_weight)
        )
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        return (
            grad_input(grad, w, x.shape, *ctx.geometry) if needs_x else None,
            grad_weight(grad, x, w, *ctx.geometry) if needs_w else None,
            grad.sum([d for d in range(grad.dim()) if d != 1]) if ctx.has_bias and needs_bias else None,
            *[None] * 4,
        )


@function(F.conv1d, F.conv2d, F.conv3d)
def conv(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """A convolution with a sparse weight; `padding` may be "same" or "valid"."""
    if isinstance(input, SparseTensor):
        input = input.to_dense()
        if not isinstance(weight, SparseTensor):
            return FORWARD[weight.dim()](input, weight, bias, stride, padding, dilation, groups)
    input, weight, bias = autocast(input, weight, bias)
    if input.dtype != weight.dtype:
        raise RuntimeError(f"Input ({input.dtype}) and weight ({weight.dtype}) must have the same dtype; convert one or use autocast.")
    dims = weight.dim() - 2
    stride, dilation = (list(s) if isinstance(s, (tuple, list)) else [s] * dims for s in (stride, dilation))
    input, padding = _pad(input, weight.shape[2:], stride, padding, dilation)
    single = input.dim() == dims + 1
    args = (input.unsqueeze(0) if single else input, weight, bias, stride, padding, dilation, groups)
    tracked = torch.compiler.is_compiling() or needs_grad(input, weight, bias)
    out = Conv.apply(*args) if tracked else _forward(*args)
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
