"""The time of a layer as it is, with its weights dense, and in other layouts, on its inputs in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.substitute import substituted
from ..calibration.trees import leaves, mapped
from ..conversion.select import Target
from ..conversion.sensitivity import Candidate
from ..dispatch import observe
from ..layouts import BSR, CSR, NM, GroupedNM, VectorNM
from ..tensor import SparseTensor
from .layers import Layer, is_sparse
from .timing import Spread, take_turns

AT_ONCE = 2**24  # entries that are summed at a time


@dataclass(frozen=True)
class Alternative:
    """A layer's weights in another layout, chosen from the entries that they have now.

    Attributes:
        layout: how they would be stored, with the sparsity where the layout fixes none.
        speedup: the time of the dense layer divided by this one's.
        energy: the share of sum |w| of the present weights that stays.
        stored_bytes: of the weights.
    """

    layout: str
    speedup: Spread
    energy: float
    stored_bytes: int


@dataclass(frozen=True)
class Measurement:
    """Of one call of a layer, in seconds; `dense` and `speedup` are None where the layer is dense."""

    seconds: Spread
    dense: Spread | None = None
    speedup: Spread | None = None
    alternatives: tuple[Alternative, ...] = ()


def device_of(layer: Layer) -> torch.device:
    return layer.targets[0].tensor.device


def dense_value(target: Target) -> Tensor:
    """The numbers that a layer computes with, as a plain tensor."""
    stored = target.stored
    return target.tensor.detach() if stored is None else stored.to_dense().contiguous()


def measure(layer: Layer, args: tuple, kwargs: dict, seconds: float, candidates: Sequence[Candidate]) -> Measurement:
    """Time the layer on copies of these arguments, with its weights as they are, dense, and in the candidates."""
    args, kwargs = mapped(_copied, args), mapped(_copied, kwargs)
    module, device = layer.module, device_of(layer)

    inputs = [leaf for _, leaf in leaves([args, kwargs]) if isinstance(leaf, SparseTensor)]
    plain_args, plain_kwargs = mapped(_dense, args), mapped(_dense, kwargs)

    def call():
        return module.forward(*args, **kwargs)

    def call_dense():
        return module.forward(*plain_args, **plain_kwargs)

    def run(values: list[tuple[Target, Tensor]], call=call):
        weights = [(target.owners, value) for target, value in values]
        return (lambda: substituted(weights)), call

    sparse = layer.sparse
    if inputs:  # of a site, or of the sparse output before it: what runs is found here, not by the weight
        with observe() as seen:
            call()
        layer.plans += [plan for *_, plan in seen if plan not in layer.plans]
    if not sparse and not inputs and not candidates:
        return Measurement(Spread.of(take_turns([(contextlib.nullcontext, call)], device, seconds)[0]))
    now = [(target, dense_value(target)) for target in layer.targets]
    dense = [(target, value) for target, value in now if is_sparse(target)]
    others = [(candidate, new) for candidate in candidates if (new := _in(candidate, now)) is not None]
    runs = [(contextlib.nullcontext, call), run(dense, call_dense), *(run(new) for _, new in others)]
    whole = seconds * len(runs) / 2
    own, as_dense, *rest = take_turns(runs, device, whole)
    alternatives = tuple(
        Alternative(_title(candidate), _ratio(as_dense, times), _energy(now, new), _bytes(new))
        for (candidate, new), times in zip(others, rest, strict=True)
    )
    if not sparse and not inputs:
        return Measurement(Spread.of(own), alternatives=alternatives)
    return Measurement(Spread.of(own), Spread.of(as_dense), _ratio(as_dense, own), alternatives)


def _copied(leaf):
    """A layer may write to its inputs."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _dense(leaf):
    return leaf.to_dense() if isinstance(leaf, SparseTensor) else leaf


def _ratio(dense: list[float], other: list[float]) -> Spread:
    """Of the two times of each round."""
    return Spread.of([a / b for a, b in zip(dense, other, strict=True)])


def _title(candidate: Candidate) -> str:
    layout, sparsity = candidate
    return f"{layout}" if sparsity is None else f"{layout} at {sparsity:.3g}"


def _in(candidate: Candidate, values: list[tuple[Target, Tensor]]) -> list[tuple[Target, Tensor]] | None:
    """The weights in a candidate, their largest entries kept; None if it cannot store one of them."""
    layout, sparsity = candidate
    found = []
    for target, dense in values:
        w = dense.t() if target.transposed else dense
        try:
            layout.check(tuple(w.shape))
        except ValueError:
            return None  # one candidate less
        w = w.contiguous()
        mask = layout.mask(w.abs(), sparsity)
        new = SparseTensor(layout, layout.pack(w, mask), tuple(w.shape))
        found.append((target, new.t() if target.transposed else new))
    return found


def _energy(now: list[tuple[Target, Tensor]], new: list[tuple[Target, Tensor]]) -> float:
    whole = sum(_total(value) for _, value in now)
    return sum(_total(value.parts["values"]) for _, value in new) / whole if whole else 1.0


def _total(w: Tensor) -> float:
    return sum(float(part.abs().sum(dtype=torch.float32)) for part in w.detach().flatten().split(AT_ONCE))


def _bytes(new: list[tuple[Target, Tensor]]) -> int:
    return sum(value.stored_bytes for _, value in new)


def candidates_at(density: float, present: set[str]) -> list[Candidate]:
    """Layouts that store about as many entries, other than the present ones."""
    m, sparsity = max(round(1 / max(density, 1e-3)), 2), 1 - density
    found: list[Candidate] = [(VectorNM(1, m, 64), None), (GroupedNM(1, m, 8), None), (BSR((64, 64)), sparsity)]
    found.append((CSR(), sparsity))
    if 0.4 < density < 0.6:
        found.append((NM(2, 4), None))
    return [one for one in found if str(one[0]) not in present]


def is_linear_alone(layer: Layer) -> bool:
    """Whether the layer is a matrix product with its only weight, so that any layout could store that."""
    module: nn.Module = layer.module
    return len(layer.targets) == 1 and len(layer.targets[0].shape) == 2 and not isinstance(module, nn.Embedding)
