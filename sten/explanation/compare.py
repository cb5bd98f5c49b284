"""compare: two models on the same inputs: how far their outputs are apart, time and bytes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import markup
from ..calibration.data import inference
from ..calibration.trees import leaves
from ..conversion.select import all_weights
from ..tensor import SparseTensor
from .inputs import call_of, device_of, place_of
from .timing import Spread, take_turns


@dataclass(frozen=True)
class Distance:
    """Of one output of floating point.

    Attributes:
        name: where it is in the outputs; empty for a single tensor.
        relative: |dense - sparse| / |dense|.
        largest: the largest absolute difference of two elements.
        agree: of scores (`logits`, or a single output of two dimensions), the share of rows with the same largest
            element; None for others.
    """

    name: str
    relative: float
    largest: float
    agree: float | None


@dataclass(frozen=True)
class Comparison(markup.Tabular):
    """What `sten.compare` found; it prints as a table.

    Attributes:
        outputs: a `Distance` for each output.
        dense, sparse: seconds of one call.
        speedup: dense / sparse, round by round.
        bytes: of all parameters and buffers, of both.
        densities: of the weights of two or more dimensions, of both.
        where: the device.
    """

    outputs: list[Distance]
    dense: Spread
    sparse: Spread
    speedup: Spread
    bytes: tuple[int, int]
    densities: tuple[float, float]
    where: str

    numeric = (1, 2, 3)

    def header(self) -> list[str]:
        return ["", "dense", "sparse", "dense / sparse"]

    def cells(self) -> list[list[str]]:
        speedup = f"{self.speedup.median:.2f} ({self.speedup.low:.2f}-{self.speedup.high:.2f})"
        ratio = f"{self.bytes[0] / self.bytes[1]:.2f}" if self.bytes[1] else ""
        return [
            ["time of a call", markup.time_of(self.dense.median), markup.time_of(self.sparse.median), speedup],
            ["bytes", *map(markup.count_of_bytes, self.bytes), ratio],
            ["density of weights", *(f"{density:.3f}" for density in self.densities), ""],
        ]

    def notes(self) -> list[str]:
        found = [f"On {self.where}."]
        for one in self.outputs:
            agree = "" if one.agree is None else f"; {one.agree:.1%} of rows have the same largest element"
            name = f"output {one.name}" if one.name else "output"
            found.append(f"{name}: relative error {one.relative:.3g}, largest {one.largest:.3g}{agree}")
        return found

    def records(self) -> list[dict[str, Any]]:
        """One dictionary for each model: seconds, bytes and density."""
        pairs = zip(("dense", "sparse"), (self.dense, self.sparse), self.bytes, self.densities, strict=True)
        return [
            {"model": name, "seconds": s.median, "seconds_low": s.low, "seconds_high": s.high, "bytes": b, "density": d}
            for name, s, b, d in pairs
        ]


def compare(dense: nn.Module, sparse: nn.Module, *inputs: Any, seconds: float = 1.0, **kwargs: Any) -> Comparison:
    """Run two models on the same inputs: the distance of their outputs, time in turns, bytes.

    Both run in eval mode, without gradients, and are not changed.

    Args:
        dense, sparse: the models; the errors are relative to the first.
        *inputs, **kwargs: what both take; one dictionary, as tokenizers make it, is taken as keywords.
        seconds: how long they are timed, at least five rounds.

    Raises:
        TypeError, ValueError: no models or inputs, or outputs that differ in number or shape.

    Example:
        >>> import copy, torch, sten
        >>> dense = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8))
        >>> sparse = sten.sparsify(copy.deepcopy(dense), sten.NM(2, 4))
        >>> found = sten.compare(dense, sparse, torch.randn(32, 64), seconds=0.01)
        >>> found.densities, 0 < found.outputs[0].relative < 1
        ((1.0, 0.5), True)
    """
    runs = [call_of(model, inputs, kwargs, "sten.compare") for model in (dense, sparse)]
    device = device_of(dense)
    if device_of(sparse).type != device.type:
        raise ValueError(f"Expected both models on one device, got {device} and {device_of(sparse)}; use .to(device).")
    with inference(dense), inference(sparse):
        outputs = _distances(*(run() for run in runs))
        times = take_turns([(contextlib.nullcontext, run) for run in runs], device, seconds)
    speedup = Spread.of([a / b for a, b in zip(*times, strict=True)])
    sizes, densities = (_bytes(dense), _bytes(sparse)), (_density(dense), _density(sparse))
    slow, fast = map(Spread.of, times)
    return Comparison(outputs, slow, fast, speedup, sizes, densities, place_of(device))


def _distances(dense: Any, sparse: Any) -> list[Distance]:
    a, b = ([*_tensors(out)] for out in (dense, sparse))
    if [(name, t.shape) for name, t in a] != [(name, t.shape) for name, t in b]:
        shapes = " and ".join(str([(name, *t.shape) for name, t in each]) for each in (a, b))
        raise ValueError(f"Expected outputs of the same shapes, got {shapes}; compare models of one architecture.")
    return [_distance(name, x, y.to(x.device)) for (name, x), (_, y) in zip(a, b, strict=True)]


def _tensors(out: Any):
    for path, leaf in leaves(dict(out) if isinstance(out, Mapping) else out):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield ".".join(map(str, path)), leaf


def _distance(name: str, a: Tensor, b: Tensor) -> Distance:
    agree = None
    if a.dim() > 1 and a.shape[-1] > 1 and (name.endswith("logits") or (not name and a.dim() == 2)):
        agree = float((a.argmax(-1) == b.argmax(-1)).float().mean()) if a.numel() else None
    gap, whole = (a.float() - b.float()), a.float().norm()
    relative = float(gap.norm() / whole) if float(whole) else math.inf if float(gap.norm()) else 0.0
    return Distance(name, relative, float(gap.abs().max()) if gap.numel() else 0.0, agree)


def _bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    parts = [part for t in tensors.values() for part in (t.parts.values() if isinstance(t, SparseTensor) else (t,))]
    return sum(part.numel() * part.element_size() for part in parts)


def _density(model: nn.Module) -> float:
    targets = {id(target.tensor): target for target in all_weights(model, wrapped=True)}
    with torch.no_grad():
        sizes = [(math.prod(t.shape), 1.0 if t.stored is None else t.stored.density) for t in targets.values()]
    return sum(size * density for size, density in sizes) / max(sum(size for size, _ in sizes), 1)
