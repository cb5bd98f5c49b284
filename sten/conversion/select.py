"""Which parameters of a model become sparse, in which layout, and why the others do not: one walk of its modules."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..layouts.base import Layout
from ..tensor import SparseTensor
from ..training.attribute import trained_of
from ..training.trained_weight import TrainedWeight
from .exclusions import expect_one_mask, recomputed, without_gradient

Weights = str | Iterable[str] | Callable[[str, nn.Module, str], bool] | None
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "FSDPModule"}


@dataclass
class Target:
    """One weight: its name, the modules that own it (several where it is tied), and its present form.

    Attributes:
        name: full name, as `module.weight`; that of the first owner where it is tied.
        owners: (module, attribute) pairs.
        tensor: the Parameter: dense, a SparseTensor, or what is trained in its place.
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
    mask: Tensor | None = None
    layout: Layout | None = None
    why: str = ""
    names: list[str] = field(default_factory=list)
    weight: TrainedWeight | None = None
    transposed: bool = False
    result: SparseTensor | None = None
    energy: float | None = None

    @property
    def stored(self) -> SparseTensor | None:
        """The weight as a SparseTensor, where it is sparse already."""
        if self.weight is not None:
            return self.weight.tensor().detach()
        return self.tensor.detach() if isinstance(self.tensor, SparseTensor) else None


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Conv1D: a linear layer whose weight is (in, out)."""
    names = [(cls.__name__, cls.__module__.partition(".")[0]) for cls in type(module).__mro__]
    return ("Conv1D", "transformers") in names


def is_default(module: nn.Module, name: str) -> bool:
    """The weights that `sparsify` takes when it is not told which."""
    if isinstance(module, nn.MultiheadAttention):
        return name in ATTENTION
    return name == "weight" and (isinstance(module, nn.Linear) or is_conv1d(module))


def all_weights(model: nn.Module, wrapped: bool = False) -> list[Target]:
    """Every parameter of two or more dimensions, tied ones once for each owner, in whatever form they are.

    Raises:
        TypeError: no module, or one that DDP or FSDP holds references into, unless `wrapped` allows that.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected an nn.Module, got {type(model).__name__}.")
    found: list[Target] = []
    for prefix, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in WRAPPERS and not wrapped:
                kind = "fully_shard" if cls.__name__ == "FSDPModule" else cls.__name__
                raise TypeError(
                    f"The model is wrapped in {kind} already: call sten on the inner model first, then wrap the result."
                )
        if not isinstance(module, (TrainedWeight, nn.utils.parametrize.ParametrizationList)):
            _add_weights(found, module, prefix + "." if prefix else "")
    return found


def _add_weights(found: list[Target], module: nn.Module, prefix: str) -> None:
    """The weights of one module."""
    trained = dict(trained_of(module)) if hasattr(module, "sparse_names") else {}
    hooked = recomputed(module)
    for name, tensor in module._parameters.items():
        if name in hooked:
            attribute, why = hooked[name]
            if why and tensor.dim() > 1:
                found.append(Target(prefix + attribute, [(module, attribute)], tensor, why=why))
            continue
        if name in trained:
            trained[name].add_owner(module, name)
            found.append(Target(prefix + name, [(module, name)], tensor, weight=trained[name]))
        elif tensor is not None and tensor.dim() > 1:
            plain = name.removesuffix("_orig")  # as torch.nn.utils.prune renames a pruned parameter
            mask = module._buffers.get(plain + "_mask") if plain != name else None
            full = plain if isinstance(mask, Tensor) else name
            mask = mask.bool() if isinstance(mask, Tensor) else None
            found.append(Target(prefix + full, [(module, full)], tensor, mask))
        else:
            continue
        found[-1].transposed = not isinstance(module, nn.Linear) and is_conv1d(module)
    if "parametrizations" in module._modules:
        _add_parametrized(found, module, prefix)


def _add_parametrized(found: list[Target], module: nn.Module, prefix: str) -> None:
    """torch.ao.pruning's masks are taken over; every other parametrization keeps a weight dense."""
    for name, steps in module.parametrizations.items():
        masks = [step.mask for step in steps if type(step).__name__ == "FakeSparsity"]
        if len(masks) == len(steps) == 1:
            found.append(Target(prefix + name, [(module, name)], steps.original, masks[0].bool()))
            continue
        originals = [p for p in steps.parameters(recurse=False) if p.dim() >= 2]
        if originals:
            kinds = ", ".join(type(step).__name__ for step in steps)
            why = f"it is parametrized by {kinds}: remove that first"
            found.append(Target(prefix + name, [(module, name)], max(originals, key=Tensor.numel), why=why))


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


