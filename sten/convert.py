"""sparsify, attach, trainable, finalize, densify: a model's weights between their forms, all or nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .allocation import Allocation, allocation
from .layout import Layout, check_sparsity
from .layouts import NM
from .report import Plan, note, rows_of
from .sparsifiers import Magnitude, Sparsifier, View
from .state import keep_loadable
from .targets import Target, Weights, all_weights, select
from .tensor import SparseTensor, from_dense
from .training.pattern import SparseWeight, holders, install, remove

_attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()
Optimizers = Optimizer | Iterable[Optimizer] | None


@dataclass
class Change:
    """A target and what it becomes, computed before anything is touched."""

    target: Target
    tensor: SparseTensor
    energy: float


def sparsify(
    model: nn.Module,
    layout: Layout | dict[str, Layout | None] = NM(2, 4),  # noqa: B008 - layouts are frozen
    sparsifier: Sparsifier | None = Magnitude(),  # noqa: B008
    sparsity: float | Allocation | None = None,
    weights: Weights = None,
    optimizer: Optimizers = None,
    calibration: Iterable | None = None,
) -> nn.Module:
    """Make weights of a model sparse, in place; the model is returned. All or nothing: an error leaves it as it was.

    Args:
        model: any nn.Module, the layer itself included.
        layout: a Layout, or {pattern over parameter names: Layout or None}; first match wins, None leaves dense.
        sparsifier: which entries live; None keeps the existing non-zeros (or the mask of torch.nn.utils.prune and
            torch.ao.pruning, whose parametrization is taken off).
        sparsity: fraction to drop, a float (`sten.Uniform`) or `sten.ERK`/`sten.Global`; required by layouts without a
            rate of their own (Masked, CSR, BSR), refused where it contradicts an n:m layout.
        weights: a glob, "re:..." or list of them over parameter names, or predicate(name, module, attribute). Default:
            nn.Linear, Hugging Face's Conv1D (its transpose is stored), and the projections of MultiheadAttention.
        optimizer: one or a list, for training: the weights take the trainable form, and state is carried over.
        calibration: batches for data-driven sparsifiers; refused by the others.

    Without `optimizer` every weight becomes a SparseTensor Parameter, the form for inference. A weight tied to one that
    is not chosen is left dense (`sten.summary` lists it). Existing references to Parameters stay valid: identity is kept.

    Raises:
        ValueError, TypeError: one sentence that says what was wrong and what would work.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> model = sten.sparsify(model, layout=sten.NM(2, 4))
        >>> model[0].weight
        Parameter(SparseTensor)(NM(n=2, m=4), shape=(32, 16), dtype=float32, density=0.5, requires_grad=True)
    """
    if calibration is not None and not (sparsifier is not None and sparsifier.needs & {"x_norm", "x_gram", "x_mean_var"}):
        raise ValueError(f"{sparsifier} reads no activations: leave calibration= out.")
    optimizers = _optimizers(optimizer)
    targets, skipped = select(model, layout, weights)
    _expect_in(optimizers, targets)
    changes = _decide(targets, sparsifier, allocation(sparsity))
    if optimizers is not None:
        _expect_trainable(changes)
        _attached.update(optimizers)
    for change in changes:
        _take_off_masks(change.target)
        param = nn.Parameter(change.tensor, requires_grad=change.target.tensor.requires_grad)
        _put(change.target, param, optimizers or [], lambda slot, w=change.tensor: w.values_like(slot), trainable=optimizers is not None)
        for module, name in change.target.owners:
            note(module, name, change.energy)
    note(model, None, [(t.name, tuple(t.tensor.shape), t.why) for t in skipped])
    return model


def plan(model, layout=NM(2, 4), sparsifier=Magnitude(), sparsity=None, weights=None, optimizer=None, calibration=None) -> Plan:  # noqa: B008
    """What `sparsify` with these arguments would do, printable; it changes nothing and raises what sparsify would raise.

    Example:
        >>> import torch, sten
        >>> plan = sten.plan(torch.nn.Linear(8, 4), layout=sten.CSR(), sparsity=0.5)
        >>> plan.rows[0].name, plan.rows[0].density
        ('weight', 0.5)
    """
    targets, skipped = select(model, layout, weights)
    _expect_in(_optimizers(optimizer), targets)
    changes = _decide(targets, sparsifier, allocation(sparsity))
    return Plan([*rows_of([(c.target.name, c.tensor, c.energy) for c in changes]), *rows_of([(t.name, t.tensor, t.why) for t in skipped])])


def _decide(targets: list[Target], sparsifier: Sparsifier | None, spread: Allocation | None) -> list[Change]:
    """The sparse tensor of every target, from the sparsifier's masks; nothing is changed yet."""
    if sparsifier is not None and not isinstance(sparsifier, Sparsifier):
        raise TypeError(f"sparsifier= takes a sparsifier such as sten.Magnitude() (an instance), or None; got {sparsifier!r}.")
    free = [t for t in targets if t.layout.rate is None]
    if spread is not None and (sparsifier is None or not free):
        for target in targets if sparsifier is not None else ():
            check_sparsity(spread.sparsity, target.layout)
        if sparsifier is None:
            raise ValueError("sparsifier=None keeps the existing non-zeros: leave sparsity= out.")
    generator = torch.Generator().manual_seed(0 if sparsifier is None else sparsifier.seed)
    with torch.no_grad():
        dense = {t.name: _dense(t) for t in targets}
        if sparsifier is None:
            return [_pack(t, dense[t.name], _existing(t, dense[t.name])) for t in targets]
        views = {t.name: View(t.name, dense[t.name], t.layout, None, _oriented(t, t.mask), 0, generator) for t in targets}
        scores = {t.name: _score(sparsifier, views[t.name]) for t in free} if spread is not None else {}
        counts = spread.assign({t.name: tuple(dense[t.name].shape) for t in free}, scores.get) if free and spread else {}
        changes = []
        for target in targets:
            size = max(dense[target.name].numel(), 1)
            sparsity = 1 - counts[target.name] / size if target.name in counts else None
            score = scores[target.name] if target.name in scores else _score(sparsifier, views[target.name])
            changes.append(_pack(target, dense[target.name], target.layout.mask(score, sparsity)))
        return changes


