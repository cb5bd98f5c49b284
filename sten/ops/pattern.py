"""Padding and patterns: which slots are live, and how a dense operand gets to them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..tensor import SparseTensor, project_now, traced, unpack

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a pattern's tensor -> (what it was then, its live slots)


def live_slots(w: SparseTensor) -> Tensor | None:
    """Bool mask of the slots of `values` that are not padding; None where every slot is live.

    Found once for a pattern and kept as long as its tensors live and are not written to.
    """
    pattern = [p for name, p in w.parts.items() if name != "values"]
    if not pattern or any(traced(p) or p.is_inference() for p in pattern):
        return _find(w)
    state = (w.spec, w.stored_shape, w.parts["values"].shape, [(id(p), p._version) for p in pattern])
    known = _known.get(pattern[0])
    if known is None or known[0] != state:
        live = _find(w)
        known = state, None if bool(live.all()) else live
        _known[pattern[0]] = known
    return known[1]


def _find(w: SparseTensor) -> Tensor:
    return w.spec.pack_like(torch.ones(w.stored_shape, dtype=torch.bool, device=w.parts["values"].device), w.parts)


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
    accumulates = torch._C._current_graph_task_id() != -1
    if not accumulates and not torch.equal(unpack(gathered), dense.to(gathered.dtype)):
        raise ValueError(
            f"{name} would write a tensor with non-zeros off the pattern into a {w.spec} weight: mask it first "
            "(tensor * w.mask()), or use sten.densify."
        )
    return gathered.parts["values"]
