"""What sten says unasked: rows that a mask leaves empty, and methods that nothing acts for.

A method that is given to `sten.sparsify` without `optimizer=` does nothing until `sten.attach`. A backward pass is no
sign that attach was forgotten (a learning-rate finder may come first), a step is; and a step of another model's
optimizer is none. So the first step of an optimizer that holds one of the unattached weights says so.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..layouts.base import Layout
from ..tensor import SparseTensor
from .trained_weight import TrainedWeight


def listed(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are: a large model must not flood the terminal."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def empty_rows(mask: Tensor, layout: Layout) -> str | None:
    """How many rows a mask leaves empty, in words; None: none, or the layout ablates rows on purpose."""
    if not layout.rows_may_be_empty:
        return None
    rows = mask.flatten(1).view(torch.uint8).amax(1) > 0  # forty times faster than any(1)
    empty = len(rows) - int(torch.count_nonzero(rows))
    if empty == len(rows):
        return f"all {empty}"
    return f"{empty} of {len(rows)}" if empty and not layout.omits_empty_rows else None


def empty_rows_of(w: SparseTensor) -> str | None:
    """The same of a weight as it is stored."""
    return (
        empty_rows(w.sparse_layout.support(w.parts, w.stored_shape), w.sparse_layout)
        if w.sparse_layout.rows_may_be_empty
        else None
    )


def warn_of_empty_rows(rows: dict[str, str], stacklevel: int) -> None:
    """One warning for the weights, by name, that have empty rows."""
    if rows:
        names = listed([f"{name} ({what})" for name, what in rows.items()])
        warnings.warn(
            f"sten: the masks leave rows empty: {names}; lower the sparsity, or use sten.ERK.",
            stacklevel=stacklevel + 1,
        )


class Unattached:
    """Weights without an engine; warns once, at the first step of an optimizer that holds one of them.

    It is kept alive by its weights (`TrainedWeight.reminder`), and looks at each optimizer once. torch's hook of all
    optimizers is in place only as long as weights wait.
    """

    def __init__(self, weights: list[TrainedWeight]) -> None:
        self.weights = [weakref.ref(weight) for weight in weights]
        self.seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        weak = weakref.ref(self)
        handle = register_optimizer_step_pre_hook(lambda *step: _look(weak, *step))
        self.remove = weakref.finalize(self, handle.remove)
        for weight in weights:
            weight.reminder = self

    def drop(self, weight: TrainedWeight) -> None:
        """This weight has an engine now, or needs none any more."""
        self.weights = [ref for ref in self.weights if ref() not in (weight, None)]
        weight.reminder = None
        if not self.weights:
            self.remove()

    def look(self, optimizer: Optimizer) -> None:
        """Warn if the optimizer, which is about to step, holds a weight that no engine acts on."""
        if optimizer in self.seen:
            return
        self.seen.add(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        alive = [weight for ref in self.weights if (weight := ref()) is not None]
        weights = [weight for weight in alive if id(weight.param) in held]
        for weight in weights:
            self.drop(weight)
        if weights:
            method, names = type(weights[0].method).__name__, listed([weight.name for weight in weights])
            warnings.warn(
                f"sten: {method} does not act on {names}: call sten.attach(model, optimizer) before the first step, or "
                "give sten.sparsify optimizer=.",
                stacklevel=5,
            )


def _look(weak: weakref.ref, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    reminder = weak()
    if reminder is not None:
        reminder.look(optimizer)


def remind(weights: Iterable[TrainedWeight]) -> None:
    """Warn at the first optimizer step on one of these weights, unless an engine takes them before."""
    waiting = [w for w in weights if w.method is not None and not w.method.stateless and w.engine is None]
    if waiting:
        Unattached(waiting)


def acted_for(weight: TrainedWeight) -> None:
    """An engine takes the weight, or it needs none any more."""
    if weight.reminder is not None:
        weight.reminder.drop(weight)
