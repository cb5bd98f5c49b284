"""Which parameters of a model become sparse, in which layout, and why the others do not: one walk of its modules."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..calibration.data import RUNNING
from ..layouts.base import Layout
from ..tensor import SparseTensor
from ..training.attribute import trained_of
from ..training.trained_weight import TrainedWeight
from .arguments import Layouts, Pattern, Weights, requested_weights
from .defaults import is_conv1d, is_linear, kept_dense
from .exclusions import expect_one_mask, recomputed, stored_by_others, without_gradient

WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "FSDPModule"}


@dataclass
class Target:
    """One weight: its name, the modules that own it (several where it is tied), and its present form.

    Attributes:
        name: full name, as `module.weight`; that of the first owner where it is tied.
        owners: (module, attribute) pairs.
        tensor: the Parameter: dense, a SparseTensor, or what is trained in its place.
        around: (name, module) of the modules that contain the weight, the model itself first and its owner last.
        mask: the mask of torch.nn.utils.prune or torch.ao.pruning, if the weight has one.
        layout: what it becomes.
        why: what keeps it dense; empty for a target.
        names: all its names.
        weight: of the trainable form; None in the others.
        transposed: whether the reduction runs along dimension 0, as in Hugging Face's Conv1D: the transpose is stored.
        result: what it becomes (a dense weight under a method: at the end), once `plan.decide` has decided.
        energy: the share of sum |w| that this keeps.
    """

    name: str
    owners: list[tuple[nn.Module, str]]
    tensor: Tensor
    around: list[tuple[str, nn.Module]] = field(default_factory=list)
    mask: Tensor | None = None
    layout: Layout | None = None
    why: str = ""
    names: list[str] = field(default_factory=list)
    weight: TrainedWeight | None = None
    transposed: bool = False
    result: SparseTensor | None = None
    energy: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight, whatever form it is in."""
        if self.weight is None:
            return tuple(self.tensor.shape)
        return self.weight.shape[::-1] if self.weight.transposed else self.weight.shape

    @property
    def stored(self) -> SparseTensor | None:
        """The weight as a SparseTensor, where it is sparse already."""
        if self.weight is not None:
            self.weight.expect_numbers()
            return self.weight.tensor().detach()
        return self.tensor.detach() if isinstance(self.tensor, SparseTensor) else None


def expect_model(model: nn.Module) -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(
            f"Expected an nn.Module, got {kind}; pass the model itself, not its path, parameters or state_dict."
        )


def expect_idle(model: nn.Module) -> None:
    """Raise RuntimeError if a calibration runs the model now."""
    if model.__dict__.get(RUNNING) == id(model):
        raise RuntimeError(
            f"Expected no conversion of {type(model).__name__} while sten runs it for calibration=, got one in its "
            "forward pass, by a hook or forward itself; call it before or afterwards."
        )


def expect_unwrapped(model: nn.Module) -> None:
    """Raise TypeError if DDP or FSDP holds references into the model."""
    for cls in (cls for module in model.modules() for cls in type(module).__mro__):
        if cls.__name__ in WRAPPERS:
            kind = "fully_shard" if cls.__name__ == "FSDPModule" else cls.__name__
            raise TypeError(
                f"The model is wrapped in {kind} already: call sten on the inner model first, then wrap the result."
            )


