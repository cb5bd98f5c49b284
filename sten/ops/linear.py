"""linear, matmul, mm and addmm with a sparse matrix, and their gradients.

Every product of a dense and a sparse matrix is one of two, as a SparseTensor has a flag `transposed`:

    linear             y = x @ W.T     W stored (out, in)
    linear_grad_input  y = x @ W       the gradient of the input of the former, and W stored (in, out)

and the gradient of the values is `linear_grad_weight`, the product g.T @ x sampled at the pattern. The three are each
other's derivatives, so all orders of gradients follow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import autocast_somewhere, is_intercepted, must_apply
from ..dispatch import find, operator, planned, run_both, warn_densified
from ..rule import Rule, save_operands, saved_operands
from ..tensor import SparseTensor, aten, function
from .others import on_dense_copies
from .padding import gradient
from .sparse_input import InputLinear, input_can_be_sparse, unpacked
from .traceable import traceable

# checks, once per signature


def _expect(w: SparseTensor, x: Tensor, size: int, bias: Tensor | None = None) -> None:
    if x.dim() == 0 or x.shape[-1] != size:
        got = f"got shape {tuple(x.shape)}"
        raise RuntimeError(f"Expected an input with {size} features for a weight of shape {tuple(w.shape)}, {got}.")
    if x.dtype != w.dtype or (bias is not None and bias.dtype != w.dtype):
        got = f"input {x.dtype}, weight {w.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise RuntimeError(f"Expected operands of one dtype, got {got}; convert one or use autocast.")


def _check_linear(w: SparseTensor, x: Tensor, weight: dict, bias: Tensor | None) -> None:
    outputs, inputs = w.stored_shape
    _expect(w, x, inputs, bias)
    if bias is not None:
        bias_row(bias, outputs)


def _check_product(w: SparseTensor, x: Tensor, weight: dict) -> None:
    _expect(w, x, w.stored_shape[0])


@operator("linear", sparse=("input", "weight"), check=_check_linear)
def linear_reference(input, weight, bias, *, layout, shape):
    return F.linear(*unpacked((input, weight), layout, shape), bias)


@operator("linear_grad_input", check=_check_product)
def linear_grad_input_reference(grad, weight, *, layout, shape):
    return grad @ layout.unpack(weight, shape)


def dense_grad_weight(grad, x, shape):
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


@operator("linear_grad_weight", sparse=("input", "weight"))
def linear_grad_weight_reference(grad, input, weight, *, layout, shape):
    if isinstance(layout, tuple):  # of a dense weight, which is an operand for its shape and strides
        return dense_grad_weight(grad, unpacked((input, weight), layout, shape)[0], shape[1])
    return layout.pack_like(dense_grad_weight(grad, input, shape), weight)


@operator("matmul", sparse=("input", "other"), required=("other",), check=_check_product, otherwise="linear_grad_input")
def matmul_reference(input, other, *, layout, shape):
    left, right = unpacked((input, other), layout, shape)
    return left @ right


# without autograd; `intercepted`: whether the call is


def bias_row(bias: Tensor | None, outputs: int, repeat: bool = False) -> Tensor | None:
    """The bias as kernels take it, contiguous (outputs,); with `repeat`, one element is expanded to all outputs."""
    if bias is None:
        return None
    if repeat and bias.dim() < 2 and bias.numel() == 1:
        bias = bias.expand(outputs)
    if bias.shape != (outputs,):
        raise RuntimeError(f"Expected a bias of shape ({outputs},), got {tuple(bias.shape)}.")
    return bias.contiguous()


def compute_linear(x: Tensor, w: SparseTensor, bias: Tensor | None, intercepted: bool) -> Tensor:
    """x @ w.T + bias."""
    if w.transposed:
        return _times(x, w, bias, intercepted)
    parts = w.parts
    return planned("linear", w, (x, parts, bias), None, intercepted).run(x, parts, bias)


def compute_matmul(x: Tensor, w: SparseTensor, bias: Tensor | None, intercepted: bool) -> Tensor:
    """x @ w + bias."""
    if not w.transposed:
        return _times(x, w, bias, intercepted)
    parts = w.parts
    return planned("linear", w, (x, parts, bias), None, intercepted).run(x, parts, bias)


def _times(x: Tensor, w: SparseTensor, bias: Tensor | None, intercepted: bool) -> Tensor:
    """x @ the stored matrix, by a kernel of matmul, or of linear_grad_input, which is the same product."""
    parts = w.parts
    y = planned("matmul", w, (x, parts), None, intercepted).run(x, parts)
    return y if bias is None else y + bias_row(bias, y.shape[-1])


def compute_grad_weight(grad: Tensor, x: Tensor, w: SparseTensor, intercepted: bool) -> SparseTensor:
    """The gradient of linear's weight, grad.T @ x, at the pattern of w."""
    if w.transposed:
        grad, x = x, grad
    return gradient("linear_grad_weight", dense_grad_weight, w, (grad, x), None, intercepted)


