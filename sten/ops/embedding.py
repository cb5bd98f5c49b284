"""Embedding look-up in a sparse table: only the rows that are asked for are unpacked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import call, operator, say_densified
from ..tensor import LIBRARY, OPS, SparseTensor, aten, function
from .linear import needs_grad

LIBRARY.define("sparse_embedding(Tensor index, Tensor weight) -> Tensor")
LIBRARY.define("sparse_embedding_grad(Tensor grad, Tensor index, Tensor weight, int padding) -> Tensor")


@operator("embedding")
def embedding_reference(index, weight, *, spec, shape):
    rows = spec.unpack_rows(weight, shape, index.reshape(-1))
    return rows.view(*index.shape, shape[1])


@operator("embedding_grad_weight")
def embedding_grad_weight_reference(grad, index, weight, *, spec, shape, padding):
    dense = torch.ops.aten.embedding_dense_backward(grad, index, shape[0], padding, False)
    return spec.pack_like(dense, weight)


def _forward(index, w):
    return call("embedding", w.spec, w.stored_shape, w.parts, index, w.parts)


def _grad(grad, index, w, padding):
    return w.with_values(
        call("embedding_grad_weight", w.spec, w.stored_shape, w.parts, grad, index, w.parts, padding=padding)
    )


aten(OPS.sparse_embedding.default)(lambda _, index, w: _forward(index, w))
aten(OPS.sparse_embedding_grad.default)(lambda _, *args: _grad(*args))


class Embedding(torch.autograd.Function):
    """Rows of a sparse table."""

    @staticmethod
    def forward(index, w, padding):
        return OPS.sparse_embedding(index, w) if torch.compiler.is_compiling() else _forward(index, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        index, w, ctx.padding = inputs
        ctx.save_for_backward(index, w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        index, w = ctx.saved_tensors
        run = OPS.sparse_embedding_grad if torch.compiler.is_compiling() else _grad
        return None, run(grad.contiguous(), index, w, ctx.padding), None


@function(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """F.embedding with a sparse table; max_norm and scale_grad_by_freq have no rule and run on a dense copy."""
    if not isinstance(weight, SparseTensor):
        raise TypeError("The index of an embedding must be a dense integer tensor.")
    if max_norm is not None:
        raise NotImplementedError(f"max_norm would renormalise rows of a {weight.spec} table in place; clip them before sparsify.")
    if scale_grad_by_freq or weight.transposed:
        say_densified("embedding", weight.spec)
        return F.embedding(input, weight.to_dense(), padding_idx, None, norm_type, scale_grad_by_freq)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    if input.numel() and not torch.compiler.is_compiling() and not input.is_meta:
        low, high = torch.aminmax(input)
        if input.device.type == "cpu" and (int(low) < 0 or int(high) >= weight.shape[0]):
            raise IndexError(f"Embedding index out of range: got {int(low)} to {int(high)}, the table has {weight.shape[0]} rows.")
    if torch.compiler.is_compiling() or needs_grad(weight):
        return Embedding.apply(input, weight, padding)
    return _forward(input, weight)