def matches(pattern: str, name: str) -> bool:
    """A glob over the whole name, or a regular expression after "re:"."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}.") from None
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _is_plain(pattern: str) -> bool:
    return not pattern.startswith("re:") and not any(c in pattern for c in "*?[")


def select(
    model: nn.Module, layout: Layout | dict[str, Layout | None], weights: Weights, dynamic: str = ""
) -> tuple[list[Target], list[Target]]:
    """(targets with their layout, the other weights with the reason); one sentence for what cannot be meant.

    `dynamic` is the name of a method that acts during training: it leaves frozen weights out.
    """
    found = all_weights(model)
    rules = _layouts(layout)
    chosen, named = _chosen(found, weights, rules)
    for target in found:
        if target.weight is not None:
            target.why = "it is in trainable form already: sten.finalize the model first"
        if not target.why:
            target.why = _reason(target, target.name in chosen, target.name in named, rules, weights is None)
            if not target.why and dynamic:
                target.why = without_gradient(target, dynamic, target.name in named)
        elif target.name in named:
            raise ValueError(f"{target.name} cannot be made sparse: {target.why}.")
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


def _layouts(layout) -> list[tuple[str, Layout | None]]:
    pairs = list(layout.items()) if isinstance(layout, dict) else [("*", layout)]
    for pattern, value in pairs:
        if not isinstance(pattern, str) or not (
            isinstance(value, Layout) or (value is None and isinstance(layout, dict))
        ):
            raise TypeError(
                f"layout= takes a layout such as sten.NM(2, 4), or a dict of pattern: layout or None; got {value!r}."
            )
    return pairs


def _chosen(found: list[Target], weights: Weights, rules) -> tuple[set[str], set[str]]:
    """(names chosen, names written out in full): from `weights`, or the default kinds and full names in the layouts."""
    patterns, chosen, named = [], set(), set()
    for pattern, _ in rules:
        if pattern != "*":
            patterns.append(pattern)
    if weights is None or callable(weights):
        named = set(filter(_is_plain, patterns))
        for target in found:
            for module, name in target.owners:
                if target.name in named or (
                    weights(target.name, module, name) if weights else is_default(module, name)
                ):
                    chosen.add(target.name)
    else:
        requested = [weights] if isinstance(weights, str) else list(weights)
        if not all(isinstance(p, str) for p in requested):
            raise TypeError(
                f"weights= takes a pattern, a list of them, or predicate(name, module, attribute); got {weights!r}."
            )
        patterns = [*requested, *patterns]
        chosen = {t.name for t in found if any(matches(p, t.name) for p in requested)}
        named = set(filter(_is_plain, requested))
    for pattern in patterns:
        if not any(matches(pattern, target.name) for target in found):
            raise ValueError(
                f"The pattern {pattern!r} matches no weight of two or more dimensions; there are {_some(found)}."
            )
    return chosen, named


def _some(targets: list[Target]) -> str:
    names = [target.name for target in targets]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "none"


def _reason(target: Target, chosen: bool, named: bool, rules, default: bool) -> str:
    """Why a weight stays dense; sets its layout where it does not."""
    if not chosen:
        kind, dims = type(target.owners[0][0]).__name__, target.tensor.dim()
        stack = f" but a {dims}-D one" if dims > 2 else ""
        return (
            f"{kind} has no linear weight{stack}: name it in weights= to choose it"
            if default
            else "not chosen by weights="
        )
    if isinstance(target.tensor, SparseTensor) and not named:
        return "it is sparse already; sten.densify it first, or name it in full"
    for pattern, layout in rules:
        if pattern == "*" or matches(pattern, target.name):
            target.layout = layout
            return "" if layout is not None else f"the layout of {pattern!r} is None"
    return "no pattern of layout= matches it"


def _tie(found: list[Target], named: set[str]) -> list[Target]:
    """One Target a tensor. A tie between a target and another weight is no target, or an error if it was named."""
    groups: dict[int, list[Target]] = {}
    for target in found:
        target.names = [target.name]
        groups.setdefault(id(target.tensor), []).append(target)
    return [members[0] if len(members) == 1 else _tied(members, named) for members in groups.values()]


def _tied(members: list[Target], named: set[str]) -> Target:
    first = next((t for t in members if not t.why), members[0])
    others = [t for t in members if t.why and t is not first]
    if not first.why and others:
        if first.name in named:
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
    tensor, shape = target.tensor, tuple(target.tensor.shape)
    if tensor.is_meta:
        raise ValueError(f"{target.name} is on the meta device, without numbers to choose by: load the model first.")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{target.name} holds {tensor.dtype}: only floating-point weights can be sparse; leave it out.")
    try:
        target.layout.check(shape[::-1] if target.transposed else shape)
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from None
