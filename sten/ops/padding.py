"""Padding and patterns: which slots are live, and how a dense operand or a gradient gets to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch_private import backward_pass
from ..dispatch import planned
from ..tensor import SparseTensor, project_now, traced, unpack


def live_slots(w: SparseTensor) -> Tensor | None:
    """Bool mask of the slots of `values` that are not padding; None where every slot is live.

    Computed once for a pattern and kept in its cache, until `invalidate`, or an edit that the parts' versions show.
    """
    pattern = [p for name, p in w.parts.items() if name != "values"]
    if not pattern or any(traced(p) or p.is_inference() for p in pattern):
        return _find(w)
    cache, state = w.cache, [(id(p), p._version) for p in pattern]
    if cache.live is None or cache.live[0] != state:
        live = _find(w)
        cache.live = state, None if bool(live.all()) else live
    return cache.live[1]


def _find(w: SparseTensor) -> Tensor:
    return w.sparse_layout.pack_like(
        torch.ones(w.stored_shape, dtype=torch.bool, device=w.parts["values"].device), w.parts
    )


def only_live(w: SparseTensor, values: Tensor) -> SparseTensor:
    """`w` with these values, padded slots zeroed: an operator that writes every slot must leave them as they were."""
    live = live_slots(w)
    return w.with_values(values if live is None else torch.where(live, values, 0))


def clear_padding(w: SparseTensor) -> None:
    """The same in place, after an operator wrote every slot of `w`."""
    live = live_slots(w)
    if live is not None:
        w.parts["values"].masked_fill_(~live, 0)


def dense_to_values(w: SparseTensor, dense: Tensor, name: str) -> Tensor:
    """The values of a dense operand that an in-place operator writes; it must be zero off the pattern.

    Except in a backward pass, where autograd accumulates: a dense gradient is projected to the pattern.
    """
    dense = torch.broadcast_to(dense, w.shape)
    gathered = project_now(dense, w)
    accumulates = backward_pass() != -1
    if not accumulates and not torch.equal(unpack(gathered), dense.to(gathered.dtype)):
        raise ValueError(
            f"{name} would write a tensor with non-zeros off the pattern into a {w.sparse_layout} weight: mask it "
            "first (tensor * w.mask()), or use sten.densify."
        )
    return gathered.parts["values"]


def gradient(
    name: str,
    dense: Callable[..., Tensor],
    w: SparseTensor,
    operands: tuple,
    geometry: dict[str, Any] | None,
    seen: bool,
) -> SparseTensor:
    """The gradient of a weight, at its pattern.

    Where a training method wants it dense (`PatternCache.dense_gradient`), it is computed dense, once, and handed over.

    Args:
        name: the operator, whose kernels take `operands`, then the parts of the weight, and `geometry`.
        dense: `dense(*operands, shape, **geometry)` computes the same for every entry.
        seen: whether the call is intercepted.
    """
    geometry, parts, wants = geometry or {}, w.parts, w.cache.dense_gradient
    if wants is None:
        values = planned(name, w, (*operands, parts), geometry, seen).run(*operands, parts, **geometry)
    else:
        whole = dense(*operands, w.stored_shape, **geometry)
        wants(whole)
        values = w.sparse_layout.pack_like(whole, parts)
    return w.with_values(values)