def _score(sparsifier: Sparsifier, view: View) -> Tensor:
    """A method's scores; entries that an earlier pruning masked out come after all others."""
    score = sparsifier.score(view)
    return score if view.mask is None else score.masked_fill(~view.mask, -torch.inf)


def _oriented(target: Target, tensor: Tensor | None) -> Tensor | None:
    return tensor.t() if target.transposed and tensor is not None else tensor


def _dense(target: Target) -> Tensor:
    """The weight as a detached dense tensor in the orientation of the layout, pruning masks applied."""
    tensor = target.tensor.detach()
    tensor = tensor.to_dense() if isinstance(tensor, SparseTensor) else tensor
    return _oriented(target, tensor if target.mask is None else tensor * target.mask)


def _existing(target: Target, dense: Tensor) -> Tensor:
    """The mask that keeps what is there; an n:m layout fills the slots that are left with zeros."""
    mask = dense != 0 if target.mask is None else _oriented(target, target.mask)
    if target.layout.rate is None:
        return mask
    full = target.layout.mask(torch.where(mask, dense.abs(), -torch.ones_like(dense)))
    if bool((mask & ~full).any()):
        raise ValueError(f"The non-zeros of {target.name} do not fit {target.layout}; pass a sparsifier to choose among them.")
    return full


def _pack(target: Target, dense: Tensor, mask: Tensor) -> Change:
    tensor = from_dense(dense, target.layout, mask)
    total = dense.abs().double().sum()
    energy = float((dense.abs().double() * mask).sum() / total) if total > 0 else 1.0
    return Change(target, tensor.t() if target.transposed else tensor, energy)


def _take_off_masks(target: Target) -> None:
    """Remove torch's pruning reparametrization; the Parameter goes back under its own name."""
    for module, name in target.owners:
        if target.mask is None:
            return
        if name + "_orig" in module._parameters:
            param = module._parameters.pop(name + "_orig")
            module._buffers.pop(name + "_mask")
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "_tensor_name", None) == name:
                    del module._forward_pre_hooks[key]
            module.__dict__.pop(name, None)
            module.register_parameter(name, param)
        else:
            param = module.parametrizations[name].original
            nn.utils.parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            module._parameters[name] = param


