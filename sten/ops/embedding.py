"""Embedding look-up in a sparse table: only the rows that are asked for are unpacked."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import call, operator, rows, say_densified
from ..tensor import LIBRARY, OPS, Rule, SparseTensor, aten, function, owned, traced
from .linear import tracked

LIBRARY.define("sparse_embedding(Tensor index, Tensor weight) -> Tensor")
LIBRARY.define("sparse_embedding_grad(Tensor grad, Tensor index, Tensor weight, int padding) -> Tensor")


@operator("embedding", tokens=math.prod)
def embedding_reference(index, weight, *, spec, shape):
    if traced(index):  # how many entries the rows have depends on the data, and a graph needs static shapes
        return spec.unpack(weight, shape)[index]
    found = spec.unpack_rows(weight, shape, index.reshape(-1))
    return found.view(*index.shape, shape[1])


@operator("embedding_grad_weight", tokens=rows)
def embedding_grad_weight_reference(grad, index, weight, *, spec, shape, padding):
    dense = torch.ops.aten.embedding_dense_backward(grad, index, shape[0], padding, False)
    return spec.pack_like(dense, weight)


def look_up(index, w):
    return call("embedding", w.spec, w.stored_shape, w.parts, index, w.parts)


def grad_now(grad, index, w, padding):
    operands = (grad.contiguous(), index, w.parts)
    return w.with_values(call("embedding_grad_weight", w.spec, w.stored_shape, w.parts, *operands, padding=padding, cache=w.cache))


aten(OPS.sparse_embedding.default)(lambda _, index, w: look_up(index, w))
aten(OPS.sparse_embedding_grad.default)(lambda _, *args: grad_now(*args))


class Embedding(Rule):
    """Rows of a sparse table."""

    @staticmethod
    def forward(index, w, padding):
        return OPS.sparse_embedding(index, w) if torch.compiler.is_compiling() else owned(look_up(index, w))

    @staticmethod
    def setup_context(ctx, inputs, output):
        index, w, ctx.padding = inputs
        ctx.save_for_backward(index, w)

    @staticmethod
    def backward(ctx, grad):
        return None, EmbeddingGrad.run(grad, *ctx.saved_tensors, ctx.padding), None

    @staticmethod
    def vmap(info, in_dims, index, w, padding):
        if in_dims[1] is not None:
            raise NotImplementedError("torch.vmap over a sparse table has no rule; map over the index only.")
        return Embedding.run(index.movedim(in_dims[0], 0), w, padding), 0


class EmbeddingGrad(Rule):
    """The gradient of the table at its pattern; rows of the index `padding` get none."""

    @staticmethod
    def forward(grad, index, like, padding):
        run = OPS.sparse_embedding_grad if torch.compiler.is_compiling() else grad_now
        return run(grad, index, like, padding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.padding = inputs[3]

    @staticmethod
    def backward(ctx, grad_values):
        (index,) = ctx.saved_tensors
        found = Embedding.run(index, grad_values, ctx.padding)
        return found.masked_fill((index == ctx.padding).unsqueeze(-1), 0), None, None, None


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
        raise NotImplementedError(f"max_norm writes into the table, {weight.spec} here: clip its rows beforehand.")
    if scale_grad_by_freq or weight.transposed:
        say_densified("embedding", weight.spec)
        return F.embedding(input, weight.to_dense(), padding_idx, None, norm_type, scale_grad_by_freq)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    _check(input, weight)
    if tracked(weight):
        return Embedding.run(input, weight, padding)
    return look_up(input, weight)


def _check(index: Tensor, w: SparseTensor) -> None:
    """IndexError for an index out of range, where looking does not wait for a GPU or stop a compiler."""
    looks = index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling() and not traced(index)
    if looks and not torch._C._are_functorch_transforms_active():
        low, high = map(int, torch.aminmax(index))
        if low < 0 or high >= w.shape[0]:
            raise IndexError(f"Embedding indices go from {low} to {high}, but the table has {w.shape[0]} rows.")
