"""Why the state of a run from a state dict cannot be loaded: checked before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import FormatError

if TYPE_CHECKING:
    from .trained_weight import TrainedWeight

AVERAGES = ("momentum_first", "momentum_second")
LARGEST_COUNT = 2**62


def problem_of(weight: TrainedWeight, run: dict[str, Tensor], averages: dict[str, Tensor]) -> str | None:
    """In words; None if the state can be loaded. `averages` are those of gradients, which a run may have."""
    missing = [name for name in weight.run_names() if name not in run]
    if missing:
        return f"Expected the state of a run with {missing[0]!r}, got one without it"
    for name, value in {**run, **averages}.items():
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            return f"Expected a dense tensor for {name}, got {value.layout}"
        if not isinstance(value, Tensor) or (value.is_meta and not weight.run_step.is_meta):
            kind = "one on the meta device" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            return f"Expected a tensor with numbers for {name}, got {kind}"
    method = run["run_method"]
    if method.dtype != torch.uint8 or not (method.is_meta or decoded(method) == repr(weight.method)):
        other = "others" if method.dtype != torch.uint8 or method.is_meta else decoded(method)
        return f"Expected the state of {weight.method}, got that of {other}; sparsify the model with that one first"
    for name, value in run.items():
        want = getattr(weight, name)
        if value.shape != want.shape or value.dtype != want.dtype:
            got = f"got {value.dtype} of shape {tuple(value.shape)}"
            return f"Expected {name} to be {want.dtype} of shape {tuple(want.shape)}, {got}"
    for name, value in averages.items():
        if name not in AVERAGES or tuple(value.shape) != weight.shape or not value.dtype.is_floating_point:
            got = f"got {value.dtype} of shape {tuple(value.shape)}"
            return f"Expected {name} to be a running average of shape {weight.shape}, {got}"
    return None if weight.run_step.is_meta or method.is_meta else _wrong_numbers(weight, run)


def _wrong_numbers(weight: TrainedWeight, run: dict[str, Tensor]) -> str | None:
    counts = [int(run["run_step"]), *run["run_counts"].tolist()]
    if counts[0] < 0 or min(counts) < -1 or max(counts) >= LARGEST_COUNT:
        return f"Expected counts of steps in run_step and run_counts, got {counts}"
    try:
        torch.Generator().set_state(run["run_generator"].cpu())
    except RuntimeError:  # torch has no other way to ask
        return "Expected the state of a torch.Generator in run_generator, got other bytes"
    try:
        weight.method.check_state({name: run["method_" + name] for name in weight.state_names})
    except ValueError as error:
        return str(error).removesuffix(".")
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


def encoded(text: str) -> Tensor:
    """Text as a tensor, which every file of tensors can hold."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def decoded(text: Tensor) -> str:
    return bytes(text.flatten().tolist()).decode(errors="replace")
