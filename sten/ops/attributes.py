"""What modules and state_dicts ask of a SparseTensor in Python: copy_, .data, .grad, its storage.

Loading between sparse tensors takes over the entries: a Parameter takes on the pattern of the tensor that is loaded
into it and keeps its own layout, dtype and device. A dense tensor goes in at the pattern, and is refused if it has
non-zeros elsewhere: which of them to drop is a sparsifier's decision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensor import SparseTensor, aten, function, project_now, unpack
from .padding import dense_to_values

A = torch.ops.aten


def entries_of(source: SparseTensor, target: SparseTensor) -> SparseTensor:
    """A new tensor in the layout, orientation, dtype and device of `target` with the entries of `source`.

    ValueError, with one sentence, if the parts of `source` are not valid or the layout cannot hold its pattern.
    """
    source.sparse_layout.validate(source.parts, source.stored_shape)
    if source.sparse_layout == target.sparse_layout and source.transposed == target.transposed:
        values = source.parts["values"].to(target.dtype)
        parts = {name: part.to(target.device, copy=True) for name, part in {**source.parts, "values": values}.items()}
    else:
        dense, mask = (t.t() if target.transposed else t for t in (unpack(source), source.mask()))
        parts = target.sparse_layout.pack(dense.to(target.device, target.dtype), mask.to(target.device))
    return SparseTensor(target.sparse_layout, parts, target.stored_shape, target.transposed)


def adopt(w: SparseTensor, new: SparseTensor) -> None:
    """Make `w` store what `new` stores, and share the cache of its pattern; everything that refers to `w` sees it."""
    w._adopt(new.sparse_layout, dict(new.parts), new.stored_shape, new.transposed, new.cache)


@function(Tensor.copy_)
def copy_into(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """target.copy_(source); a Parameter under no_grad (as load_state_dict copies) takes on the source's pattern."""
    both = isinstance(target, SparseTensor) and isinstance(source, SparseTensor) and target.shape == source.shape
    loading = both and getattr(target, "_is_param", False) and not torch.is_grad_enabled()
    if loading and not target.same_pattern(source):
        adopt(target, entries_of(source, target))
        return target
    return target.copy_(source, non_blocking)


@aten(A.copy_.default)
def copy_(func, target, source, non_blocking=False):
    if not isinstance(target, SparseTensor):
        return func(target, unpack(source), non_blocking)
    if isinstance(source, SparseTensor) and target.same_pattern(source):
        values = source.parts["values"]
    else:
        values = dense_to_values(target, unpack(source) if isinstance(source, SparseTensor) else source, "copy_")
    target.parts["values"].copy_(values, non_blocking)
    return target


@function(Tensor.data.__set__)
def set_data(w: SparseTensor, new: Tensor) -> None:
    """`w.data = new`: what another SparseTensor of the same shape, dtype and device stores; a dense one at the pattern.

    (`dense.data = sparse` never gets here: torch asks only the tensor on the left.)
    """
    mine, other = ((tuple(t.shape), t.dtype, t.device, getattr(t, "transposed", w.transposed)) for t in (w, new))
    if mine != other:
        raise TypeError(
            f".data takes a tensor with the same (shape, dtype, device, transposed) {mine}; got {other}: assign a new "
            "Parameter to the module, or use .to() on it."
        )
    with torch.no_grad():
        if w.trained is not None:
            w.trained.assign(w.trained.param, new)
        else:
            adopt(w, new if isinstance(new, SparseTensor) else w.with_values(dense_to_values(w, new, ".data =")))


@function(Tensor.grad.__get__)
def get_grad(w: Tensor) -> Tensor | None:
    """A dense gradient (of an operator whose formula gives one) is projected to the pattern when it is read.

    A weight in trainable form has the gradient of the Parameter that is trained for it.
    """
    if isinstance(w, SparseTensor) and w.trained is not None:
        grad = w.trained.param.grad
        return None if grad is None else w.detach().with_values(grad.view(w.parts["values"].shape))
    grad = w.grad
    if grad is not None and isinstance(w, SparseTensor) and not isinstance(grad, SparseTensor):
        with torch.no_grad():
            w.grad = grad = project_now(grad, w)
    return grad


# a weight in trainable form is put together at each use: what is done to it must reach the trained Parameter


@function(Tensor.grad.__set__)
def set_grad(w: Tensor, grad: Tensor | None) -> None:
    """`w.grad = g`, for a weight in trainable form on the Parameter that is trained for it."""
    if not isinstance(w, SparseTensor) or w.trained is None:
        w.grad = grad
        return
    param = w.trained.param
    if grad is not None:
        grad = (grad if isinstance(grad, SparseTensor) else project_now(grad, w)).parts["values"].reshape(param.shape)
    param.grad = grad


@function(Tensor.requires_grad_)
def requires_grad_(w: SparseTensor, requires_grad: bool = True) -> SparseTensor:
    if w.trained is None:
        return w.requires_grad_(requires_grad)
    w.trained.param.requires_grad_(requires_grad)
    return w


@function(Tensor.requires_grad.__set__)
def set_requires_grad(w: SparseTensor, requires_grad: bool) -> None:
    requires_grad_(w, requires_grad)


@function(Tensor.register_hook)
def register_hook(w: SparseTensor, hook):
    """Refused where the tensor is put together anew at each use, so that the hook would be lost."""
    if w.trained is not None:
        name = w.trained.owners[0][1]
        raise RuntimeError(
            "Expected a tensor that lasts for a hook, got a weight that is put together at each use; register it on "
            f'the trained Parameter, module._parameters["{name}"].'
        )
    return w.register_hook(hook)


# what torch reads from a storage, which a SparseTensor does not have


@function(Tensor.data_ptr, Tensor.storage)  # untyped_storage must answer: torch.compile asks every tensor for it
def no_buffer(w: SparseTensor, *args):
    raise TypeError(
        f"A {w.sparse_layout} tensor has no buffer of its own; take one of a part: w.parts['values'].data_ptr()."
    )


@function(Tensor.numpy, Tensor.__array__, Tensor.tolist)
def to_numpy(w: SparseTensor, *args, **kwargs):
    raise TypeError("A SparseTensor is not converted to numpy or a list silently; call w.to_dense() first.")


@function(Tensor.share_memory_)
def share_memory_(w: SparseTensor) -> SparseTensor:
    for part in w.parts.values():
        part.share_memory_()
    return w


@function(Tensor.is_shared)
def is_shared(w: SparseTensor) -> bool:
    return all(part.is_shared() for part in w.parts.values())


@function(Tensor.pin_memory)
def pin_memory(w: SparseTensor, *args) -> SparseTensor:
    parts = {name: part.pin_memory(*args) for name, part in w.parts.items()}
    return SparseTensor(w.sparse_layout, parts, w.stored_shape, w.transposed)
