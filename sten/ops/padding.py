"""Padding: which slots of the values are used; dense operands and gradients at a pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch_private import backward_pass
from ..dispatch import planned
from ..tensor import SparseTensor, project_now, traced, unpack


def used_slots(w: SparseTensor) -> Tensor | None:
    """Bool mask of the slots of `values` that are not padding; None if all are used.

    It is cached for a pattern until `invalidate`, or until the version of a part changes.
    """
    pattern = [p for name, p in w.parts.items() if name != "values"]
    if not pattern or any(traced(p) or p.is_inference() for p in pattern):
        return _compute_used_slots(w)
    cache, state = w.cache, [(id(p), p._version) for p in pattern]
    if cache.used_slots is None or cache.used_slots[0] != state:
        used = _compute_used_slots(w)
        cache.used_slots = state, None if bool(used.all()) else used
    return cache.used_slots[1]


def _compute_used_slots(w: SparseTensor) -> Tensor:
    return w.sparse_layout.pack_like(
        torch.ones(w.stored_shape, dtype=torch.bool, device=w.parts["values"].device), w.parts
    )


def zero_padding(w: SparseTensor, values: Tensor) -> SparseTensor:
    """`w` with these values, the padding zeroed: for operators that write every slot."""
    used = used_slots(w)
    return w.with_values(values if used is None else torch.where(used, values, 0))


def zero_padding_(w: SparseTensor) -> None:
    """Zero the padding of `w` in place, after an operator wrote every slot."""
    used = used_slots(w)
    if used is not None:
        w.parts["values"].masked_fill_(~used, 0)


def to_be_written(w: SparseTensor) -> None:
    """Called before an operator writes the values in place; RuntimeError if the write would be lost, or as of a leaf.

    It tells autograd of the write: below autograd, where rules run, torch counts no versions of parts.
    """
    if w.instead is not None:
        raise RuntimeError(f"Expected a tensor that can be written, got {w.instead}.")
    if w.trained is not None and w.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    values = w.parts["values"]
    if not traced(values) and not values.is_inference():
        torch.autograd.graph.increment_version(values)


def dense_to_values(w: SparseTensor, dense: Tensor, name: str) -> Tensor:
    """The values of a dense operand that an in-place operator writes; ValueError if it has non-zeros off the pattern.

    In a backward pass, where autograd accumulates gradients, these are dropped instead.
    """
    dense = torch.broadcast_to(dense, w.shape)
    gathered = project_now(dense, w)
    accumulates = backward_pass() != -1
    if not accumulates and not torch.equal(unpack(gathered), dense.to(gathered.dtype)):
        raise ValueError(
            f"Expected no non-zeros off the pattern of a {w.sparse_layout} weight for {name}, got some; mask the "
            "tensor first (tensor * w.mask()), or use sten.densify."
        )
    return gathered.parts["values"]


def gradient(
    name: str,
    dense: Callable[..., Tensor],
    w: SparseTensor,
    operands: tuple,
    geometry: dict[str, Any] | None,
    intercepted: bool,
) -> SparseTensor:
    """The gradient of a weight, at its pattern.

    If a training method set `PatternCache.dense_gradient`, the gradient is computed dense, once, and passed to it.

    Args:
        name: the operator.
        dense: `dense(*operands, shape, **geometry)` computes the dense gradient.
        w: the weight.
        operands: of the operator, without the parts of the weight, which come last.
        geometry: keywords of the operator.
        intercepted: whether the call is intercepted.
    """
    geometry, parts, receive = geometry or {}, w.parts, w.cache.dense_gradient
    if receive is None:
        values = planned(name, w, (*operands, parts), geometry, intercepted).run(*operands, parts, **geometry)
    else:
        grad = dense(*operands, w.stored_shape, **geometry)
        receive(grad)
        values = w.sparse_layout.pack_like(grad, parts)
    return w.with_values(values)
