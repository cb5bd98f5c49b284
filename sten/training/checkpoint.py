"""Files of a run: model, optimizer and more, written as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .engine import dynamic_weights
from .run_problems import encoded
from .trained_weight import NO_STEP, TrainedWeight


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, moved there if the block succeeds: a killed process leaves the old file."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected an existing folder for {path.name!r}, got {os.fspath(path.parent)!r}; make it first."
        )
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


Optimizers = Optimizer | list[Optimizer]


def save_run(model: nn.Module, path: str | os.PathLike, optimizer: Optimizers, **more: Any) -> None:
    """Write a run (model, optimizer, and keywords of your own) to one file, in one step: the old file or the new one.

    The state of the sparsifier (masks, steps, random numbers) is part of `model.state_dict()`, so a trainer that saves
    the two state dicts itself needs no call of sten.

    Args:
        model: in any form.
        path: the file; its folder must exist.
        optimizer: the one that trains the model, or a list of several.
        more: what `torch.load(weights_only=True)` can read, such as `epoch=3`; `load_run` returns it.

    Example:
        >>> import tempfile, torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> path = tempfile.mkdtemp() + "/run.pt"
        >>> sten.save_run(model, path, optimizer, epoch=3)
        >>> sten.load_run(model, path, optimizer)
        {'epoch': 3}
    """
    several = isinstance(optimizer, (list, tuple))
    states = [one.state_dict() for one in optimizer] if several else optimizer.state_dict()
    state = {"model": model.state_dict(), "optimizer": states, "more": more}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load_run(model: nn.Module, path: str | os.PathLike, optimizer: Optimizers) -> dict[str, Any]:
    """Read a file of `save_run` into a model and an optimizer that were made and sparsified in the same way.

    Returns:
        The other keywords of `save_run`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a complete file of save_run, or another optimizer, or another number of them.
        RuntimeError: another model or method.

    Example:
        >>> import tempfile, torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> path = tempfile.mkdtemp() + "/run.pt"
        >>> sten.save_run(model, path, optimizer, step=7)
        >>> sten.load_run(model, path, optimizer)["step"]
        7
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a file of sten.save_run, got no file at {os.fspath(path)!r}.")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        parts = [state[key] for key in ("model", "optimizer", "more")]
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise ValueError(
            f"Expected a complete file of sten.save_run, got {os.fspath(path)!r} ({type(error).__name__})."
        ) from None
    if "sten" in state:
        parts[0] = _from_version_1(model, parts[0], state["sten"])
    several = isinstance(parts[1], list)
    states, optimizers = parts[1] if several else parts[1:2], optimizer if several else [optimizer]
    if several != isinstance(optimizer, (list, tuple)) or len(states) != len(optimizers):
        have = f"a list of {len(optimizer)}" if isinstance(optimizer, (list, tuple)) else "one"
        raise ValueError(
            f"Expected optimizer= as it was saved, {f'a list of {len(states)}' if several else 'one optimizer'}, got "
            f"{have}."
        )
    model.load_state_dict(parts[0])
    for one, own in zip(optimizers, states, strict=True):
        one.load_state_dict(own)
        if "sten" in state:
            _flatten_slots(model, one)
    return parts[2]


def _from_version_1(model: nn.Module, state: dict[str, Tensor], runs: dict[str, Any]) -> dict[str, Tensor]:
    """The model's state and that of its runs, which files of sten before 0.1 have apart."""
    weights = {weight.name: weight for weight in dynamic_weights(model)}
    state = {key.replace(".sparse_weight.", ".weight_pattern.method_"): value for key, value in state.items()}
    for engine in runs["engines"]:
        for name, tensors in engine["weights"].items():
            if name in weights:
                state.update({f"{name}_pattern.{key}": t for key, t in _run_of(engine, tensors, weights[name])})
    return state


def _run_of(engine: dict[str, Any], tensors: dict[str, Tensor], weight: TrainedWeight):
    """(buffer, tensor) of the state of one weight's run; the keys are those of the old files."""
    counts = (engine["ticks"], engine["owed"], engine["passes"])
    yield "run_method", encoded(engine["method"])
    yield "run_step", torch.tensor(engine["step"])
    yield "run_counts", torch.tensor([NO_STEP if count is None else count for count in counts])
    yield "run_generator", engine["generator"]
    for key, tensor in tensors.items():
        renamed = {"first": "momentum_first", "second": "momentum_second"}.get(key, key)
        yield renamed.replace("state.", "method_"), tensor


def _flatten_slots(model: nn.Module, optimizer: Optimizer) -> None:
    """Give the optimizer's state of a pattern the Parameter's shape; old files have that of the layout's values."""
    for weight in dynamic_weights(model):
        param = weight.param
        for key, slot in optimizer.state.get(param, {}).items():
            if isinstance(slot, Tensor) and slot.dim() and slot.numel() == param.numel():
                optimizer.state[param][key] = slot.view(param.shape)
