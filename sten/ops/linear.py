"""linear, matmul, mm and addmm with a sparse matrix, and their gradients.

Every product of a dense and a sparse matrix is one of two, since a SparseTensor knows whether it is transposed:

    linear             y = x @ W.T     W stored (out, in)
    linear_grad_input  y = x @ W       the gradient of the input of the former, and W stored (in, out)

and the gradient of the values is `linear_grad_weight`, the product g.T @ x sampled at the pattern. The three are each
other's derivatives, so all orders of gradients follow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..dispatch import ask_bound, call, call_both, find, operator, say_densified
from ..tensor import LIBRARY, OPS, Rule, SparseTensor, aten, function, owned


@operator("linear")
def linear_reference(x, weight, bias, *, spec, shape):
    return F.linear(x, spec.unpack(weight, shape), bias)


@operator("linear_grad_input")
def linear_grad_input_reference(grad, weight, *, spec, shape):
    return grad @ spec.unpack(weight, shape)


@operator("linear_grad_weight")
def linear_grad_weight_reference(grad, x, weight, *, spec, shape):
    dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return spec.pack_like(dense, weight)


@operator("matmul", sparse=("input", "other"), required=("other",))
def matmul_reference(input, other, *, spec, shape):
    left, right = (
        operand if layout is None else layout.unpack(operand, size)
        for operand, layout, size in zip((input, other), spec, shape, strict=True)
    )
    return left @ right


# without gradients


def bias_row(bias: Tensor | None, outputs: int, repeat: bool = False) -> Tensor | None:
    """The bias as every kernel may take it: one number for each output, contiguous; a single one may `repeat`."""
    if bias is None:
        return None
    if repeat and bias.dim() < 2 and bias.numel() == 1:
        bias = bias.expand(outputs)
    if bias.shape != (outputs,):
        raise RuntimeError(f"The bias of {outputs} outputs must have the shape ({outputs},); got {tuple(bias.shape)}.")
    return bias.contiguous()


def linear_now(x: Tensor, w: SparseTensor, bias: Tensor | None) -> Tensor:
    """x @ w.T + bias."""
    bias = bias_row(bias, w.stored_shape[w.transposed], repeat=True)
    if w.transposed:
        y = _times(x, w)
        return y if bias is None else y + bias
    y = ask_bound("linear", w, x, bias, checked=True)
    return call("linear", w.spec, w.stored_shape, w.parts, x, w.parts, bias) if y is None else y


def matmul_now(x: Tensor, w: SparseTensor, bias: Tensor | None) -> Tensor:
    """x @ w + bias."""
    bias = bias_row(bias, w.stored_shape[not w.transposed], repeat=True)
    if w.transposed:
        return call("linear", w.spec, w.stored_shape, w.parts, x, w.parts, bias)
    y = _times(x, w)
    return y if bias is None else y + bias


def _times(x: Tensor, w: SparseTensor) -> Tensor:
    """x @ the stored matrix: a kernel registered for matmul comes first, the gradient of linear is the same product."""
    spec, shape, parts = w.spec, w.stored_shape, w.parts
    if find("matmul", parts["values"].device.type, (None, spec)) is not None:
        return call_both("matmul", (None, spec), (tuple(x.shape), shape), x, parts)
    return call("linear_grad_input", spec, shape, parts, x, parts)


def grad_weight_now(grad: Tensor, x: Tensor, w: SparseTensor) -> SparseTensor:
    """The gradient of linear's weight, grad.T @ x, at the pattern of w."""
    if w.transposed:
        grad, x = x, grad
    return w.with_values(call("linear_grad_weight", w.spec, w.stored_shape, w.parts, grad, x, w.parts, cache=w.cache))


# what torch.compile sees: opaque operators on the SparseTensor, which __torch_dispatch__ answers

