"""Files of a run: model, optimizer and more, written as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..atomic_file import replacing
from ..errors import FormatError
from ..tensor import SparseTensor
from .attribute import SUFFIX, installed
from .engine import dynamic_weights
from .trained_weight import NO_STEP, TrainedWeight, encoded


def save_run(model: nn.Module, path: str | os.PathLike, optimizer: Optimizer, **more: Any) -> None:
    """Write a run (model, optimizer, and keywords of your own) to one file, in one step: the old file or the new one.

    The state of the sparsifier (masks, steps, random numbers) is part of `model.state_dict()`, so a trainer that saves
    the two state dicts itself needs no call of sten.

    Args:
        model: in any form.
        path: the file, with any suffix; its folder must exist.
        optimizer: the one that trains the model.
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
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "more": more}
    with replacing(path) as file:
        torch.save(state, file)


def load_run(model: nn.Module, path: str | os.PathLike, optimizer: Optimizer) -> dict[str, Any]:
    """Read a file of `save_run` into a model and an optimizer that were made and sparsified in the same way.

    Returns:
        The other keywords of `save_run`.

    Raises:
        FileNotFoundError: no such file.
        FormatError: not a complete file of save_run, another model, method or optimizer; nothing was changed.

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
        with open(path, "rb") as file:  # by its bytes: torch.load takes what a suffix promises
            state = torch.load(file, weights_only=True, map_location="cpu")
    except FormatError as error:
        raise FormatError(f"Expected a file of sten.save_run, got {os.fspath(path)!r}: {error}") from error
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise FormatError(
            f"Expected a complete file of sten.save_run, got {os.fspath(path)!r} ({type(error).__name__})."
        ) from error
    kinds = {"model": dict, "optimizer": dict, "more": dict}
    wrong = not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items())
    if wrong or not all(isinstance(name, str) for key in ("model", "more") for name in state[key]):
        raise FormatError(f"Expected a file of sten.save_run, got {os.fspath(path)!r} with another content.")
    entries = state["model"]
    if "sten" in state:
        entries = _from_version_1(model, entries, state["sten"])
    _expect_names(model, entries)
    expect_optimizer_state(optimizer, state["optimizer"])
    model.load_state_dict(entries)
    optimizer.load_state_dict(state["optimizer"])
    if "sten" in state:
        _flatten_slots(model, optimizer)
    return state["more"]


def _expect_names(model: nn.Module, entries: dict[str, Any]) -> None:
    """Raise FormatError unless a file has the names of the model, which torch would notice after loading the others.

    All entries of a sparse weight count as its name, since they may have another form.
    """
    sparse = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in (*installed(module), *(n for n, p in module._parameters.items() if isinstance(p, SparseTensor)))
    }

    def weights(names: Iterable[str]) -> set[str]:
        found = set()
        for name in names:
            steps = name.split(".")
            above = (".".join(steps[:depth]) for depth in range(1, len(steps) + 1))
            keys = (key for step in above for key in (step, step.removesuffix(SUFFIX)) if key in sparse)
            found.add(next(keys, name))
        return found

    want, have = weights(model.state_dict(keep_vars=True)), weights(entries)
    if want != have:
        missing, surplus = sorted(want - have), sorted(have - want)
        raise FormatError(
            f"Expected the model's names in the file, got none for {missing[:5]} and {surplus[:5]} too many."
        )


def expect_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raise FormatError unless a state dict has the groups of an optimizer, and a state for its parameters only."""
    groups, slots = state.get("param_groups"), state.get("state")
    fits = isinstance(groups, list) and isinstance(slots, dict) and len(groups) == len(optimizer.param_groups)
    ids: list[Any] = []
    for group, own in zip(groups if fits else (), optimizer.param_groups, strict=False):
        params = group.get("params") if isinstance(group, dict) else None
        fits = fits and isinstance(params, list) and len(params) == len(own["params"]) and own.keys() <= group.keys()
        fits = fits and all(type(group[k]) is type(own[k]) or isinstance(group[k], (int, float)) for k in own)
        ids += params if fits else ()
    if not fits or not all(type(number) is int for number in ids) or len(set(ids)) != len(ids):
        raise FormatError(f"Expected the state of {type(optimizer).__name__} with its parameter groups, got another.")
    for number, slot in slots.items():
        if number not in ids or not isinstance(slot, dict) or not all(isinstance(name, str) for name in slot):
            raise FormatError(f"Expected the state of the optimizer's parameters, got one for {str(number)[:40]}.")


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