def _put(target: Target, param: nn.Parameter, optimizers: list[Optimizer], repack: Callable[[Tensor], Tensor], trainable: bool) -> None:
    """Give a weight its new form: a Parameter in place of the old one, with the old one's identity."""
    old = target.tensor
    holder = SparseWeight(param) if trainable else None
    new = holder.values if trainable else param
    shape = old.shape
    kept = _become(old, new, target.owners, optimizers)
    if trainable:
        holder._parameters["values"] = kept
    for module, name in target.owners:
        if trainable:
            install(module, name, holder)
        else:
            module._parameters[name] = kept
        keep_loadable(module)
    _repack_slots(optimizers, kept, shape, repack)


def _become(old: Tensor, new: nn.Parameter, owners, optimizers: list[Optimizer]) -> Tensor:
    """Make the object `old` hold what `new` holds, so that every reference survives; if a graph still holds it, replace it."""
    try:
        torch.utils.swap_tensors(old, new)
        return old
    except RuntimeError:  # a graph of an earlier step is alive (`loss` was kept): its own reference must stay what it is
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)
        return new


def _repack_slots(optimizers: Iterable[Optimizer], param: Tensor, shape: torch.Size, repack: Callable[[Tensor], Tensor]) -> None:
    """Give every slot of the parameter's own (old) shape the parameter's new form."""
    for optimizer in optimizers:
        for key, slot in optimizer.state.get(param, {}).items():
            if isinstance(slot, Tensor) and slot.shape == shape and slot.dim() > 0:
                with torch.no_grad():
                    optimizer.state[param][key] = repack(slot)


def _optimizers(optimizer: Optimizers) -> list[Optimizer] | None:
    if optimizer is None:
        return None
    found = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    if not found or not all(isinstance(o, Optimizer) for o in found):
        raise TypeError(f"optimizer= takes a torch.optim.Optimizer or a list of them; got {optimizer!r}.")
    if any(isinstance(o, torch.optim.LBFGS) for o in found):
        raise TypeError("LBFGS keeps the parameters flattened in its history: train sparse weights with SGD, Adam, AdamW or the like.")
    return found


def _expect_in(optimizers: list[Optimizer] | None, targets: list[Target]) -> None:
    if optimizers is None:
        return
    held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    for target in targets:
        if target.tensor.requires_grad and id(target.tensor) not in held:
            raise ValueError(f"{target.name} is not in the optimizer: make the optimizer from this model's parameters first.")


def _expect_trainable(changes: list[Change]) -> None:
    for change in changes:
        if any(isinstance(module, nn.RNNBase) for module, _ in change.target.owners):
            raise TypeError(f"{change.target.name} lies in a fused recurrent layer, which keeps its own list of weights: it cannot train sparse.")


def _sparse_parameters(model: nn.Module) -> list[Target]:
    """Every SparseTensor Parameter, once, with all its owners."""
    found: dict[int, Target] = {}
    for prefix, module in model.named_modules():
        for name, param in module._parameters.items():
            if isinstance(param, SparseTensor):
                full = f"{prefix}.{name}" if prefix else name
                found.setdefault(id(param), Target(full, [], param)).owners.append((module, name))
    return list(found.values())


def trainable(model: nn.Module) -> nn.Module:
    """Give every SparseTensor Parameter its trainable form, in place: a plain `values` Parameter beside the pattern.

    Optimizers made afterwards see ordinary tensors; `sparsify(optimizer=)` and `attach` do it for one that exists.

    Example:
        >>> import torch, sten
        >>> model = sten.trainable(sten.sparsify(torch.nn.Linear(8, 4)))
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        [('bias', (4,)), ('sparse_weight.values', (4, 4))]
    """
    return _train(model, list(_attached))