# with autograd


def over_batch(apply, info, in_dims, x, *rest):
    """vmap over the activations: one more leading dimension. There is no kernel for a batch of sparse weights."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        raise NotImplementedError("Expected torch.vmap over the input only, got a batch of sparse weights or biases.")
    return apply(x.movedim(in_dims[0], 0), *rest), 0


def _sum_rows(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def product_jvp(rule: type[Rule], ctx, tangents: tuple[Tensor | None, ...]) -> Tensor:
    """The tangent of a product with a bias; it is linear in each of its operands."""
    (x, w), (dx, dw, dbias) = ctx.saved_tensors, tangents
    terms = [rule.call(dx, w, None) if dx is not None else None, rule.call(x, dw, None) if dw is not None else None]
    return sum(term for term in (*terms, dbias) if term is not None)


@traceable("sparse_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
class Linear(Rule):
    """y = x @ w.T + bias."""

    weight_position = 1
    compute = staticmethod(compute_linear)

    setup_context = staticmethod(save_operands)

    @staticmethod
    def backward(ctx, grad):
        x, w = saved_operands(ctx)
        needs_x, needs_w, needs_bias = ctx.needs_input_grad
        return (
            Matmul.call(grad, w, None) if needs_x else None,
            GradWeight.call(grad, x, w) if needs_w else None,
            _sum_rows(grad) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx, *tangents):
        return product_jvp(Linear, ctx, tangents)

    @staticmethod
    def vmap(info, in_dims, x, w, bias):
        return over_batch(Linear.call, info, in_dims, x, w, bias)


@traceable("sparse_matmul(Tensor input, Tensor other, Tensor? bias) -> Tensor")
class Matmul(Rule):
    """y = x @ w + bias."""

    weight_position = 1
    compute = staticmethod(compute_matmul)

    setup_context = staticmethod(save_operands)

    @staticmethod
    def backward(ctx, grad):
        x, w = saved_operands(ctx)
        needs_x, needs_w, needs_bias = ctx.needs_input_grad
        return (
            Linear.call(grad, w, None) if needs_x else None,
            GradWeight.call(x, grad, w) if needs_w else None,
            _sum_rows(grad) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx, *tangents):
        return product_jvp(Matmul, ctx, tangents)

    @staticmethod
    def vmap(info, in_dims, x, w, bias):
        return over_batch(Matmul.call, info, in_dims, x, w, bias)


@traceable("sparse_grad_weight(Tensor grad, Tensor input, Tensor weight) -> Tensor")
class GradWeight(Rule):
    """g.T @ x at the pattern of `like` (whose values do not matter)."""

    weight_position = 2
    compute = staticmethod(compute_grad_weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad_values):
        grad, x = ctx.saved_tensors
        needs_grad, needs_x, _ = ctx.needs_input_grad
        return (
            Linear.call(x, grad_values, None) if needs_grad else None,
            Matmul.call(grad, grad_values, None) if needs_x else None,
            None,
        )


def autocast(x: Tensor, w: SparseTensor, bias: Tensor | None = None) -> tuple[Tensor, SparseTensor, Tensor | None]:
    """The operands in autocast's dtype, where it is on; linear and convolutions are on its lower-precision list."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, w = x.to(dtype), w if w.dtype == dtype else w.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return x, w, bias