def all_weights(model: nn.Module, wrapped: bool = False) -> list[Target]:
    """Every parameter of two or more dimensions, tied ones once for each owner, in whatever form they are.

    Raises:
        TypeError: no module, or one that DDP or FSDP holds references into, unless `wrapped` allows that.
    """
    expect_model(model)
    expect_idle(model)
    if not wrapped:
        expect_unwrapped(model)
    found: list[Target] = []
    around: dict[str, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        outer = around[prefix.rpartition(".")[0]] if prefix else []
        around[prefix] = [*outer, (prefix, module)]
        if not isinstance(module, (TrainedWeight, nn.utils.parametrize.ParametrizationList)):
            _add_weights(found, around[prefix])
    return found


def _add_weights(found: list[Target], around: list[tuple[str, nn.Module]]) -> None:
    """The weights of one module, the last one of `around`."""
    prefix, module = around[-1]
    prefix = prefix + "." if prefix else ""
    trained = dict(trained_of(module)) if hasattr(module, "sparse_names") else {}
    hooked = recomputed(module)
    for name, tensor in module._parameters.items():
        if is_lazy(tensor):
            raise ValueError(
                f"Expected initialized parameters, got {prefix}{name} of {type(module).__name__} without "
                "a shape; run the model once first."
            )
        if name in hooked:
            attribute, why = hooked[name]
            if why and tensor.dim() > 1:
                found.append(Target(prefix + attribute, [(module, attribute)], tensor, around, why=why))
            continue
        if name in trained:
            trained[name].add_owner(module, name)
            found.append(Target(prefix + name, [(module, name)], tensor, around, weight=trained[name]))
        elif tensor is not None and tensor.dim() > 1:
            plain = name.removesuffix("_orig")  # as torch.nn.utils.prune renames a pruned parameter
            mask = module._buffers.get(plain + "_mask") if plain != name else None
            full = plain if isinstance(mask, Tensor) else name
            mask = mask.bool() if isinstance(mask, Tensor) else None
            why = stored_by_others(tensor)
            found.append(Target(prefix + full, [(module, full)], tensor, around, mask, why=why))
        else:
            continue
        found[-1].transposed = not isinstance(module, nn.Linear) and is_conv1d(module)
    if "parametrizations" in module._modules:
        _add_parametrized(found, around, prefix)


def _add_parametrized(found: list[Target], around: list[tuple[str, nn.Module]], prefix: str) -> None:
    """torch.ao.pruning's masks are taken over; every other parametrization keeps a weight dense."""
    module = around[-1][1]
    for name, steps in module.parametrizations.items():
        masks = [step.mask for step in steps if type(step).__name__ == "FakeSparsity"]
        if len(masks) == len(steps) == 1:
            found.append(Target(prefix + name, [(module, name)], steps.original, around, masks[0].bool()))
            continue
        originals = [p for p in steps.parameters(recurse=False) if p.dim() >= 2]
        if originals:
            kinds = ", ".join(type(step).__name__ for step in steps)
            why = f"it is parametrized by {kinds}: remove that first"
            found.append(Target(prefix + name, [(module, name)], max(originals, key=Tensor.numel), around, why=why))


def once_each(targets: Iterable[Target]) -> list[Target]:
    """One Target a tensor, with all its owners and names."""
    found: dict[int, Target] = {}
    for one in targets:
        target = found.setdefault(id(one.tensor), one)
        target.names.append(one.name)
        if target is not one:
            target.owners.extend(one.owners)
            target.transposed |= one.transposed
    return list(found.values())


def sparse_weights(model: nn.Module) -> list[Target]:
    """Every sparse weight of a model, in either form, once, with all its owners."""
    return once_each(t for t in all_weights(model) if t.weight is not None or isinstance(t.tensor, SparseTensor))


def movable_weights(model: nn.Module) -> list[Target]:
    """The same, for a move between forms; ValueError if a parametrization, such as an adapter, computes one of them."""
    targets = sparse_weights(model)
    for target in targets:
        if target.why:
            raise ValueError(
                f"Expected sparse weights without parametrizations, got {target.name} ({target.why}); for adapters, "
                "call sten.merge_adapters."
            )
    return targets


def matches(pattern: Pattern, target: Target) -> bool:
    """Whether a pattern names a weight.

    A text is a glob over the names of the weight and of the modules around it, or after "re:" a regular expression over
    the weight's name; a module or a type of modules names the weights in it.
    """
    if isinstance(pattern, nn.Module):
        return any(module is pattern for _, module in target.around)
    if isinstance(pattern, type):
        return any(isinstance(module, pattern) for _, module in target.around)
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], target.name) is not None
        except re.error as error:
            raise ValueError(
                f"Expected a regular expression after 're:', got {pattern[3:]!r} ({error}); 're:.*' matches all names."
            ) from None
    names = [target.name, *(name for name, _ in target.around)]
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)


def _names_alone(pattern: Pattern, target: Target) -> bool:
    """Whether a pattern is the full name of this weight or of the module that has it, or that module."""
    name, module = target.around[-1]
    return pattern is module or (isinstance(pattern, str) and pattern in (target.name, name))


def select(model: nn.Module, layout: Layouts, weights: Weights, dynamic: str = "") -> tuple[list[Target], list[Target]]:
    """(targets with their layout, the other weights with the reason); one sentence for what cannot be meant.

    `dynamic` is the name of a method that acts during training: it leaves frozen weights out.
    """
    found = all_weights(model)
    rules = list(layout.items()) if isinstance(layout, dict) else [("*", layout)]
    requested = requested_weights(weights)
    patterns = [*dict(rules), *(requested if isinstance(requested, list) else ())]
    for pattern in patterns:
        if pattern != "*" and not any(matches(pattern, target) for target in found):
            raise ValueError(
                f"Expected {shown(pattern)} to match a weight of two or more dimensions, got none; there are "
                f"{_some(found)}{_closest(pattern, found)}."
            )
    left_dense = {pattern for pattern, layout in rules if layout is None}
    named = [pattern for pattern in patterns if pattern not in left_dense]
    reasons = _not_chosen(model, found, requested, rules)
    for target in found:
        if target.why and any(_names_alone(pattern, target) for pattern in named):
            raise ValueError(f"{target.name} cannot be made sparse: {target.why}.")
        target.why = target.why or reasons[target.name] or _without_layout(target, rules)
        if dynamic and not target.why:
            alone = any(_names_alone(pattern, target) for pattern in named)
            target.why = without_gradient(target, dynamic, alone)
    targets, others = [], []
    for target in _tie(found, named):
        (others if target.why else targets).append(target)
    if not targets:
        reasons = "; ".join(sorted({t.why for t in others}))[:300]
        reasons = reasons or "the model has no parameter of two or more dimensions"
        kind = type(model).__name__
        raise ValueError(f"No weight of {kind} is left to make sparse ({reasons}): choose with weights=.")
    for target in targets:
        _check(target)
    return targets, others