def attach(model: nn.Module, optimizer: Optimizers) -> nn.Module:
    """Make a sparse model trainable under an optimizer that was made from its SparseTensor Parameters.

    The same as `sparsify(optimizer=)`, for optimizers that a trainer makes later. Parameters keep their identity, groups
    and state.

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
    targets = _sparse_parameters(model)
    _expect_in(optimizers, targets)
    _attached.update(optimizers)
    return _train(model, optimizers)


def _train(model: nn.Module, optimizers: list[Optimizer]) -> nn.Module:
    targets = _sparse_parameters(model)
    _expect_trainable([Change(t, t.tensor, 1.0) for t in targets])
    for target in targets:
        param = target.tensor
        _put(target, _same(param), optimizers, lambda slot: slot.parts["values"] if isinstance(slot, SparseTensor) else slot, True)
    return model


def _same(param: SparseTensor) -> nn.Parameter:
    return nn.Parameter(param.detach(), requires_grad=param.requires_grad)


def _tied_holders(model: nn.Module) -> list[tuple[Target, SparseWeight]]:
    found: dict[int, tuple[Target, SparseWeight]] = {}
    for full, module, name, holder in holders(model):
        target, _ = found.setdefault(id(holder), (Target(full, [], holder.values), holder))
        target.owners.append((module, name))
    return list(found.values())


def _settle(model: nn.Module, change: Callable[[SparseTensor], Tensor]) -> nn.Module:
    """Give every sparse weight, in either form, the Parameter that `change` makes of it; all are made before one is set."""
    ready = []
    with torch.no_grad():
        for target in _sparse_parameters(model):
            ready.append((target, None, target.tensor.detach(), change(target.tensor.detach())))
        for target, holder in _tied_holders(model):
            ready.append((target, holder, holder.tensor().detach(), change(holder.tensor().detach())))
    for target, holder, before, after in ready:
        old, grad = target.tensor, target.tensor.requires_grad
        if holder is not None:
            for module, name in target.owners:
                remove(module, name, old)
        param = nn.Parameter(after, requires_grad=grad)

        def repack(slot, before=before, holder=holder):
            return change(slot if isinstance(slot, SparseTensor) else before.with_values(slot) if holder is not None else slot)

        _put(target, param, list(_attached), repack, trainable=False)
    return model


def finalize(model: nn.Module, layout: Layout | None = None) -> nn.Module:
    """End of training: every sparse weight becomes a SparseTensor Parameter, stored in its own layout or in `layout`.

    The fastest form to call. With `layout`, the stored entries must fit it.

    Example:
        >>> import torch, sten
        >>> model = sten.trainable(sten.sparsify(torch.nn.Linear(8, 4)))
        >>> sten.finalize(model).weight.spec
        NM(n=2, m=4)
    """
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"layout= takes a layout such as sten.CSR(), or None; got {layout!r}.")

    def change(w: SparseTensor) -> Tensor:
        if layout is None or layout == w.spec:
            return w
        stored = w.t() if w.transposed else w
        new = from_dense(stored.to_dense(), layout, stored.mask())
        return new.t() if w.transposed else new

    return _settle(model, change)


def densify(model: nn.Module) -> nn.Module:
    """Back to plain dense Parameters with the same numbers, in place.

    Example:
        >>> import torch, sten
        >>> model = sten.densify(sten.sparsify(torch.nn.Linear(8, 4)))
        >>> type(model.weight).__name__
        'Parameter'
    """
    return _settle(model, lambda w: w.to_dense().contiguous())


def finalize_names(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the names it has when finalized: sparse weights of either form as SparseTensors."""
    state = {name: value for name, value in model.state_dict(keep_vars=True).items()}
    for full, _, _, holder in holders(model):
        for part in holder.parts:
            del state[f"{full}.{part}"]
        state[full] = SparseTensor(holder.spec, holder.parts, holder.shape, holder.transposed)
    return state


def become_sparse(model: nn.Module, weights: dict[str, SparseTensor]) -> None:
    """Give the named weights of a model, dense or sparse, these SparseTensors as Parameters; ties stay ties."""
    _settle(model, lambda w: w)
    found: dict[int, tuple[Target, SparseTensor]] = {}
    for full, target in all_weights(model).items():
        if full in weights:
            known, _ = found.setdefault(id(target.tensor), (Target(full, [], target.tensor, target.mask), weights[full]))
            known.owners.extend(target.owners)
    for target, w in found.values():
        _take_off_masks(target)
        param = nn.Parameter(w.to(target.tensor.device), requires_grad=target.tensor.requires_grad)
        _put(target, param, [], lambda slot: slot, trainable=False)
