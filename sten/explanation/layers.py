"""Layers: the modules whose time is measured, each with its weights, and which kernels run in them.

A layer is the module that has a weight as its own parameter. Where that module is not called, as the output projection
of `nn.MultiheadAttention`, it is the innermost one around it that is; where `sten.fuse` runs several products together,
it is the module in which they all lie.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..calibration.trees import leaves
from ..conversion.fused_forward import FusedForward, SharedForward
from ..conversion.select import Target
from ..dispatch import observe
from ..kernel_table import Plan
from ..tensor import SparseTensor
from ..training.dense_weight import DenseWeight
from ..training.uninterrupted import uninterrupted

Signature = tuple[Any, ...]


@dataclass
class Layer:
    """A module, and the weights that are measured with it.

    Attributes:
        name, module: what is called.
        targets: its weights, a tied one with the owner that lies in this module.
        plans: what ran on its sparse weights, in the order of the calls.
        calls: how often the module is called with inputs of each signature.
    """

    name: str
    module: nn.Module
    targets: list[Target]
    plans: list[Plan] = field(default_factory=list)
    calls: Counter[Signature] = field(default_factory=Counter)

    @property
    def sparse(self) -> list[Target]:
        return [target for target in self.targets if is_sparse(target)]

    @property
    def input(self) -> tuple[int, ...]:
        """The shape of the first tensor that it gets, in its most frequent calls."""
        (first, _), *_ = max(self.calls, key=lambda key: self.calls[key]) or (((), None),)
        return first


def is_sparse(target: Target) -> bool:
    """Whether a weight is stored in a sparse layout, or a method trains it to be."""
    return target.weight is not None or isinstance(target.tensor, SparseTensor)


def layers_of(targets: list[Target], run: Callable[[], Any]) -> tuple[list[Layer], list[Target]]:
    """(the layers that `run`, which calls the model, uses; the weights that it does not), both in the order of targets.

    Args:
        targets: `all_weights` of the model.
    """
    homes = _homes(targets)
    hooked: dict[int, nn.Module] = {}
    for target in targets:
        inside = [module for _, module in target.around]
        until = inside.index(homes[target.name][1]) + 1 if homes[target.name][1] in inside else len(inside)
        hooked |= {id(module): module for module in inside[:until]}
    calls: dict[int, Counter[Signature]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.setdefault(id(module), Counter())[signature(args, kwargs)] += 1

    with before_calls(hooked.values(), note), observe() as seen:
        run()
    used: dict[int, list[Plan]] = {}
    for *_, parts, _, plan in seen:
        for part in parts.values():
            used.setdefault(part.data_ptr(), []).append(plan)
    found: dict[int, Layer] = {}
    idle = []
    for target in targets:
        plans = _plans(target, used)
        place = _called(target, homes[target.name], calls, plans)
        if place is None:
            idle.append(target)
            continue
        name, module = place
        layer = found.setdefault(id(module), Layer(name, module, [], calls=calls[id(module)]))
        layer.targets.append(target)
        layer.plans += [plan for plan in plans if plan not in layer.plans]
    return list(found.values()), idle


def _homes(targets: list[Target]) -> dict[str, tuple[str, nn.Module]]:
    """By name of a weight, its own module, or that in which `sten.fuse` runs it together with others."""
    together: dict[int, list[nn.Module]] = {}
    homes = {}
    for target in targets:
        for _, module in target.around:
            forward = vars(module).get("forward")
            if isinstance(forward, FusedForward):
                together |= {id(layer): [module] for layer in forward.layers.values()}
            elif isinstance(forward, SharedForward):
                together |= {id(layer): list(forward.shared.layers) for layer in forward.shared.layers}
    for target in targets:
        group = together.get(id(target.around[-1][1]))
        homes[target.name] = target.around[-1]
        for name, module in reversed(target.around):
            if group is not None and all(any(part is one for part in module.modules()) for one in group):
                homes[target.name] = (name, module)
                break
    return homes


def _plans(target: Target, used: dict[int, list[Plan]]) -> list[Plan]:
    """What ran on a weight; of a method that trains a dense weight, nothing sparse does."""
    if isinstance(target.weight, DenseWeight) or (stored := target.stored) is None:
        return []
    own = [stored.parts["values"], *(stored.parts[name] for name in stored.sparse_layout.pattern)]
    return next((used[part.data_ptr()] for part in own if part.data_ptr() in used), [])  # autocast copies the values


def _called(
    target: Target, home: tuple[str, nn.Module], calls: Mapping[int, Any], plans: list[Plan]
) -> tuple[str, nn.Module] | None:
    """The (name, module) that is measured for a weight; None if nothing says that it was used."""
    if id(home[1]) in calls:
        return home
    around = target.around[: next(i for i, (_, module) in enumerate(target.around) if module is home[1])]
    return next(((name, m) for name, m in reversed(around) if plans and id(m) in calls), None)


@contextlib.contextmanager
def before_calls(modules: Any, function: Callable[[nn.Module, tuple, dict], None]) -> Iterator[None]:
    """Call `function(module, args, kwargs)` before each call of these modules."""
    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(function, with_kwargs=True))
        yield
    finally:
        with uninterrupted():
            for handle in handles:
                handle.remove()


def signature(args: tuple, kwargs: dict) -> Signature:
    """Shapes and dtypes of all tensors: calls with one signature take one time."""
    tensors = [leaf for _, leaf in leaves([list(args), kwargs]) if isinstance(leaf, Tensor)]
    return tuple((tuple(t.shape), t.dtype) for t in tensors)
