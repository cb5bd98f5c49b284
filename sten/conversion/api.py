"""sparsify, plan, attach, trainable, finalize, densify: a model's weights between their forms, all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..calibration.data import Calibration, calibration_of
from ..caller import user_stacklevel
from ..layouts.base import Layout
from ..sparsifiers import Sparsifier
from ..sparsifiers.allocation import Allocation, allocation
from ..sparsifiers.sparsifier import CALIBRATION, check_needs
from ..tensor import SparseTensor, from_dense
from ..training import engine
from ..training.inference_mode import ordinary_tensors
from ..training.optimizer_checks import expect_elementwise, expect_optimizer, holds, optimizers_of
from ..training.reminders import empty_rows_of, forget, listed, remind, warn_of_empty_rows
from ..training.trained_weight import TrainedWeight
from ..training.uninterrupted import uninterrupted
from .arguments import Layouts, Modules, Weights, expect_layouts
from .calibrated import Calibrated
from .exclusions import stored_by_others
from .plan import Decision, decide
from .recipe import DEFAULT, Recipe, note_recipe, recipe_of, set_recipes
from .record import remember, remember_optimizers
from .reparametrize import begin, expect_slots_to_follow, move
from .report import SparsifyPlan, other_parameters, rows_of, summary
from .select import Target, expect_model, movable_weights, select
from .site_selection import prepare_sites, sparsify_site
from .sites import expect_no_gradient_site, remove_sites, sites_of
from .state_dict_hooks import accept_every_form

Model = TypeVar("Model", bound=nn.Module)
Optimizers = Optimizer | Iterable[Optimizer] | None


@ordinary_tensors
def sparsify(
    model: Model,
    layout: Layouts | Recipe | None = None,
    sparsifier: Sparsifier | None = DEFAULT,
    sparsity: float | Allocation | None = None,
    weights: Weights = None,
    optimizer: Optimizers = None,
    calibration: Calibration | Iterable | None = None,
    site: str = "weight",
    modules: Modules = None,
) -> Model:
    """Make weights of a model sparse, in place; the model is returned. All or nothing: an error leaves it as it was.

    Args:
        model: any nn.Module, the layer itself included.
        layout: a Layout, or {pattern: Layout or None}; the first match wins, None leaves dense. Default: CSR, where
            `sparsity` is given. A pattern is a glob over the names of parameters and of the modules around them, "re:"
            and a regular expression over names of parameters, a module, or a type of modules. A dictionary chooses what
            its patterns name; "*" stands for all else that is chosen by default. Or a `sten.Recipe`, which has this
            argument and the next three.
        sparsifier: which entries live; None keeps the existing non-zeros (or the mask of torch.nn.utils.prune and
            torch.ao.pruning, whose parametrization is taken off).
        sparsity: fraction to drop, a float (`sten.Uniform`) or `sten.ERK`/`sten.Global`; required by layouts without a
            rate of their own (Masked, CSR, BSR, FanIn), refused where it contradicts an n:m layout.
        weights: a pattern, a list of them, or predicate(name, module, attribute). Default: nn.Linear, Hugging Face's
            Conv1D (its transpose is stored), and the projections of MultiheadAttention; without the output layer of a
            language model and the factors of low-rank adapters.
        optimizer: one or a list, for training: the weights take the trainable form, and state is carried over.
        calibration: batches, or a `sten.Calibration` of them, for a method that reads the weights' inputs (Wanda,
            SparseGPT, ...). The model is run block by block, in eval mode, each block on what the pruned ones before
            it give; with `Calibration(commit="block")` finished blocks stay sparse after an error.
        site: what becomes sparse: "weight"; or of each call of the chosen modules "input", "output", "grad_weight",
            "grad_input" or "grad_output", by an activation method such as `sten.TopK`, None takes it off. `layout` is
            then that of the tensor, None leaves it dense, with zeros.
        modules: of another site than "weight", the modules: patterns over their names. Default: the linear layers.

    Without `optimizer` a weight becomes a SparseTensor Parameter, the form for inference, unless its sparsifier acts
    during training. A weight tied to one that is not chosen is left dense, and so is one that `sten.ERK` or
    `sten.Global` would keep so dense that its layout needs more bytes (`sten.summary` lists them). A weight that is
    sparse already gets the new layout and sparsity, as after `sten.finalize`: of the entries that it has, the best
    stay; in training it stays trainable, and its former method ends. References to Parameters stay valid: identity is
    kept, with gradients and attributes; hooks that were registered on a Parameter itself are not carried over.

    Raises:
        ValueError, TypeError: one sentence that says what was wrong and what would work.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> model = sten.sparsify(model, sparsity=0.9)
        >>> model[0].weight
        Parameter(SparseTensor)(CSR(), shape=(32, 16), dtype=float32, density=0.0996, requires_grad=True)
        >>> model = sten.sparsify(torch.nn.Linear(16, 32), {torch.nn.Linear: sten.NM(2, 4)})
        >>> model.weight.density
        0.5
    """
    expect_model(model)
    recipe = recipe_of(layout, sparsifier, sparsity, weights, site, modules)
    if recipe.site != "weight":
        sparsify_site(model, recipe, optimizer, calibration)
        note_recipe(model, recipe)
        accept_every_form(model)
        return model
    optimizers = optimizers_of(optimizer)
    written: dict[str, TrainedWeight | None] = {}

    def write(targets: list[Target]) -> None:
        with uninterrupted():
            _release(targets)
            for target in targets:
                remember(target, optimizers or ())
                trains = optimizers is not None or target.weight is not None
                written[target.name] = move(target, target.result, optimizers or [], trains)
            accept_every_form(model)

    decision, skipped = _prepare(model, recipe, optimizers, calibration, write)
    sparsifier, targets = recipe.sparsifier, decision.targets
    dynamic = [target for target in targets if target.name in decision.views]
    write([t for t in targets if t.name not in decision.views and t.name not in written])
    _release(dynamic)
    begun = []
    for target in dynamic:
        remember(target, optimizers or ())
        begun.append(begin(target, sparsifier, decision.views[target.name], decision.allocation, optimizers or []))
    trained = [*written.values()]
    for target in skipped:
        remember(target, why=target.why)
    note_recipe(model, recipe)
    accept_every_form(model)
    if foreign := [f"{t.name} ({t.why})" for t in skipped if stored_by_others(t.tensor)]:
        warnings.warn(
            f"sten: left as they are: {listed(foreign)}; prune before quantizing.", stacklevel=user_stacklevel()
        )
    if begun and optimizers is not None:
        engine.start(model, optimizers)
    remind(weight for weight in begun + trained if weight is not None)
    if sparsifier is not None and not getattr(sparsifier, "zero_pruned", False):  # those say it when it happens
        empty = {}
        for target in targets:
            if rows := empty_rows_of(target.result):
                empty[target.name] = rows
        if empty:
            warn_of_empty_rows(empty, stacklevel=user_stacklevel())
    return model


@ordinary_tensors
def plan(
    model: nn.Module,
    layout: Layouts | Recipe | None = None,
    sparsifier: Sparsifier | None = DEFAULT,
    sparsity: float | Allocation | None = None,
    weights: Weights = None,
    optimizer: Optimizers = None,
    calibration: Calibration | Iterable | None = None,
    site: str = "weight",
    modules: Modules = None,
) -> SparsifyPlan:
    """What `sparsify` with these arguments would do, printable; it changes nothing and raises what sparsify would.

    It does the same work, calibration included: pass a list of batches, since a generator can be read only once. Of
    another site than "weight", the weights are as they are, and `sites` are those that there would be.

    Example:
        >>> import torch, sten
        >>> plan = sten.plan(torch.nn.Linear(8, 4), layout=sten.CSR(), sparsity=0.5)
        >>> plan.rows[0].name, plan.rows[0].density
        ('weight', 0.5)
    """
    expect_model(model)
    recipe = recipe_of(layout, sparsifier, sparsity, weights, site, modules)
    if recipe.site != "weight":
        sites = [one for _, one, _ in prepare_sites(model, recipe, optimizer, calibration)]
        present = [one for one in sites_of(model) if one not in sites]
        return SparsifyPlan(summary(model).rows, other_parameters(model), present + sites * bool(recipe.sparsifier))
    decision, skipped = _prepare(model, recipe, optimizers_of(optimizer), calibration, None)
    done = [(t.name, t.result, t.energy) for t in decision.targets]
    rows = [*rows_of(done), *rows_of([(t.name, t.tensor if t.stored is None else t.stored, t.why) for t in skipped])]
    return SparsifyPlan(rows, other_parameters(model), sites_of(model))


def _prepare(
    model, recipe: Recipe, optimizers, calibration, write: Callable[[list[Target]], None] | None
) -> tuple[Decision, list[Target]]:
    """What sparsify will do, every argument checked and every tensor made, and the weights that stay dense.

    `write` is for a calibration that writes block by block.
    """
    sparsifier = recipe.sparsifier
    calibrated = _calibrated(model, sparsifier, calibration, write)
    spread = allocation(recipe.sparsity)
    dynamic = sparsifier is not None and not sparsifier.acts_once
    kind = type(sparsifier).__name__ if dynamic else ""
    targets, skipped = select(model, expect_layouts(recipe.layout, sparsifier, spread), recipe.weights, kind)
    expect_no_gradient_site(targets)
    _expect_held(optimizers, targets)
    if optimizers is not None or dynamic:
        _expect_trainable(targets)
    if sparsifier is not None:
        _expect_method(sparsifier, targets, optimizers or [])
    decision = decide(targets, sparsifier, spread, calibrated)
    return decision, [*skipped, *decision.dense]


def _calibrated(model, sparsifier: Sparsifier | None, calibration, write) -> Calibrated | None:
    """The model with its calibration, for a method that reads it; None for another one."""
    if sparsifier is not None:
        check_needs(sparsifier, calibration is not None)
    if calibration is None:
        if getattr(sparsifier, "reconstruct", None) is not None:
            raise ValueError(f"Expected calibration= for {sparsifier}, which runs each block, got None; pass batches.")
        return None
    needs, rebuild = getattr(sparsifier, "needs", frozenset()), getattr(sparsifier, "reconstruct", None)
    if not needs & CALIBRATION and rebuild is None:
        raise ValueError(f"{sparsifier} reads no activations: leave calibration= out.")
    if not sparsifier.acts_once:
        raise ValueError(
            f"Expected a method that decides once, at sten.sparsify, for calibration=, got {sparsifier}, which acts "
            "during training, too; call sten.sparsify again for that."
        )
    calibration = calibration_of(calibration)
    return Calibrated(model, calibration, write if calibration.commit == "block" else None)


def _release(targets: list[Target]) -> None:
    """Take weights that a method trains already from their engines."""
    weights = [target.weight for target in targets if target.weight is not None]
    for weight in weights:
        forget(weight)
        if weight.engine is not None:
            weight.engine.close([other for other in weights if other.engine is weight.engine])


def _expect_method(method: Sparsifier, targets: list[Target], optimizers: list[Optimizer]) -> None:
    """Raise, in one sentence, if the method cannot train weights in these layouts, or not with these optimizers."""
    for target in targets:
        try:
            method.check(target.layout)
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
    for optimizer in optimizers:
        expect_optimizer(method, optimizer)


def _expect_held(optimizers: list[Optimizer] | None, targets: list[Target]) -> None:
    """Every target that trains is in an optimizer, with slots that have a sparse form."""
    if optimizers is None:
        return
    for target in targets:
        holding = [optimizer for optimizer in optimizers if holds(optimizer, target.tensor)]
        if target.tensor.requires_grad and not holding:
            raise ValueError(
                f"{target.name} is not in the optimizer: make the optimizer from this model's parameters first."
            )
        for optimizer in holding:
            expect_elementwise(optimizer)
        expect_slots_to_follow(target, holding)


def _expect_trainable(targets: list[Target]) -> None:
    for target in targets:
        if any(isinstance(module, nn.RNNBase) for module, _ in target.owners):
            raise TypeError(
                f"{target.name} lies in a fused recurrent layer, which has no sparse kernels: it cannot train sparse."
            )


@ordinary_tensors
def trainable(model: Model) -> Model:
    """Give every SparseTensor Parameter its trainable form, in place: a Parameter of plain values, and its pattern.

    Optimizers made afterwards see ordinary tensors; `sparsify(optimizer=)` and `attach` do it for one that exists.

    Example:
        >>> import torch, sten
        >>> model = sten.trainable(sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4)))
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        [('weight', (4, 4)), ('bias', (4,))]
    """
    return _train(model, movable_weights(model), [])


@ordinary_tensors
def attach(model: Model, optimizer: Optimizers) -> Model:
    """Make a sparse model trainable under an optimizer that was made from its parameters.

    The same as `sparsify(optimizer=)`, for optimizers that a trainer makes later. Parameters keep identity, groups and
    state. On a model that is trainable already, its methods start, and `finalize` learns of the optimizer.

    Raises:
        ValueError: the model has no sparse weights, or the optimizer does not hold them.

    Example:
        >>> import torch, sten
        >>> model = sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model = sten.attach(model, optimizer)
        >>> model(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """
    optimizers = optimizers_of(optimizer)
    if optimizers is None:
        raise TypeError("Expected an optimizer for sten.attach, got None.")
    if weights := engine.dynamic_weights(model):
        engine.start(model, optimizers)
        for module, name in (owner for weight in weights for owner in weight.owner_modules()):
            remember_optimizers(module, name, optimizers)
        return model
    targets = movable_weights(model)
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
        expect_slots_to_follow(target, optimizers)
    remind([move(target, target.stored, optimizers, trainable=True) for target in targets])
    accept_every_form(model)
    return model


@ordinary_tensors
def finalize(model: Model, layout: Layout | None = None) -> Model:
    """End of training: every sparse weight becomes a SparseTensor Parameter, stored in its own layout or in `layout`.

    The fastest form to call. With `layout`, the stored entries must fit it.

    Raises:
        ValueError: a pattern that `layout` cannot hold; the model is left as it was.

    Example:
        >>> import torch, sten
        >>> model = sten.trainable(sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4)))
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


@ordinary_tensors
def densify(model: Model) -> Model:
    """Back to plain dense Parameters with the same numbers, in place; other sites are taken off.

    Example:
        >>> import torch, sten
        >>> model = sten.densify(sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4)))
        >>> type(model.weight).__name__
        'Parameter'
    """
    _convert(model, lambda w: w.to_dense().contiguous())
    remove_sites(model)
    accept_every_form(model)
    set_recipes(model, [])
    return model


def _convert(model: Model, change: Callable[[SparseTensor], Tensor]) -> Model:
    """Give every sparse weight, in either form, what `change` makes of it; all are made before one is set."""
    targets = movable_weights(model)
    with torch.no_grad():
        ready = [(target, _named(change, target)) for target in targets]
    for target in targets:
        expect_slots_to_follow(target, [])
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
