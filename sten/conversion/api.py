"""sparsify, plan, attach, trainable, finalize, densify: a model's weights between their forms, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layouts import NM
from ..layouts.base import Layout
from ..sparsifiers import Magnitude, Sparsifier, View
from ..sparsifiers.allocation import Allocation, allocation
from ..sparsifiers.sparsifier import check_needs
from ..tensor import SparseTensor, from_dense
from ..training import engine
from ..training.reminders import empty_rows_of, remind, warn_of_empty_rows
from .plan import decide
from .record import remember, remember_optimizers
from .reparametrize import begin, move
from .report import SparsifyPlan, rows_of
from .select import Target, Weights, select, sparse_weights
from .state_dict_hooks import accept_every_form

Model = TypeVar("Model", bound=nn.Module)
Optimizers = Optimizer | Iterable[Optimizer] | None
BY_MATRIX = (torch.optim.LBFGS, torch.optim.Muon, torch.optim.Adafactor)


def sparsify(
    model: Model,
    layout: Layout | dict[str, Layout | None] = NM(2, 4),  # noqa: B008 - layouts are frozen
    sparsifier: Sparsifier | None = Magnitude(),  # noqa: B008
    sparsity: float | Allocation | None = None,
    weights: Weights = None,
    optimizer: Optimizers = None,
    calibration: Iterable | None = None,
) -> Model:
    """Make weights of a model sparse, in place; the model is returned. All or nothing: an error leaves it as it was.

    Args:
        model: any nn.Module, the layer itself included.
        layout: a Layout, or {pattern over parameter names: Layout or None}; first match wins, None leaves dense.
        sparsifier: which entries live; None keeps the existing non-zeros (or the mask of torch.nn.utils.prune and
            torch.ao.pruning, whose parametrization is taken off).
        sparsity: fraction to drop, a float (`sten.Uniform`) or `sten.ERK`/`sten.Global`; required by layouts without a
            rate of their own (Masked, CSR, BSR, FanIn), refused where it contradicts an n:m layout.
        weights: a glob, "re:..." or list of them over parameter names, or predicate(name, module, attribute). Default:
            nn.Linear, Hugging Face's Conv1D (its transpose is stored), and the projections of MultiheadAttention.
        optimizer: one or a list, for training: the weights take the trainable form, and state is carried over.
        calibration: batches for data-driven sparsifiers, of which there are none yet: refused.

    Without `optimizer` a weight becomes a SparseTensor Parameter, the form for inference, unless its sparsifier acts
    during training. A weight tied to one that is not chosen is left dense (`sten.summary` lists it). References to
    Parameters stay valid: identity is kept, with gradients and attributes; hooks that were registered on a Parameter
    itself are not carried over.

    Raises:
        ValueError, TypeError: one sentence that says what was wrong and what would work.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> model = sten.sparsify(model, layout=sten.NM(2, 4))
        >>> model[0].weight
        Parameter(SparseTensor)(NM(n=2, m=4), shape=(32, 16), dtype=float32, density=0.5, requires_grad=True)
    """
    optimizers = _optimizers(optimizer)
    targets, skipped, views = _prepare(model, layout, sparsifier, sparsity, weights, optimizers, calibration)
    begun = []
    for target in targets:
        remember(target, optimizers or ())
        if target.name in views:
            spread = allocation(sparsity)
            begun.append(begin(target, sparsifier, views[target.name], spread, optimizers or []))
        else:
            move(target, target.result, optimizers or [], optimizers is not None)
    for target in skipped:
        remember(target, why=target.why)
    accept_every_form(model)
    if optimizers is not None:
        engine.start(model, optimizers)
    elif begun:
        remind(begun)
    if sparsifier is not None and not getattr(sparsifier, "zero_pruned", False):  # those say it when it happens
        empty = {}
        for target in targets:
            if rows := empty_rows_of(target.result):
                empty[target.name] = rows
        if empty:
            warn_of_empty_rows(empty, stacklevel=2)
    return model


def plan(
    model: nn.Module,
    layout: Layout | dict[str, Layout | None] = NM(2, 4),  # noqa: B008
    sparsifier: Sparsifier | None = Magnitude(),  # noqa: B008
    sparsity: float | Allocation | None = None,
    weights: Weights = None,
    optimizer: Optimizers = None,
    calibration: Iterable | None = None,
) -> SparsifyPlan:
    """What `sparsify` with these arguments would do, printable; it changes nothing and raises what sparsify would.

    It does the same work, calibration included: pass a list of batches, since a generator can be read only once.

    Example:
        >>> import torch, sten
        >>> plan = sten.plan(torch.nn.Linear(8, 4), layout=sten.CSR(), sparsity=0.5)
        >>> plan.rows[0].name, plan.rows[0].density
        ('weight', 0.5)
    """
    prepared = _prepare(model, layout, sparsifier, sparsity, weights, _optimizers(optimizer), calibration)
    targets, skipped, _ = prepared
    done = [(t.name, t.result, t.energy) for t in targets]
    return SparsifyPlan([*rows_of(done), *rows_of([(t.name, t.tensor, t.why) for t in skipped])])


def _prepare(
    model, layout, sparsifier, sparsity, weights, optimizers, calibration
) -> tuple[list[Target], list[Target], dict[str, View]]:
    """What sparsify will do, every argument checked and every tensor made: (targets, weights that stay dense, what a
    dynamic method sees first)."""
    if sparsifier is not None and not isinstance(sparsifier, Sparsifier):
        raise TypeError(
            f"sparsifier= takes a sparsifier such as sten.Magnitude() (an instance), or None; got {sparsifier!r}."
        )
    if sparsifier is not None:
        check_needs(sparsifier)
    if calibration is not None:
        raise ValueError(f"{sparsifier} reads no activations: leave calibration= out.")
    spread = allocation(sparsity)
    targets, skipped = select(model, layout, weights)
    _expect_held(optimizers, targets)
    dynamic = sparsifier is not None and not sparsifier.acts_once
    if optimizers is not None or dynamic:
        _expect_trainable(targets)
    if sparsifier is not None:
        _expect_method(sparsifier, targets, optimizers or [])
    return targets, skipped, decide(targets, sparsifier, spread)


def _expect_method(method: Sparsifier, targets: list[Target], optimizers: list[Optimizer]) -> None:
    """Raise, in one sentence, if the method cannot train weights in these layouts, or not with these optimizers."""
    for target in targets:
        try:
            method.check(target.layout)
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
    for optimizer in optimizers:
        engine.expect_optimizer(method, optimizer)


def _optimizers(optimizer: Optimizers) -> list[Optimizer] | None:
    if optimizer is None:
        return None
    single = isinstance(optimizer, Optimizer) or not isinstance(optimizer, Iterable)
    found = [optimizer] if single else list(optimizer)
    if not found or not all(isinstance(o, Optimizer) for o in found):
        raise TypeError(f"optimizer= takes a torch.optim.Optimizer or a list of them; got {optimizer!r}.")
    for one in found:
        if isinstance(one, BY_MATRIX):
            raise TypeError(
                f"{type(one).__name__} works on whole matrices: train sparse weights with SGD, AdamW or the like."
            )
    return found


def _expect_held(optimizers: list[Optimizer] | None, targets: list[Target]) -> None:
    """Every target that trains is in an optimizer, with slots that have a sparse form."""
    if optimizers is None:
        return
    held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    for target in targets:
        param = target.tensor
        if param.requires_grad and id(param) not in held:
            raise ValueError(
                f"{target.name} is not in the optimizer: make the optimizer from this model's parameters first."
            )
        for optimizer in optimizers:
            for key, slot in optimizer.state.get(param, {}).items():
                if isinstance(slot, Tensor) and slot.numel() > 1 and slot.shape != param.shape:
                    kind = type(optimizer).__name__
                    raise ValueError(
                        f"The slot {key!r} of {kind} for {target.name} has shape {tuple(slot.shape)}, which has no "
                        "sparse form: call sten before the optimizer's first step."
                    )


def _expect_trainable(targets: list[Target]) -> None:
    for target in targets:
        if any(isinstance(module, nn.RNNBase) for module, _ in target.owners):
            raise TypeError(
                f"{target.name} lies in a fused recurrent layer, which has no sparse kernels: it cannot train sparse."
            )


def trainable(model: Model) -> Model:
    """Give every SparseTensor Parameter its trainable form, in place: a Parameter of plain values, and its pattern.

    Optimizers made afterwards see ordinary tensors; `sparsify(optimizer=)` and `attach` do it for one that exists.

    Example:
        >>> import torch, sten
        >>> model = sten.trainable(sten.sparsify(torch.nn.Linear(8, 4)))
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        [('weight', (4, 4)), ('bias', (4,))]
    """
    return _train(model, sparse_weights(model), [])


def attach(model: Model, optimizer: Optimizers) -> Model:
    """Make a sparse model trainable under an optimizer that was made from its parameters.

    The same as `sparsify(optimizer=)`, for optimizers that a trainer makes later. Parameters keep identity, groups and
    state. On a model that is trainable already, its methods start, and `finalize` learns of the optimizer.

    Raises:
        ValueError: the model has no sparse weights, or the optimizer does not hold them.

    Example:
        >>> import torch, sten
        >>> model = sten.sparsify(torch.nn.Linear(8, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model = sten.attach(model, optimizer)
        >>> model(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """
    optimizers = _optimizers(optimizer)
    if optimizers is None:
        raise TypeError("attach needs the optimizer.")
    if weights := engine.dynamic_weights(model):
        engine.start(model, optimizers)
        for module, name in (owner for weight in weights for owner in weight.owner_modules()):
            remember_optimizers(module, name, optimizers)
        return model
    targets = sparse_weights(model)
    if not targets:
        raise ValueError("The model has no sparse weights to attach an optimizer to: call sten.sparsify first.")
    _expect_held(optimizers, targets)
    _train(model, targets, optimizers)
    for target in targets:
        remember(target, optimizers)
    return model


def _train(model: Model, targets: list[Target], optimizers: list[Optimizer]) -> Model:
    targets = [t for t in targets if t.weight is None]
    _expect_trainable(targets)
    for target in targets:
        move(target, target.stored, optimizers, trainable=True)
    accept_every_form(model)
    return model


def finalize(model: Model, layout: Layout | None = None) -> Model:
    """End of training: every sparse weight becomes a SparseTensor Parameter, stored in its own layout or in `layout`.

    The fastest form to call. With `layout`, the stored entries must fit it.

    Raises:
        ValueError: a pattern that `layout` cannot hold; the model is left as it was.

    Example:
        >>> import torch, sten
        >>> model = sten.trainable(sten.sparsify(torch.nn.Linear(8, 4)))
        >>> sten.finalize(model).weight.sparse_layout
        NM(n=2, m=4)
    """
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"layout= takes a layout such as sten.CSR(), or None; got {layout!r}.")

    def change(w: SparseTensor) -> SparseTensor:
        if layout is None or layout == w.sparse_layout:
            return w
        stored = w.t() if w.transposed else w
        new = from_dense(stored.to_dense(), layout, stored.mask())
        return new.t() if w.transposed else new

    return _convert(model, change)


def densify(model: Model) -> Model:
    """Back to plain dense Parameters with the same numbers, in place.

    Example:
        >>> import torch, sten
        >>> model = sten.densify(sten.sparsify(torch.nn.Linear(8, 4)))
        >>> type(model.weight).__name__
        'Parameter'
    """
    return _convert(model, lambda w: w.to_dense().contiguous())


def _convert(model: Model, change: Callable[[SparseTensor], Tensor]) -> Model:
    """Give every sparse weight, in either form, what `change` makes of it; all are made before one is set."""
    targets = sparse_weights(model)
    with torch.no_grad():
        ready = [(target, _named(change, target)) for target in targets]
    engine.stop(model)
    for target, after in ready:
        move(target, after, [])
    accept_every_form(model)
    return model


def _named(change: Callable[[SparseTensor], Tensor], target: Target) -> Tensor:
    try:
        return change(target.stored)
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from None
