"""Embedding look-up in a sparse table: only the rows that are asked for are unpacked."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import intercepted, is_compiling, transforms_active
from ..dispatch import operator, planned, rows, say_densified
from ..tensor import LIBRARY, OPS, Rule, SparseTensor, aten, function, owned, traced
from .padding import gradient

LIBRARY.define("sparse_embedding(Tensor index, Tensor weight) -> Tensor")
LIBRARY.define("sparse_embedding_grad(Tensor grad, Tensor index, Tensor weight, int padding) -> Tensor")


@operator("embedding", tokens=math.prod)
def embedding_reference(index, weight, *, layout, shape):
    if traced(index):  # how many entries the rows have depends on the data, and a graph needs static shapes
        return layout.unpack(weight, shape)[index]
    return layout.unpack_rows(weight, shape, index.reshape(-1)).view(*index.shape, shape[1])


def dense_grad_weight(grad, index, shape, padding):
    return torch.ops.aten.embedding_dense_backward(grad, index, shape[0], padding, False)


@operator("embedding_grad_weight", tokens=rows)
def embedding_grad_weight_reference(grad, index, weight, *, layout, shape, padding):
    return layout.pack_like(dense_grad_weight(grad, index, shape, padding), weight)


def look_up(index, w, padding, seen):
    parts = w.parts
    return planned("embedding", w, (index, parts), None, seen).run(index, parts)


def grad_now(grad, index, w, padding, seen):
    operands = (grad.contiguous(), index)
    return gradient("embedding_grad_weight", dense_grad_weight, w, operands, {"padding": padding}, seen)


@aten(OPS.sparse_embedding.default)
def _traced_embedding(_, index, w):
    return look_up(index, w, -1, intercepted(w, index))


@aten(OPS.sparse_embedding_grad.default)
def _traced_grad(_, grad, index, w, padding):
    return grad_now(grad, index, w, padding, intercepted(w, grad, index))


class Embedding(Rule):
    """Rows of a sparse table."""

    place = 1
    now = staticmethod(look_up)

    @staticmethod
    def forward(index, w, padding):
        seen = intercepted(w, index)
        if seen and is_compiling():
            return OPS.sparse_embedding(index, w)
        return owned(look_up(index, w, padding, seen))

    @staticmethod
    def setup_context(ctx, inputs, output):
        index, w, ctx.padding = inputs
        ctx.save_for_backward(index, w)

    @staticmethod
    def backward(ctx, grad):
        return None, EmbeddingGrad.call(grad, *ctx.saved_tensors, ctx.padding), None

    @staticmethod
    def vmap(info, in_dims, index, w, padding):
        if in_dims[1] is not None:
            raise NotImplementedError("torch.vmap over a sparse table has no rule; map over the index only.")
        return Embedding.call(index.movedim(in_dims[0], 0), w, padding), 0


class EmbeddingGrad(Rule):
    """The gradient of the table at its pattern; rows of the index `padding` get none."""

    place = 2
    now = staticmethod(grad_now)

    @staticmethod
    def forward(grad, index, like, padding):
        seen = intercepted(like, grad, index)
        if seen and is_compiling():
            return OPS.sparse_embedding_grad(grad, index, like, padding)
        return grad_now(grad, index, like, padding, seen)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.padding = inputs[3]

    @staticmethod
    def backward(ctx, grad_values):
        (index,) = ctx.saved_tensors
        rows_of_grad = Embedding.call(index, grad_values, ctx.padding)
        return rows_of_grad.masked_fill((index == ctx.padding).unsqueeze(-1), 0), None, None, None


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
        raise NotImplementedError(
            f"max_norm writes into the table, {weight.sparse_layout} here: clip its rows beforehand."
        )
    if scale_grad_by_freq or weight.transposed:
        say_densified("embedding", weight.sparse_layout)
        return F.embedding(input, weight.to_dense(), padding_idx, None, norm_type, scale_grad_by_freq)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    _check(input, weight)
    return Embedding.call(input, weight, padding)


def _check(index: Tensor, w: SparseTensor) -> None:
    """IndexError for an index out of range, where looking does not wait for a GPU or stop a compiler."""
    looks = index.device.type == "cpu" and index.numel() and not traced(index)
    if looks and not is_compiling() and not transforms_active():
        low, high = map(int, torch.aminmax(index))
        if low < 0 or high >= w.shape[0]:
            raise IndexError(f"Embedding indices go from {low} to {high}, but the table has {w.shape[0]} rows.")
