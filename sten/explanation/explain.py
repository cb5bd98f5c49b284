"""explain: what runs in each layer of a model, how long it takes against dense, and whether it pays."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import markup
from ..calibration.data import inference
from ..conversion.record import record_of
from ..conversion.reparametrize import expect_slots_to_follow, move
from ..conversion.select import Target, all_weights, movable_weights, sparse_weights
from ..conversion.sensitivity import Candidate, candidates_of
from ..conversion.sites import sites_of
from ..conversion.state_dict_hooks import accept_every_form
from ..layouts.base import Layout
from ..training.dense_weight import DenseWeight
from ..training.inference_mode import ordinary_tensors
from .advice import DENSE, advise
from .inputs import call_of, device_of, place_of
from .layers import Layer, Signature, before_calls, is_sparse, layers_of, signature
from .measure import Alternative, Measurement, candidates_at, is_linear_alone, measure
from .table import Explanation, LayerRow
from .timing import Spread, take_turns

PICTURES = 12  # of different kinds of patterns
SIGNATURES = 4  # of the inputs of one layer that are timed, the most frequent ones


def explain(
    model: nn.Module,
    *inputs: Any,
    candidates: Sequence[Layout | Candidate | None] | None = None,
    seconds: float = 0.2,
    keep_faster: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Run a model on inputs and say of each layer which kernel ran, how long it takes against dense, and what to do.

    Each layer is timed on the very inputs that it gets in the model, as it is and dense (weights, and an input that a
    site made sparse, with the same numbers), in turns; medians and quartiles are of these rounds. What a site's method
    takes to choose is time of the model, not of the layer. Where a sparse weight is slower than dense, other layouts of
    the same density are timed, too. The model is called three times and more, in eval mode without gradients, eagerly
    even if it is compiled. It is not changed, nor are its modes; what a call of the model itself changes, such as a
    cache among the inputs, does change.

    Args:
        model: any nn.Module, its weights dense, finalized or in training.
        *inputs, **kwargs: what `model(...)` takes; one dictionary, as tokenizers make it, is taken as keywords.
        candidates: layouts with a rate, and (layout, sparsity) pairs, to time in every linear layer, also in dense
            ones. None: those of the present density, in layers that are slower than dense. (): no others.
        seconds: how long each layer is timed, at least five rounds.
        keep_faster: make the sparse weights dense, in place, whose layers are slower than dense and not kept for
            their bytes; weights in training are refused. The explanation is that of the model before.

    Returns:
        An `Explanation`: it prints as a table, shows in notebooks, and has `rows`, `to_pandas()`, `save(path)`.

    Raises:
        TypeError, ValueError: no model, no inputs, a model on the meta device, or `keep_faster` with weights in
            training.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8))
        >>> model = sten.sparsify(model, {"0": sten.CSR()}, sparsity=0.9)
        >>> table = sten.explain(model, torch.randn(32, 64), seconds=0.01)
        >>> [(row.name, row.layout) for row in table.rows]
        [('0', 'CSR()'), ('2', 'dense')]
        >>> table.rows[0].verdict in ("keep", "dense", "layout")
        True
    """
    run = call_of(model, inputs, kwargs, "sten.explain")
    device = device_of(model)
    options = None if candidates is None else (candidates_of(candidates) if len(candidates) else [])
    if keep_faster:
        _expect_finalized(model)
    everything = all_weights(model, wrapped=True)
    with inference(model):
        layers, idle = layers_of(everything, run)
        measured = _measured(layers, run, seconds, options)
        whole = Spread.of(take_turns([(contextlib.nullcontext, run)], device, seconds)[0])
        patterns = _patterns(layers)
    rows = [_row(layer, measured[id(layer.module)], whole.median) for layer in layers]
    rows += [_unused(target) for target in idle]
    targets = [target for layer in layers for target in layer.targets] + idle
    once = {id(target.tensor): _sizes([target]) for target in targets}.values()
    _note_times(layers, rows)
    densified = _densify(model, layers, rows) if keep_faster else []
    sizes = sum(stored for stored, _ in once), sum(dense for _, dense in once)
    return Explanation(rows, whole, place_of(device), sizes, densified, patterns, sites_of(model))


def _measured(
    layers: list[Layer], run: Callable[[], Any], seconds: float, options: list[Candidate] | None
) -> dict[int, Measurement]:
    """By id of the module, what all its calls in one call of the model take."""
    by_module = {id(layer.module): layer for layer in layers}
    chosen = {key: [s for s, _ in layer.calls.most_common(SIGNATURES)] for key, layer in by_module.items()}
    found: dict[int, dict[Signature, Measurement]] = {key: {} for key in by_module}
    tried: dict[tuple, tuple[Alternative, ...]] = {}
    busy = False

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal busy
        key, given = id(module), signature(args, kwargs)
        if not busy and given in chosen[key] and given not in found[key]:
            busy = True  # the layer's own calls of other layers are not measured
            found[key][given] = _one(by_module[key], args, kwargs, seconds, options, tried)
            busy = False

    with before_calls([layer.module for layer in layers], before):
        run()
    return {key: _together(by_module[key], each) for key, each in found.items() if each}


def _one(layer: Layer, args, kwargs, seconds: float, options: list[Candidate] | None, tried: dict) -> Measurement:
    """One call; layers of one kind that are slower than dense try other layouts once for all of them."""
    alone = is_linear_alone(layer)
    of = measure(layer, args, kwargs, seconds, options if options and alone else ())
    if options is not None or not alone or not layer.sparse or of.speedup is None or of.speedup.low >= 1:
        return of
    density, kind = _density(layer.targets), _layout(layer.targets)
    key = (kind, layer.targets[0].shape, round(density, 2), signature(args, kwargs))
    if key not in tried:
        present = {str(target.stored.sparse_layout) for target in layer.sparse}
        tried[key] = measure(layer, args, kwargs, seconds, candidates_at(density, present)).alternatives
    return replace(of, alternatives=tried[key])


