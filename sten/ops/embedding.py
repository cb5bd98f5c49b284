"""Embedding look-up in a sparse table: only the rows that the index names are unpacked."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import is_compiling, transforms_active
from ..dispatch import operator, planned, rows, warn_densified
from ..rule import Rule, save_operands, saved_operands
from ..tensor import SparseTensor, function, traced
from .padding import gradient
from .traceable import traceable


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


def compute_embedding(index, w, padding, intercepted):
    parts = w.parts
    return planned("embedding", w, (index, parts), None, intercepted).run(index, parts)


def compute_grad(grad, index, w, padding, intercepted):
    operands = (grad.contiguous(), index)
    return gradient("embedding_grad_weight", dense_grad_weight, w, operands, {"padding": padding}, intercepted)


@traceable("sparse_embedding(Tensor index, Tensor weight, int padding) -> Tensor")
class Embedding(Rule):
    """Rows of a sparse table."""

    weight_position = 1
    compute = staticmethod(compute_embedding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, ctx.padding = inputs
        save_operands(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad):
        return None, EmbeddingGrad.call(grad, *saved_operands(ctx), ctx.padding), None

    @staticmethod
    def vmap(info, in_dims, index, w, padding):
        if in_dims[1] is not None:
            raise NotImplementedError("Expected torch.vmap over the index only, got a batch of sparse tables.")
        return Embedding.call(index.movedim(in_dims[0], 0), w, padding), 0


@traceable("sparse_embedding_grad(Tensor grad, Tensor index, Tensor weight, int padding) -> Tensor")
class EmbeddingGrad(Rule):
    """The gradient of the table at its pattern; rows of the index `padding` get none."""

    weight_position = 2
    compute = staticmethod(compute_grad)

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
    """F.embedding with a sparse table; scale_grad_by_freq runs on a dense copy, max_norm is not supported."""
    if not isinstance(weight, SparseTensor):
        raise TypeError("Expected a dense integer index, got a SparseTensor.")
    if max_norm is not None:
        raise NotImplementedError(
            f"Expected max_norm=None for a {weight.sparse_layout} table, got {max_norm}; clip its rows beforehand."
        )
    if scale_grad_by_freq or weight.transposed:
        warn_densified("embedding", weight)
        return F.embedding(input, weight.to_dense(), padding_idx, None, norm_type, scale_grad_by_freq)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    _check(input, weight)
    return Embedding.call(input, weight, padding)


def _check(index: Tensor, w: SparseTensor) -> None:
    """Raise IndexError for an index out of range, where the check does not wait for a GPU or stop a compiler."""
    looks = index.device.type == "cpu" and index.numel() and not traced(index)
    if looks and not is_compiling() and not transforms_active():
        low, high = map(int, torch.aminmax(index))
        if low < 0 or high >= w.shape[0]:
            raise IndexError(f"Expected indices from 0 to {w.shape[0] - 1}, got {low} to {high}.")
