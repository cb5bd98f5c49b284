"""What torch asks of every tensor: detach, clone, copies to another dtype or device, transposes, views, empty twins."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from ..dispatch import say_densified
from ..tensor import SparseTensor, aten, unpack
from .pattern import dense_to_values as dense_to_values
from .pattern import only_live

A = torch.ops.aten


def each_part(change, w: SparseTensor) -> SparseTensor:
    """The same weight with `change` applied to every part."""
    return SparseTensor(w.spec, {n: change(p) for n, p in w.parts.items()}, w.stored_shape, w.transposed)


@aten(A.detach.default, A.alias.default)
def detach(func, w):
    return return_and_correct_aliasing(func, (w,), {}, w.with_values(func(w.parts["values"])))


@aten(A.clone.default)
def clone(func, w, *, memory_format=None):
    return w.with_values(w.parts["values"].clone())


@aten(A.t.default)
def t(func, w):
    if w.dim() != 2:
        raise RuntimeError(f"t() transposes a matrix; this weight has shape {tuple(w.shape)}.")
    flipped = SparseTensor(w.spec, w.parts, w.stored_shape, not w.transposed)
    return return_and_correct_aliasing(func, (w,), {}, flipped)


@aten(A.transpose.int)
def transpose(func, w, dim0, dim1):
    dim0, dim1 = dim0 % w.dim(), dim1 % w.dim()
    if dim0 == dim1:
        return return_and_correct_aliasing(func, (w, dim0, dim1), {}, w.with_values(w.parts["values"]))
    if w.dim() != 2:
        raise NotImplementedError(f"Only a matrix can be transposed in {w.spec}; this weight has shape {tuple(w.shape)}.")
    flipped = SparseTensor(w.spec, w.parts, w.stored_shape, not w.transposed)
    return return_and_correct_aliasing(func, (w, dim0, dim1), {}, flipped)


@aten(A.permute.default)
def permute(func, w, dims):
    dims = [d % w.dim() for d in dims]
    flip = dims == [1, 0]
    if not flip and dims != list(range(w.dim())):
        raise NotImplementedError(f"Only a matrix can be permuted in {w.spec}; this weight has shape {tuple(w.shape)}.")
    out = SparseTensor(w.spec, w.parts, w.stored_shape, w.transposed ^ flip)
    return return_and_correct_aliasing(func, (w, dims), {}, out)


@aten(A.view.default, A._unsafe_view.default, A.reshape.default, A.expand.default)
def view(func, w, size, **kwargs):
    """To its own shape, as gradients are; any other shape is dense."""
    same = len(size) == w.dim() and all(want in (-1, have) for want, have in zip(size, w.shape, strict=True))
    if same:
        return return_and_correct_aliasing(func, (w, size), kwargs, w.with_values(w.parts["values"]))
    say_densified("view", w.spec)
    return func(unpack(w).contiguous(), size, **kwargs)


@aten(A._to_copy.default)
def to_copy(func, w, *, dtype=None, device=None, layout=None, pin_memory=None, non_blocking=False, memory_format=None):
    if dtype is not None and not dtype.is_floating_point:
        return func(unpack(w), dtype=dtype, device=device, non_blocking=non_blocking)
    place = {"device": device, "non_blocking": non_blocking}
    parts = {n: p.to(**place) if device is not None else p for n, p in w.parts.items()}
    parts["values"] = func(w.parts["values"], dtype=dtype, **place)
    return SparseTensor(w.spec, parts, w.stored_shape, w.transposed)


@aten(A.zeros_like.default)
def zeros_like(func, w, *, dtype=None, device=None, **_):
    return _twin(torch.zeros_like, w, dtype, device)


@aten(A.empty_like.default, A.rand_like.default, A.randn_like.default)
def empty_like(func, w, *, dtype=None, device=None, **_):
    """A twin with the same pattern; its padding is zero as the layout's law asks."""
    twin = _twin(getattr(torch, func._schema.name.removeprefix("aten::")), w, dtype, device)
    return only_live(twin, twin.parts["values"])


def _twin(make, w: SparseTensor, dtype, device) -> SparseTensor:
    source = w if device is None else each_part(lambda p: p.to(device), w)
    return source.with_values(make(source.parts["values"], dtype=dtype))


@aten(A.new_empty_strided.default, A.new_empty.default, A.new_zeros.default)
def new_like(func, w, size, stride=None, *, dtype=None, device=None, **_):
    """A buffer of the tensor's own shape is a twin (autograd accumulates into one); of another shape, dense."""
    if tuple(size) == tuple(w.shape):
        return _twin(torch.zeros_like, w, dtype, device)
    plain = w.parts["values"].new_empty(0, dtype=dtype, device=device)
    return func(plain, size, *([] if stride is None else [stride]))


@aten(A.is_same_size.default)
def is_same_size(func, a, b):
    return tuple(a.shape) == tuple(b.shape)


@aten(A.equal.default)
def equal(func, a, b):
    dense = [unpack(x) if isinstance(x, SparseTensor) else x for x in (a, b)]
    return torch.equal(*dense)
