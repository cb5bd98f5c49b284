"""Resuming a run: what the engines know, beside the state_dicts of model and optimizer; and files that are whole or
absent."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine import ENGINES, Engine, sites_of

VERSION = 1


def engines_of(model: nn.Module) -> list[Engine]:
    """The engines that train a model's weights, in the order of their weights."""
    held = [id(site.holder) for site in sites_of(model)]
    found = [engine for engine in ENGINES if any(id(site.holder) in held for site in engine.sites)]
    return sorted(
        found, key=lambda engine: held.index(id(engine.sites[0].holder)) if id(engine.sites[0].holder) in held else -1
    )


def state_dict(model: nn.Module) -> dict[str, Any]:
    """What a run needs to resume beside `model.state_dict()` and `optimizer.state_dict()`: steps, masks, methods'
    tensors.

    Tensors and plain Python only, so `torch.load(weights_only=True)` reads it. Taken between two optimizer steps, at
    any of them, the three resume to the same weights bit by bit (on the CPU).

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> model = sten.sparsify(model, sten.CSR(), sten.SET(100, every=10), sparsity=0.75, optimizer=optimizer)
        >>> state = sten.state_dict(model)
        >>> state["engines"][0]["step"]
        0
        >>> sten.load_state_dict(model, state)
    """
    return {"version": VERSION, "engines": [_of(engine) for engine in engines_of(model)]}


def _of(engine: Engine) -> dict[str, Any]:
    weights = {}
    for site in engine.sites:
        tensors = {
            "state." + key: value for key, value in site.holder.state.items() if not isinstance(value, nn.Parameter)
        }
        if site.master and site.mask is not None:
            tensors["mask"] = site.mask
        for key, sums in (("first", engine.gather.first), ("second", engine.gather.second)):
            if site in sums:
                tensors[key] = sums[site]
        weights[site.name] = {key: value.detach().clone() for key, value in tensors.items()}
    counts = {key: getattr(engine, key) for key in ("step", "ticks", "owed", "passes")}
    return {"method": repr(engine.method), **counts, "generator": engine.generator.get_state(), "weights": weights}


@torch.no_grad()
def load_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Put back what `sten.state_dict` took, after the model's and the optimizer's own state were loaded. All or
    nothing.

    Raises:
        ValueError: another version, other weights or another method than this model is trained by.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> model = sten.sparsify(model, sten.CSR(), sten.SET(100, every=10), sparsity=0.75, optimizer=optimizer)
        >>> sten.load_state_dict(model, sten.state_dict(model))
    """
    engines = engines_of(model)
    if not isinstance(state, dict) or state.get("version") != VERSION or len(state.get("engines", ())) != len(engines):
        raise ValueError(
            f"This is no state of a run with {len(engines)} engine(s): take it with sten.state_dict(model)."
        )
    for engine, saved in zip(engines, state["engines"], strict=True):
        if saved["method"] != repr(engine.method):
            raise ValueError(f"The state is of {saved['method']}, but the model is trained by {engine.method!r}.")
        names = {site.name for site in engine.sites}
        if set(saved["weights"]) != names:
            raise ValueError(f"The state is of other weights: {sorted(set(saved['weights']) ^ names)[:5]} differ.")
        for site in engine.sites:
            _expect(site, saved["weights"][site.name])
    for engine, saved in zip(engines, state["engines"], strict=True):
        _load(engine, saved)


def _expect(site, tensors: dict[str, Tensor]) -> None:
    mask = tensors.get("mask")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != tuple(site.holder.shape)):
        raise ValueError(f"The saved mask of {site.name} must be bool, of shape {tuple(site.holder.shape)}.")
    for key, value in site.holder.state.items():
        saved = tensors.get("state." + key)
        if not isinstance(value, nn.Parameter) and (saved is None or saved.shape != value.shape):
            raise ValueError(f"The state of {site.name} lacks {key!r} of shape {tuple(value.shape)}.")


def _load(engine: Engine, saved: dict[str, Any]) -> None:
    for key in ("step", "ticks", "owed", "passes"):
        setattr(engine, key, saved[key])
    engine.generator.set_state(saved["generator"])
    for site in engine.sites:
        tensors = {key: value.to(site.param.device) for key, value in saved["weights"][site.name].items()}
        if "mask" in tensors:
            site.holder.mask = tensors["mask"].clone()
        for key, value in site.holder.state.items():
            if not isinstance(value, nn.Parameter):
                value.copy_(tensors["state." + key])
        for key, sums in (("first", engine.gather.first), ("second", engine.gather.second)):
            sums.pop(site, None)
            if key in tensors:
                sums[site] = tensors[key].clone()
    engine.prepare_next()


def save_run(path: str | os.PathLike, model: nn.Module, optimizer: Optimizer, **more: Any) -> None:
    """Write a run (model, optimizer, engine, and what else is given) to one file, in one step: the old file or the new
    one.

    Example:
        >>> import tempfile, torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> path = tempfile.mkdtemp() + "/run.pt"
        >>> sten.save_run(path, model, optimizer, epoch=3)
        >>> sten.load_run(path, model, optimizer)
        {'epoch': 3}
    """
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sten": state_dict(model), "more": more}
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_run(path: str | os.PathLike, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Read a file of `save_run` into a model and an optimizer that were made and sparsified in the same way.

    Returns:
        What `save_run` was given beside them.

    Raises:
        ValueError: not a complete file of save_run; RuntimeError or ValueError: another model, method or optimizer.

    Example:
        >>> import tempfile, torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> path = tempfile.mkdtemp() + "/run.pt"
        >>> sten.save_run(path, model, optimizer, step=7)
        >>> sten.load_run(path, model, optimizer)["step"]
        7
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        parts = [state[key] for key in ("model", "optimizer", "sten", "more")]
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise ValueError(
            f"{os.fspath(path)!r} is not a complete file of sten.save_run ({type(error).__name__})."
        ) from None
    model.load_state_dict(parts[0])
    optimizer.load_state_dict(parts[1])
    load_state_dict(model, parts[2])
    return parts[3]