LIBRARY.define("sparse_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.define("sparse_matmul(Tensor input, Tensor other, Tensor? bias) -> Tensor")
LIBRARY.define("sparse_grad_weight(Tensor grad, Tensor input, Tensor weight) -> Tensor")
aten(OPS.sparse_linear.default)(lambda _, x, w, bias: linear_now(x, w, bias))
aten(OPS.sparse_matmul.default)(lambda _, x, w, bias: matmul_now(x, w, bias))
aten(OPS.sparse_grad_weight.default)(lambda _, grad, x, w: grad_weight_now(grad, x, w))


def over_batch(apply, info, in_dims, x, *rest):
    """vmap over the activations alone: one more leading dimension. A batch of sparse weights has no kernel."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        raise NotImplementedError("torch.vmap over a sparse weight or its bias has no rule; map over the input only.")
    return apply(x.movedim(in_dims[0], 0), *rest), 0


def _sum_rows(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


class Linear(Rule):
    """y = x @ w.T + bias."""

    @staticmethod
    def forward(x, w, bias):
        return OPS.sparse_linear(x, w, bias) if torch.compiler.is_compiling() else owned(linear_now(x, w, bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad
        return (
            Matmul.run(grad, w, None) if needs_x else None,
            GradWeight.run(grad, x, w) if needs_w else None,
            _sum_rows(grad) if needs_bias else None,
        )

    @staticmethod
    def vmap(info, in_dims, x, w, bias):
        return over_batch(Linear.run, info, in_dims, x, w, bias)


class Matmul(Rule):
    """y = x @ w + bias."""

    @staticmethod
    def forward(x, w, bias):
        return OPS.sparse_matmul(x, w, bias) if torch.compiler.is_compiling() else owned(matmul_now(x, w, bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad
        return (
            Linear.run(grad, w, None) if needs_x else None,
            GradWeight.run(x, grad, w) if needs_w else None,
            _sum_rows(grad) if needs_bias else None,
        )

    @staticmethod
    def vmap(info, in_dims, x, w, bias):
        return over_batch(Matmul.run, info, in_dims, x, w, bias)


class GradWeight(Rule):
    """g.T @ x at the pattern of `like` (whose values do not matter)."""

    @staticmethod
    def forward(grad, x, like):
        if torch.compiler.is_compiling():
            return OPS.sparse_grad_weight(grad, x, like)
        return grad_weight_now(grad, x, like)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx, grad_values):
        grad, x = ctx.saved_tensors
        needs_grad, needs_x, _ = ctx.needs_input_grad
        return (
            Linear.run(x, grad_values, None) if needs_grad else None,
            Matmul.run(grad, grad_values, None) if needs_x else None,
            None,
        )


def autocast(x: Tensor, w: SparseTensor, bias: Tensor | None = None) -> tuple[Tensor, SparseTensor, Tensor | None]:
    """The operands in autocast's dtype, where it is on; linear and convolutions are on its lower-precision list."""
    if not torch._C._is_any_autocast_enabled():
        return x, w, bias
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, w = x.to(dtype), w if w.dtype == dtype else w.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return x, w, bias


def tracked(*tensors: Tensor | None) -> bool:
    """Whether somebody watches: autograd of either mode, torch.func, torch.compile. If not, the kernel is called."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check(x: Tensor, size: int, w: SparseTensor, bias: Tensor | None) -> None:
    if x.shape[-1] != size:
        shapes = f"Input {tuple(x.shape)} and weight {tuple(w.shape)}"
        raise RuntimeError(f"{shapes} do not fit: the last dimension of the input must be {size}.")
    if x.dtype != w.dtype or (bias is not None and bias.dtype != w.dtype):
        kinds = f"Input ({x.dtype}), weight ({w.dtype}) and bias ({w.dtype if bias is None else bias.dtype})"
        raise RuntimeError(f"{kinds} must have the same dtype; convert one or use autocast.")


def _as_before(x: Tensor, w: SparseTensor, bias: Tensor | None) -> Tensor | None:
    """The product without a check, where what is bound to the weight has answered for such operands; None otherwise."""
    if not w.bound or w.transposed or torch._C._is_any_autocast_enabled():
        return None
    recorded = torch.is_grad_enabled() and w.requires_grad  # who else watches, it looks itself
    return None if recorded else ask_bound("linear", w, x, bias, checked=False)


@function(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with a sparse weight; a sparse input is unpacked."""
    if not isinstance(weight, SparseTensor) or isinstance(input, SparseTensor):
        return matmul(input, weight.t()) if bias is None else matmul(input, weight.t()) + bias
    y = _as_before(input, weight, bias)
    if y is not None:
        return y
    input, weight, bias = autocast(input, weight, bias)
    _check(input, weight.stored_shape[not weight.transposed], weight, bias)
    return Linear.run(input, weight, bias) if tracked(input, weight, bias) else linear_now(input, weight, bias)


def times(x: Tensor, w: SparseTensor, bias: Tensor | None = None) -> Tensor:
    """x @ w + bias for x of any number of dimensions: linear with the weight the other way round."""
    x, w, bias = autocast(x, w, bias)
    _check(x, w.stored_shape[w.transposed], w, bias)
    return Matmul.run(x, w, bias) if tracked(x, w, bias) else matmul_now(x, w, bias)


@function(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """torch.matmul with a sparse matrix on the left or the right."""
    if input.dim() < 1 or other.dim() < 1:
        raise RuntimeError("Both arguments of matmul need at least one dimension.")
    left, right = isinstance(input, SparseTensor), isinstance(other, SparseTensor)
    if left and right:
        return _both(input, other)
    if right:
        return times(input, other)
    if other.dim() == 1:
        return linear(other, input)
    return linear(other.transpose(-2, -1), input).transpose(-2, -1)


def _both(a: SparseTensor, b: SparseTensor) -> Tensor:
    """Sparse times sparse, dense result: a registered kernel, or the right operand unpacked, with a warning."""
    registered = find("matmul", a.parts["values"].device.type, (a.spec, b.spec)) is not None
    if registered and not (a.transposed or b.transposed or tracked(a, b)):
        return call_both("matmul", (a.spec, b.spec), (a.stored_shape, b.stored_shape), a.parts, b.parts)
    say_densified("matmul", b.spec)
    return matmul(a, b.to_dense())


@function(Tensor.__rmatmul__)
def rmatmul(other: Tensor, input: Tensor) -> Tensor:
    return matmul(input, other)


@function(torch.addmm, Tensor.addmm)
def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta=1, alpha=1) -> Tensor:
    """beta * input + alpha * mat1 @ mat2; a bias vector, without factors, goes into the kernel."""
    dense = not isinstance(input, SparseTensor) and not isinstance(mat1, SparseTensor)
    if dense and beta == alpha == 1 and input.shape == mat2.shape[1:]:
        return times(mat1, mat2, input)
    product = matmul(mat1, mat2)
    return beta * input + (product if alpha == 1 else alpha * product)


# the same products where torch asks for them below autograd (a fused layer that it takes apart, say)


def _below_autograd(rule):
    return torch.no_grad()(lambda _, *args, **kwargs: rule(*args, **kwargs))


aten(torch.ops.aten.mm.default, torch.ops.aten.matmul.default)(_below_autograd(matmul))
aten(torch.ops.aten.linear.default)(_below_autograd(linear))
aten(torch.ops.aten.addmm.default)(_below_autograd(addmm))
