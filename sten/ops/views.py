"""detach, clone, copies to another dtype or device, transposes, views, and new tensors like a SparseTensor."""

from __future__ import annotations

import contextlib

import torch

from .._torch_private import backward_pass, correct_aliasing, is_compiling
from ..caller import calling_module
from ..dispatch import warn_densified
from ..tensor import SparseTensor, aten, function, unpack

A = torch.ops.aten


def each_part(change, w: SparseTensor) -> SparseTensor:
    """A copy of the weight with `change` applied to every part, so that it has its own pattern."""
    return SparseTensor(w.sparse_layout, {n: change(p) for n, p in w.parts.items()}, w.stored_shape, w.transposed)


def alias(func, args: tuple, transposed: bool) -> SparseTensor:
    """A new tensor with the same parts, which autograd knows as a view.

    In inference mode a view of an ordinary tensor is ordinary, but a new wrapper would not be.
    """
    w = args[0]
    with torch.inference_mode(w.is_inference()) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        parts = {**w.parts, "values": w.parts["values"].detach()}
        view = SparseTensor(w.sparse_layout, parts, w.stored_shape, transposed, cache=w.cache)
    view.instead = w.instead
    return correct_aliasing(func, args, {}, view)


@aten(A.detach.default, A.alias.default)
def detach(func, w):
    return alias(func, (w,), w.transposed)


@aten(A.clone.default)
def clone(func, w, *, memory_format=None):
    return w.with_values(w.parts["values"].clone())


@aten(A.t.default)
def t(func, w):
    if w.dim() != 2:
        raise RuntimeError(f"Expected a matrix for t(), got shape {tuple(w.shape)}.")
    return alias(func, (w,), not w.transposed)


@aten(A.transpose.int)
def transpose(func, w, dim0, dim1):
    dims = list(range(w.dim()))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return alias(func, (w, dim0, dim1), w.transposed ^ _flips(w, dims))


@aten(A.permute.default)
def permute(func, w, dims):
    return alias(func, (w, dims), w.transposed ^ _flips(w, [d % w.dim() for d in dims]))


def _flips(w: SparseTensor, dims: list[int]) -> bool:
    """Whether this order of dimensions transposes a matrix; NotImplementedError for other permutations."""
    same = dims == list(range(w.dim()))
    if not same and w.dim() != 2:
        raise NotImplementedError(
            f"Expected a matrix to transpose in {w.sparse_layout}, got shape {tuple(w.shape)}; call to_dense() first."
        )
    return not same


@aten(A.view.default, A._unsafe_view.default, A.reshape.default, A.expand.default)
def view(func, w, size, **kwargs):
    """A view of the same shape, as autograd makes of gradients; any other shape is dense."""
    if len(size) == w.dim() and all(want in (-1, have) for want, have in zip(size, w.shape, strict=True)):
        return alias(func, (w, size), w.transposed)
    warn_densified("view", w)
    return func(unpack(w).contiguous(), size, **kwargs)


@aten(A._to_copy.default)
def to_copy(func, w, *, dtype=None, device=None, layout=None, pin_memory=None, non_blocking=False, memory_format=None):
    if dtype is not None and not dtype.is_floating_point:
        return func(unpack(w), dtype=dtype, device=device, non_blocking=non_blocking)
    target = {"device": device, "non_blocking": non_blocking}
    parts = {n: p.to(**target) if device is not None else p for n, p in w.parts.items()}
    same = all(p is w.parts[n] for n, p in parts.items() if n != "values")
    parts["values"] = func(w.parts["values"], dtype=dtype, **target)
    return SparseTensor(w.sparse_layout, parts, w.stored_shape, w.transposed, cache=w.cache if same else None)


@aten(A.zeros_like.default)
def zeros_like(func, w, *, dtype=None, device=None, **_):
    """With the same pattern, as `clone`: optimizers make their state so."""
    source = w if device is None else each_part(lambda p: p.to(device), w)
    return source.with_values(torch.zeros_like(source.parts["values"], dtype=dtype))


@aten(A.ones_like.default, A.full_like.default, A.empty_like.default, A.rand_like.default, A.randn_like.default)
def like(func, w, *args, **kwargs):
    """A plain dense tensor: no number of it needs to be zero."""
    return func(w.parts["values"].new_empty(()).expand(w.shape), *args, **kwargs)


@function(torch.empty_like)
def empty_like(w: SparseTensor, *args, **kwargs):
    """As `like`; refused for `nn.Module.to_empty`, which would make the weight dense."""
    if not is_compiling() and calling_module() == "torch.nn.modules.module":
        raise RuntimeError(
            f"Expected dense Parameters for to_empty, got a {w.sparse_layout} weight, which needs a pattern; "
            "use load_state_dict(..., assign=True) instead, or sten.trainable(model) before it."
        )
    return torch.empty_like(w, *args, **kwargs)


@aten(A.new_empty.default, A.new_zeros.default, A.new_ones.default, A.new_full.default)
def new(func, w, *args, **kwargs):
    """A plain dense tensor."""
    return func(w.parts["values"], *args, **kwargs)


@aten(A.new_empty_strided.default)
def new_empty_strided(func, w, size, stride, **kwargs):
    """A plain dense tensor; in a backward pass, where autograd makes the gradient so, one of the same pattern."""
    if backward_pass() != -1 and tuple(size) == tuple(w.shape):
        return zeros_like(A.zeros_like.default, w, dtype=kwargs.get("dtype"), device=kwargs.get("device"))
    return func(w.parts["values"], size, stride, **kwargs)


@aten(A.is_same_size.default)
def is_same_size(func, a, b):
    return tuple(a.shape) == tuple(b.shape)


@aten(A.equal.default)
def equal(func, a, b):
    dense = [unpack(x) if isinstance(x, SparseTensor) else x for x in (a, b)]
    return torch.equal(*dense)
