"""What sten says by itself: rows that a mask leaves empty, a forgotten `sten.attach`, an unsuitable optimizer.

After `sten.sparsify` without `optimizer=` a dynamic method does nothing until `sten.attach`; nor does it in a copy of
the model, or under an optimizer that was made later. A backward pass does not show that attach was forgotten (a
learning-rate finder may come first), nor does a step of another model's optimizer. So the warning comes with the first
step of an optimizer that has one of these weights. That step is also the first chance to refuse an optimizer that
computes with whole matrices, if it was made after `sten.trainable`.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..layouts.base import Layout
from ..tensor import SparseTensor
from .optimizer_checks import expect_elementwise
from .trained_weight import TrainedWeight


def listed(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are: a large model must not flood the terminal."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def empty_rows(mask: Tensor, layout: Layout) -> str | None:
    """How many rows a mask leaves empty, in words; None: none, or the layout omits them on purpose."""
    if not layout.rows_may_be_empty:
        return None
    rows = mask.flatten(1).view(torch.uint8).amax(1) > 0  # forty times faster than any(1)
    empty = len(rows) - int(torch.count_nonzero(rows))
    if empty == len(rows):
        return f"all {empty}"
    return f"{empty} of {len(rows)}" if empty and not layout.omits_empty_rows else None


def empty_rows_of(w: SparseTensor) -> str | None:
    """How many rows of a stored weight are empty, in words; None as in `empty_rows`."""
    layout = w.sparse_layout
    return empty_rows(layout.support(w.parts, w.stored_shape), layout) if layout.rows_may_be_empty else None


def warn_of_empty_rows(rows: dict[str, str], stacklevel: int) -> None:
    """One warning for the weights, by name, that have empty rows."""
    if rows:
        names = listed([f"{name} ({what})" for name, what in rows.items()])
        warnings.warn(
            f"sten: the masks leave rows empty: {names}; lower the sparsity, or use sten.ERK.",
            stacklevel=stacklevel + 1,
        )


# All that exist, weakly. They cannot each have a hook: a hook that is removed while torch calls hooks is an error.
REMINDERS: weakref.WeakSet[Reminder] = weakref.WeakSet()


@functools.cache
def _register_hook() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for reminder in list(REMINDERS):
        reminder.check(optimizer)


class Reminder:
    """Checks each optimizer once, at its first step: whether it suits the weights, and whether their method acts in it.

    A method needs an engine on the optimizer that steps its weights. There is none before `sten.attach`, in a copy or
    a pickle, and under an optimizer that was made after the one that sten was given: the first step then warns.

    All weights that were made together share a reminder, and their copies share a copy of it. They hold it
    (`TrainedWeight.reminder`); torch's hook of all optimizers finds it in `REMINDERS`, which does not hold it.
    """

    def __init__(self) -> None:
        self.weights: list[weakref.ref[TrainedWeight]] = []
        self.checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        REMINDERS.add(self)
        _register_hook()

    def __reduce__(self) -> tuple:
        return Reminder, ()  # the copied weights join it one by one

    def add(self, weight: TrainedWeight) -> None:
        """Check optimizers that hold this weight, too."""
        self.weights.append(weakref.ref(weight))
        weight.reminder = self

    def forget(self, weight: TrainedWeight) -> None:
        """Do not check this weight any more."""
        self.weights = [ref for ref in self.weights if ref() not in (weight, None)]
        weight.reminder = None

    def check(self, optimizer: Optimizer) -> None:
        """Warn if the optimizer, which is about to step, has a weight whose method does not act in it.

        Raises:
            TypeError: it has a sparse weight, and computes with whole matrices.
        """
        if optimizer in self.checked:
            return
        params = {id(p) for group in optimizer.param_groups for p in group["params"]}
        existing = [weight for ref in self.weights if (weight := ref()) is not None]
        held = [weight for weight in existing if id(weight.param) in params]
        if held:
            expect_elementwise(optimizer)
        self.checked.add(optimizer)
        idle = [w for w in held if w.method is not None and not w.method.stateless]
        idle = [w for w in idle if w.engine is None or not w.engine.acts_in(optimizer)]
        if idle:
            method, names = type(idle[0].method).__name__, listed([weight.name for weight in idle])
            warnings.warn(
                f"sten: {method} does not act on {names}: call sten.attach(model, optimizer) before the first step, or "
                "pass optimizer= to sten.sparsify.",
                stacklevel=4,
            )


def remind(weights: Iterable[TrainedWeight]) -> None:
    """Check optimizers at their first step on one of these weights."""
    reminder = Reminder()
    for weight in weights:
        reminder.add(weight)


def forget(weight: TrainedWeight) -> None:
    """Do not check optimizers for this weight any more: it is in training no longer."""
    if weight.reminder is not None:
        weight.reminder.forget(weight)
