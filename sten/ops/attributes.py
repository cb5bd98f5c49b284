"""Attributes and loading of a SparseTensor: copy_, .data, .grad, requires_grad.

Loading a sparse tensor into a Parameter replaces its pattern; its layout, dtype and device stay. A dense tensor is
loaded at the pattern, and raises if it has non-zeros elsewhere: which of them to drop is a sparsifier's decision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..caller import refuse_matrix_optimizer, splits_for_export
from ..tensor import SparseTensor, aten, function, project_now, unpack
from .padding import dense_to_values, to_be_written

A = torch.ops.aten


def entries_of(source: SparseTensor, target: SparseTensor) -> SparseTensor:
    """A new tensor with the layout, orientation, dtype and device of `target` and the entries of `source`.

    ValueError if the parts of `source` are invalid, or the layout of `target` cannot store its pattern.
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
    """Make `w` store what `new` stores, in place, and share the cache of its pattern."""
    w._adopt(new.sparse_layout, dict(new.parts), new.stored_shape, new.transposed, new.cache)


@function(Tensor.copy_)
def copy_into(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """target.copy_(source); a Parameter under no_grad (as in load_state_dict) takes the source's pattern."""
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
    to_be_written(target)
    target.parts["values"].copy_(values, non_blocking)
    return target


@function(Tensor.data.__set__)
def set_data(w: SparseTensor, new: Tensor) -> None:
    """`w.data = new`, for a SparseTensor of the same shape, dtype and device, or a dense tensor that fits the pattern.

    (For `dense.data = sparse` torch does not call `__torch_function__`.)
    """
    if w.trained is not None:
        w.trained.assign(w.trained.param, new)
        return
    mine, other = ((tuple(t.shape), t.dtype, t.device, getattr(t, "transposed", w.transposed)) for t in (w, new))
    if mine != other:
        raise TypeError(
            f"Expected (shape, dtype, device, transposed) {mine} for .data, got {other}; assign a new Parameter to the "
            "module, or call .to() on it."
        )
    with torch.no_grad():
        adopt(w, new if isinstance(new, SparseTensor) else w.with_values(dense_to_values(w, new, ".data =")))


@function(Tensor.grad.__get__)
def get_grad(w: Tensor) -> Tensor | None:
    """`w.grad`; a dense gradient, from an operator without a sparse formula, is projected to the pattern when read.

    The gradient of a weight in trainable form is that of its trained Parameter.
    """
    if isinstance(w, SparseTensor) and w.trained is not None:
        return w.trained.grad
    grad = w.grad
    if grad is not None and isinstance(w, SparseTensor):
        refuse_matrix_optimizer(w)
    if grad is not None and isinstance(w, SparseTensor) and not isinstance(grad, SparseTensor):
        with torch.no_grad():
            w.grad = grad = project_now(grad, w)
    return grad


# a weight in trainable form is assembled at each use: writes to its attributes go to the trained Parameter


@function(Tensor.grad.__set__)
def set_grad(w: Tensor, grad: Tensor | None) -> None:
    """`w.grad = g`; for a weight in trainable form, of its trained Parameter."""
    if isinstance(w, SparseTensor) and w.trained is not None:
        w.trained.grad = grad
    else:
        w.grad = grad


@function(Tensor.requires_grad_)
def requires_grad_(w: SparseTensor, requires_grad: bool = True) -> SparseTensor:
    if w.trained is None:
        return w.requires_grad_(requires_grad)
    w.trained.param.requires_grad_(requires_grad)
    return w


@function(Tensor.requires_grad.__get__)
def get_requires_grad(w: SparseTensor) -> bool:
    return w.requires_grad and (torch.compiler.is_dynamo_compiling() or not splits_for_export())


@function(Tensor.requires_grad.__set__)
def set_requires_grad(w: SparseTensor, requires_grad: bool) -> None:
    requires_grad_(w, requires_grad)


def _hook(register):
    def rule(w: SparseTensor, hook):
        """Raises for a weight in trainable form, which is assembled at each use, so that the hook would be lost."""
        if w.trained is not None:
            w.trained.refuse_hook()
        return register(w, hook)

    return rule


for _register in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook):
    function(_register)(_hook(_register))
