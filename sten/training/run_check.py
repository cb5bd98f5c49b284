"""Whether the state of a run in a state dict can be loaded, decided before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import FormatError

if TYPE_CHECKING:
    from .trained_weight import TrainedWeight

AVERAGES = ("momentum_first", "momentum_second")
LARGEST_STEP = 2**62


def problem(weight: TrainedWeight, state: dict[str, Tensor]) -> str | None:
    """Why the entries `weight_pattern.<name>` of one weight cannot be loaded, in words; None if they can."""
    run = {name: state[name] for name in weight.run_names() if name in state}
    if not run:
        return None  # the start of a run
    missing = [name for name in weight.run_names() if name not in run]
    if missing:
        return f"Expected the state of a run with {missing[0]!r}, got one without it"
    averages = {name: state[name] for name in AVERAGES if name in state}
    for name, have in {**run, **averages}.items():
        if not isinstance(have, Tensor) or have.layout is not torch.strided:
            return f"Expected a dense tensor for {name}, got a {type(have).__name__}"
        if have.is_meta and not weight.run_method.is_meta:
            return f"Expected {name} with numbers, got a tensor on the meta device"
    return _method(weight, run) or _shapes(weight, run, averages) or _numbers(run) or _state(weight, run)


def _method(weight: TrainedWeight, run: dict[str, Tensor]) -> str | None:
    text = run["run_method"]
    if text.dtype is not torch.uint8 or text.dim() != 1 or text.numel() > 2**16:
        return f"Expected run_method to be text in uint8, got {text.dtype} of shape {tuple(text.shape)}"
    if text.is_meta:
        return None
    method = bytes(text.tolist()).decode(errors="replace")
    if method != repr(weight.method):
        return f"Expected the state of {weight.method}, got that of {method}; sparsify the model with that one first"
    return None


def _shapes(weight: TrainedWeight, run: dict[str, Tensor], averages: dict[str, Tensor]) -> str | None:
    for name, have in run.items():
        want = getattr(weight, name)
        if name != "run_method" and (have.shape != want.shape or have.dtype != want.dtype):
            shapes = f"{want.dtype} of shape {tuple(want.shape)}, got {have.dtype} of shape {tuple(have.shape)}"
            return f"Expected {name} to be {shapes}"
    for name, have in averages.items():
        if tuple(have.shape) != weight.shape or not have.dtype.is_floating_point:
            return f"Expected floating-point {name} of shape {weight.shape}, got {have.dtype} of {tuple(have.shape)}"
    return None


def _numbers(run: dict[str, Tensor]) -> str | None:
    if run["run_step"].is_meta:
        return None
    counts = [int(run["run_step"]), *run["run_counts"].tolist()]
    if min(counts) < -1 or counts[0] < 0 or max(counts) >= LARGEST_STEP:
        return f"Expected run_step and run_counts to be counts, got {counts}"
    try:
        torch.Generator().set_state(run["run_generator"].cpu())
    except RuntimeError as error:  # torch's check of its own state
        return f"Expected the state of a random number generator as run_generator, got another ({error})"
    return None


def _state(weight: TrainedWeight, run: dict[str, Tensor]) -> str | None:
    if run["run_step"].is_meta:
        return None
    try:
        weight.method.check_state({name: run["method_" + name] for name in weight.state_names})
    except ValueError as error:
        return str(error).rstrip(".")
    return None


def expect_one_run(weights: dict[str, tuple[TrainedWeight, dict[str, Tensor]]]) -> None:
    """Raise FormatError unless the weights of each engine, by their keys, are given one run: all of them, or none."""
    first: dict[int, tuple[str, dict[str, Tensor]]] = {}
    for key, (weight, state) in weights.items():
        if weight.engine is None or weight.method is None or weight.method.stateless:
            continue
        run = {name: state[name] for name in ("run_step", "run_counts", "run_generator") if name in state}
        other, same = first.setdefault(id(weight.engine), (key, run))
        if run.keys() != same.keys() or not all(torch.equal(run[name], same[name]) for name in run):
            raise FormatError(
                f"{key}: Expected the same steps of a run as for {other}, which has the same optimizer, got others; "
                "take them from one state dict."
            )