def _together(layer: Layer, each: dict[Signature, Measurement]) -> Measurement:
    """All calls; the speed-up and the alternatives are those of the inputs that take the most time."""
    counts = {given: layer.calls[given] for given in each}
    others = layer.calls.total() / sum(counts.values())  # inputs that are rare were not timed
    most = max(each, key=lambda given: each[given].seconds.median * counts[given])

    def total(times: Iterable[Spread | None]) -> Spread | None:
        parts = [part * (counts[given] * others) for given, part in zip(each, times, strict=True) if part is not None]
        return functools.reduce(operator.add, parts) if parts else None

    seconds, dense = total(one.seconds for one in each.values()), total(one.dense for one in each.values())
    return replace(each[most], seconds=seconds, dense=dense)


def _sizes(targets: Iterable[Target]) -> tuple[int, int]:
    """Bytes that are stored now, and of the dense weights."""
    stored = dense = 0
    for target in targets:
        full = math.prod(target.shape) * target.tensor.element_size()
        w = None if isinstance(target.weight, DenseWeight) else target.stored
        stored, dense = stored + (full if w is None else w.stored_bytes), dense + full
    return stored, dense


def _density(targets: Iterable[Target]) -> float:
    sizes = [(math.prod(target.shape), target.stored) for target in targets]
    kept = sum(size * (1.0 if w is None else w.density) for size, w in sizes)
    return kept / max(sum(size for size, _ in sizes), 1)


def _layout(targets: Iterable[Target]) -> str:
    names = []
    for target in targets:
        w = target.stored
        flip = " transposed" if w is not None and w.transposed else ""
        names.append("dense" if w is None else f"{w.sparse_layout}{flip}")
    return ", ".join(dict.fromkeys(names))


def _weights(name: str, targets: list[Target]) -> dict[str, Any]:
    """What a row says of its weights."""
    stored, dense = _sizes(targets)
    energies = [record_of(*target.owners[0]).energy for target in targets if is_sparse(target)]
    known = [energy for energy in energies if energy is not None]
    return {
        "name": name,
        "weights": tuple(target.name for target in targets),
        "layout": _layout(targets),
        "shape": targets[0].shape,
        "density": _density(targets),
        "energy": sum(known) / len(known) if known else None,
        "stored_bytes": stored,
        "dense_bytes": dense,
    }


def _row(layer: Layer, of: Measurement, model: float) -> LayerRow:
    plans = layer.plans
    kernels = dict.fromkeys(f"{plan.kernel} [{plan.variant}]" if plan.variant else plan.kernel for plan in plans)
    row = _weights(layer.name, layer.targets)
    verdict, advice = advise(layer, of, model, (row["stored_bytes"], row["dense_bytes"]))
    if advice == DENSE:
        advice = next((why for t in layer.targets if (why := record_of(*t.owners[0]).why)), DENSE)
    return LayerRow(
        **row,
        kernel=", ".join(kernels),
        reason="; ".join(dict.fromkeys(plan.reason for plan in plans)),
        calls=layer.calls.total(),
        input=layer.input,
        seconds=of.seconds,
        dense_seconds=of.dense,
        speedup=of.speedup,
        verdict=verdict,
        advice=advice,
        alternatives=of.alternatives,
    )


def _unused(target: Target) -> LayerRow:
    return LayerRow(**_weights(target.name, [target]))


def _note_times(layers: list[Layer], rows: list[LayerRow]) -> None:
    """For `sten.summary`: with the pattern, so that a new pattern has none."""
    by_name = {row.name: row for row in rows}
    for layer in layers:
        for target in layer.sparse:
            if not isinstance(target.weight, DenseWeight) and len(layer.targets) == 1:
                row = by_name[layer.name]
                target.stored.cache.times = (row.seconds.median, row.dense_seconds.median)


def _expect_finalized(model: nn.Module) -> None:
    for target in sparse_weights(model):
        if target.weight is not None:
            raise ValueError(
                f"Expected finalized weights for keep_faster=True, got {target.name}, which is in training; call "
                "sten.finalize first."
            )


@ordinary_tensors
def _densify(model: nn.Module, layers: list[Layer], rows: list[LayerRow]) -> list[str]:
    """Make dense, in place, the weights of the layers that do not pay; one of several layers if they lose together."""
    by_name, lost, slow = {row.name: row for row in rows}, Counter(), set()
    for layer in layers:
        row = by_name[layer.name]
        for target in layer.sparse:
            lost[id(target.tensor)] += row.seconds.median - row.dense_seconds.median
            if row.verdict == "dense" or (row.verdict == "layout" and row.speedup.high < 1):
                slow.add(id(target.tensor))
    chosen = [t for t in movable_weights(model) if id(t.tensor) in slow and lost[id(t.tensor)] >= 0]
    with torch.no_grad():
        ready = [(target, target.stored.to_dense().contiguous()) for target in chosen]
    for target in chosen:
        expect_slots_to_follow(target, [])
    names = [target.name for target in chosen]
    for target, dense in ready:
        move(target, dense, [])
    accept_every_form(model)
    return names


def _patterns(layers: list[Layer]) -> dict[str, str]:
    """Pictures of one weight of each kind."""
    found: dict[tuple, tuple[str, str]] = {}
    for layer in layers:
        for target in layer.sparse:
            w = target.stored
            key = (str(w.sparse_layout), target.shape, round(w.density, 2))
            if key not in found and len(found) < PICTURES:
                found[key] = (f"{target.name}: {w.sparse_layout}", markup.pattern_figure(w.mask()))
    return dict(found.values())