def _not_chosen(model: nn.Module, found: list[Target], requested, rules) -> dict[str, str]:
    """By name, why a weight is not chosen; empty if it is: by `weights`, or by default and by the layouts' patterns."""
    if requested is not None:
        chosen = set()
        for target in found:
            if isinstance(requested, list):
                wanted = any(matches(pattern, target) for pattern in requested)
            else:
                wanted = any(requested(target.name, module, name) for module, name in target.owners)
            if wanted:
                chosen.add(target.name)
        return {t.name: "" if t.name in chosen else "not chosen by weights=" for t in found}
    tied = Counter(id(target.tensor) for target in found)
    dense, reasons = kept_dense(model), {}
    written = [pattern for pattern, _ in rules if pattern != "*"]
    for target in found:
        module, name = target.owners[0]
        reason = ""
        if not any(matches(pattern, target) for pattern in written):
            if not is_linear(module, name):
                dims = len(target.shape)
                reason = f"{type(module).__name__} has no linear weight{f' but a {dims}-D one' if dims > 2 else ''}"
            elif tied[id(target.tensor)] == 1:
                reason = dense.get(id(module), "")
        reasons[target.name] = reason and f"{reason}: name it in weights= to choose it"
    return reasons


def _without_layout(target: Target, rules) -> str:
    """Set the layout of a chosen weight; why it has none."""
    for pattern, layout in rules:
        if pattern == "*" or matches(pattern, target):
            target.layout = layout
            return "" if layout is not None else f"the layout of {shown(pattern)} is None"
    return "no pattern of layout= matches it"


def shown(pattern: Pattern) -> str:
    """A pattern in messages."""
    if isinstance(pattern, str):
        return repr(pattern)
    return pattern.__name__ if isinstance(pattern, type) else f"this {type(pattern).__name__}"


def _some(targets: list[Target]) -> str:
    names = [target.name for target in targets]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "none"


def _closest(pattern: Pattern, targets: list[Target]) -> str:
    """The glob that would match, where a text is a part of names."""
    if isinstance(pattern, str) and any(pattern in target.name for target in targets):
        return f"; '*{pattern}*' matches names that contain it"
    return ""


def _tie(found: list[Target], named: list[Pattern]) -> list[Target]:
    """One Target a tensor. A tie between a target and another weight is no target, or an error if it was named."""
    groups: dict[int, list[Target]] = {}
    for target in found:
        target.names = [target.name]
        groups.setdefault(id(target.tensor), []).append(target)
    return [members[0] if len(members) == 1 else _tied(members, named) for members in groups.values()]


def _tied(members: list[Target], named: list[Pattern]) -> Target:
    first = next((t for t in members if not t.why), members[0])
    others = [t for t in members if t.why and t is not first]
    if not first.why and others:
        if any(_names_alone(pattern, first) for pattern in named):
            raise ValueError(
                f"{first.name} is tied to {others[0].name}, which is not chosen: name both, or untie them."
            )
        first.why = f"tied to {others[0].name}, which is not chosen"
    if not first.why:
        expect_one_mask(members)
    if not first.why and len({t.layout for t in members}) > 1:
        raise ValueError(f"{first.name} and {members[-1].name} are one tied weight: give both the same layout.")
    first.owners = [owner for t in members for owner in t.owners]
    first.names = [t.name for t in members]
    first.transposed = any(t.transposed for t in members)
    return first


def _check(target: Target) -> None:
    tensor, shape = target.tensor, target.shape
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{target.name} is stored as {tensor.layout}: call sten.from_torch(model) first, or .to_dense()."
        )
    if tensor.is_meta:
        raise ValueError(f"{target.name} is on the meta device, without numbers to choose by: load the model first.")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{target.name} holds {tensor.dtype}: only floating-point weights can be sparse; leave it out.")
    try:
        target.layout.check(shape[::-1] if target.transposed else shape)
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from None