@function(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with a sparse weight, a sparse input, or both."""
    if isinstance(input, SparseTensor):
        return _of_sparse_input(input, weight, bias)
    if not isinstance(weight, SparseTensor) or weight.cache.activation:  # or the bias is sparse
        return on_dense_copies(F.linear, (input, weight, bias), {}, "linear")
    if autocast_somewhere():
        input, weight, bias = autocast(input, weight, bias)
    if bias is not None and (bias.dim() != 1 or bias.numel() == 1 or not bias.is_contiguous()):
        bias = bias_row(bias, weight.shape[0], repeat=True)
    intercepted = is_intercepted()
    if intercepted and must_apply():
        return Linear.apply(input, weight, bias)
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return Linear.record(input, weight, bias)
    if weight.transposed:
        return compute_linear(input, weight, bias, intercepted)
    parts = weight.parts  # as `compute_linear`, with one call less: this is the hot path
    return planned("linear", weight, (input, parts, bias), None, intercepted).run(input, parts, bias)


def _of_sparse_input(x: SparseTensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias: by a kernel for the layout of x; of two sparse operands the activation is unpacked."""
    if isinstance(weight, SparseTensor):
        y = matmul(x, weight.t())
        return y if bias is None else y + bias
    if autocast_somewhere():
        weight, x, bias = autocast(weight, x, bias)
    if not input_can_be_sparse(x, weight, bias):
        return F.linear(x.to_dense(), weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return InputLinear.record(x, weight, bias)
    return InputLinear.compute(x, weight, bias)


def times(x: Tensor, w: SparseTensor, bias: Tensor | None = None) -> Tensor:
    """x @ w + bias for x of any number of dimensions: linear with the transposed weight."""
    if autocast_somewhere():
        x, w, bias = autocast(x, w, bias)
    if bias is not None:
        bias = bias_row(bias, w.shape[1], repeat=True)
    return Matmul.call(x, w, bias)


@function(torch.matmul, torch.mm, torch.mv, torch.linalg.matmul, Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__)
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """torch.matmul with a sparse matrix on the left or the right."""
    if input.dim() < 1 or other.dim() < 1:
        raise RuntimeError(f"Expected operands with at least one dimension, got {input.dim()} and {other.dim()}.")
    if isinstance(other, SparseTensor) and other.cache.activation:  # it is read by rows, as the left operand only
        other = other.to_dense()
        if not isinstance(input, SparseTensor):
            return torch.matmul(input, other)
    left, right = (isinstance(a, SparseTensor) and a.dim() == 2 for a in (input, other))
    if left and right:
        return _both(input, other)
    if right and not isinstance(input, SparseTensor):
        return times(input, other)
    if not left:  # a batch of sparse matrices, or of addmm only the input is sparse
        return on_dense_copies(torch.matmul, (input, other), {}, "matmul", warn=True)
    if input.cache.activation:
        return _of_sparse_input(input, other.t(), None) if other.dim() == 2 else input.to_dense() @ other
    if other.dim() == 1:
        return linear(other, input)
    return linear(other.transpose(-2, -1), input).transpose(-2, -1)


def _both(a: SparseTensor, b: SparseTensor) -> Tensor:
    """Sparse times sparse, with a dense result: by a registered kernel, or on a dense copy of one.

    An activation, whose pattern is new at each call, is unpacked rather than a weight.
    """
    if a.cache.activation:
        return matmul(a.to_dense(), b)
    registered = find("matmul", a.parts["values"].device.type, (a.sparse_layout, b.sparse_layout)) is not None
    recorded = must_apply() or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
    if registered and not (a.transposed or b.transposed or recorded):
        return run_both("matmul", a, b)
    warn_densified("matmul", b)
    return matmul(a, b.to_dense())


@function(Tensor.__rmatmul__)
def rmatmul(other: Tensor, input: Tensor) -> Tensor:
    return matmul(input, other)


@function(torch.addmm, Tensor.addmm)
def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta=1, alpha=1) -> Tensor:
    """beta * input + alpha * mat1 @ mat2; a bias vector without factors is passed to the kernel."""
    if isinstance(input, SparseTensor):
        input = input.to_dense()
    if not isinstance(mat1, SparseTensor) and beta == alpha == 1 and input.shape == mat2.shape[1:]:
        return times(mat1, mat2, input) if isinstance(mat2, SparseTensor) else torch.addmm(input, mat1, mat2)
    product = matmul(mat1, mat2)
    if torch.broadcast_shapes(input.shape, product.shape) != product.shape:
        shapes = f"{tuple(product.shape)}, got {tuple(input.shape)}"
        raise RuntimeError(f"Expected an input that broadcasts to the shape of the product, {shapes}.")
    product = product if alpha == 1 else alpha * product
    return product if beta == 0 else beta * input + product  # torch ignores an input times 0, NaN included


# the same products below autograd, where torch decomposes a fused layer


def _below_autograd(rule):
    return torch.no_grad()(lambda _, *args, **kwargs: rule(*args, **kwargs))


aten(torch.ops.aten.mm.default, torch.ops.aten.matmul.default)(_below_autograd(matmul))
aten(torch.ops.aten.linear.default)(_below_autograd(linear))
aten(torch.ops.aten.addmm.default)(_below_autograd(addmm))
