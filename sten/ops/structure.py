"""What torch asks of every tensor: detach, clone, copies to another dtype or device, transposes, empty twins, attributes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from ..tensor import SparseTensor, aten, function, project_now, unpack

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
        raise NotImplementedError(f"Only a sparse matrix can be transposed; this {w.spec} weight has shape {tuple(w.shape)}.")
    flipped = SparseTensor(w.spec, w.parts, w.stored_shape, not w.transposed)
    return return_and_correct_aliasing(func, (w, dim0, dim1), {}, flipped)


@aten(A.permute.default)
def permute(func, w, dims):
    dims = [d % w.dim() for d in dims]
    flip = dims == [1, 0]
    if not flip and dims != list(range(w.dim())):
        raise NotImplementedError(f"Only a sparse matrix can be permuted; this {w.spec} weight has shape {tuple(w.shape)}.")
    out = SparseTensor(w.spec, w.parts, w.stored_shape, w.transposed ^ flip)
    return return_and_correct_aliasing(func, (w, dims), {}, out)


@aten(A.view.default, A._unsafe_view.default, A.reshape.default, A.expand.default)
def view(func, w, size, **kwargs):
    """To its own shape, as gradients are; any other shape is dense."""
    same = len(size) == w.dim() and all(want in (-1, have) for want, have in zip(size, w.shape, strict=True))
    if same:
        return return_and_correct_aliasing(func, (w, size), kwargs, w.with_values(w.parts["values"]))
    return func(unpack(w).contiguous(), size, **kwargs)


@aten(A._to_copy.default)
def to_copy(func, w, *, dtype=None, device=None, layout=None, pin_memory=None, non_blocking=False, memory_format=None):
    if dtype is not None and not dtype.is_floating_point:
        return func(unpack(w), dtype=dtype, device=device, non_blocking=non_blocking)
    place = dict(device=device, non_blocking=non_blocking)
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


def only_live(w: SparseTensor, values: Tensor) -> SparseTensor:
    """`w` with these values, padded slots zeroed: an operator that writes every slot must leave them as they were."""
    live = w.spec.pack_like(torch.ones(w.stored_shape, dtype=torch.bool, device=values.device), w.parts)
    return w.with_values(torch.where(live, values, 0))


def dense_to_values(w: SparseTensor, dense: Tensor, name: str) -> Tensor:
    """The values of a dense operand that an in-place operator writes; it must be zero off the pattern."""
    dense = torch.broadcast_to(dense, w.shape)
    gathered = project_now(dense, w)
    if not torch.equal(unpack(gathered), dense.to(gathered.dtype)):
        raise ValueError(
            f"{name} would write a dense tensor with non-zeros off the pattern into a {w.spec} weight; "
            "mask it first (tensor * w.mask()), or use sten.densify."
        )
    return gathered.parts["values"]


@aten(A.copy_.default)
def copy_(func, target, source, non_blocking=False):
    if not isinstance(target, SparseTensor):
        return func(target, unpack(source), non_blocking)
    if isinstance(source, SparseTensor) and source.spec == target.spec and source.same_pattern(target):
        values = source.parts["values"]
    else:
        values = dense_to_values(target, source.to_dense() if isinstance(source, SparseTensor) else source, "copy_")
    target.parts["values"].copy_(values, non_blocking)
    return target


@aten(A.is_same_size.default)
def is_same_size(func, a, b):
    return tuple(a.shape) == tuple(b.shape)


@aten(A.equal.default)
def equal(func, a, b):
    dense = [unpack(x) if isinstance(x, SparseTensor) else x for x in (a, b)]
    return torch.equal(*dense)


# Python-level attributes that torch answers from a storage, which a SparseTensor does not have


@function(Tensor.data_ptr, Tensor.storage)
def no_buffer(w, *args, **kwargs):
    raise TypeError(f"A {w.spec} tensor has no single buffer; take those of its parts, for example w.parts['values'].data_ptr().")


@function(Tensor.numpy, Tensor.__array__, Tensor.tolist)
def to_numpy(w, *args, **kwargs):
    raise TypeError("A SparseTensor is not converted to numpy or a list silently; call w.to_dense() first.")


@function(Tensor.share_memory_)
def share_memory_(w):
    for part in w.parts.values():
        part.share_memory_()
    return w


@function(Tensor.is_shared)
def is_shared(w):
    return all(part.is_shared() for part in w.parts.values())


@function(Tensor.pin_memory)
def pin_memory(w, *args):
    return each_part(lambda p: p.pin_memory(*args), w)


@function(Tensor.data.__set__)
def set_data(w, new):
    """`w.data = new`: the parts of another SparseTensor of the same shape, dtype and device; a dense one at the pattern."""
    with torch.no_grad():
        if not isinstance(w, SparseTensor):
            w.data = unpack(new)
            return
        if (new.shape, new.dtype, new.device) != (w.shape, w.dtype, w.device):
            raise TypeError(
                f".data takes a tensor of shape {tuple(w.shape)}, {w.dtype} on {w.device}; "
                f"got {tuple(new.shape)}, {new.dtype} on {new.device}: use .to() on the module instead."
            )
        if not isinstance(new, SparseTensor):
            new = w.with_values(dense_to_values(w, new, ".data ="))
        w._adopt(new.spec, dict(new.parts), new.stored_shape, new.transposed)


@function(Tensor.grad.__get__)
def get_grad(w):
    """A dense gradient (of an operator whose formula gives one) is projected to the pattern when it is read."""
    grad = w.grad
    if grad is not None and isinstance(w, SparseTensor) and not isinstance(grad, SparseTensor):
        with torch.no_grad():
            w.grad = grad = project_now(grad, w)
    return grad
