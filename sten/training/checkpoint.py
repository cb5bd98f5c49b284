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
from .attribute import SITES, SUFFIX, trained_of
from .engine import dynamic_weights
from .inference_mode import ordinary_tensors
from .pattern_weight import PatternWeight
from .run_problems import encoded
from .trained_weight import NO_STEP, TrainedWeight, is_of_run

Optimizers = Optimizer | list[Optimizer]


def save_run(model: nn.Module, path: str | os.PathLike, optimizer: Optimizers, **more: Any) -> None:
    """Write a run (model, optimizer, and keywords of your own) to one file, in one step: the old file or the new one.

    The state of the sparsifier (masks, steps, random numbers) is part of `model.state_dict()`, so a trainer that saves
    the two state dicts itself needs no call of sten.

    Args:
        model: in any form.
        path: the file, with any suffix; its folder must exist.
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
    state = {"model": model.state_dict(), "optimizer": states, "more": more, "sites": _sites(model)}
    with replacing(path) as file:
        torch.save(state, file)


@ordinary_tensors
def load_run(model: nn.Module, path: str | os.PathLike, optimizer: Optimizers) -> dict[str, Any]:
    """Read a file of `save_run` into a model and an optimizer that were made and sparsified in the same way.

    Returns:
        The other keywords of `save_run`.

    Raises:
        FileNotFoundError: no such file.
        FormatError: not a complete file of save_run, another model, method or optimizer, other sites, or another number
            of optimizers; nothing was changed.

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
    kinds = {"model": dict, "optimizer": (dict, list), "more": dict}
    wrong = not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items())
    if wrong or not all(isinstance(name, str) for key in ("model", "more") for name in state[key]):
        raise FormatError(f"Expected a file of sten.save_run, got {os.fspath(path)!r} with another content.")
    entries = state["model"]
    _expect_sites(model, state.get("sites"))
    if "sten" in state:
        entries = _from_version_1(model, entries, state["sten"])
    _expect_names(model, entries)
    several = isinstance(state["optimizer"], list)
    states, optimizers = (state["optimizer"], optimizer) if several else ([state["optimizer"]], [optimizer])
    if several != isinstance(optimizer, (list, tuple)) or len(states) != len(optimizers):
        have = f"a list of {len(optimizer)}" if isinstance(optimizer, (list, tuple)) else "one"
        raise FormatError(
            f"Expected optimizer= as it was saved, {f'a list of {len(states)}' if several else 'one optimizer'}, got "
            f"{have}."
        )
    for one, own in zip(optimizers, states, strict=True):
        _expect_optimizer(one, own)
    model.load_state_dict(entries)
    for one, own in zip(optimizers, states, strict=True):
        one.load_state_dict(own)
        if "sten" in state:
            _flatten_slots(model, one)
    return state["more"]


def _sites(model: nn.Module) -> list[str]:
    """The model's sites in words, with the names that their modules have in it."""
    found = []
    for path, module in model.named_modules():
        for kind, site in vars(module).get(SITES, {}).items():
            found.append(f"{kind} of {path or 'the model'}: {site.method}, {site.layout}")
    return sorted(found)


def _expect_sites(model: nn.Module, sites: Any) -> None:
    """Raise FormatError unless the model has the sites of the file; None: of a file that does not say."""
    own = _sites(model)
    if sites is None or sites == own:
        return
    differing = {*own} ^ {*map(str, sites)} if isinstance(sites, list) else {"no list of sites"}
    where = ", ".join(sorted(differing)[:3])
    raise FormatError(
        f"Expected the sites of the run, got others ({where}); call sten.sparsify(site=...) as for the model that was "
        "saved."
    )


def _expect_names(model: nn.Module, entries: dict[str, Any]) -> None:
    """Raise FormatError unless a file has the names of the model, which torch would notice after loading the others.

    All entries of a sparse weight count as its name, since they may have another form.
    """
    sparse: dict[str, tuple[set[str], set[str]]] = {}  # name -> what may follow it, or its pattern
    for path, module in model.named_modules():
        for name, param in module._parameters.items():
            trained = dict(trained_of(module)).get(name)
            parts = set(trained.part_names) if isinstance(trained, PatternWeight) else set()
            parts = set(param.parts) if isinstance(param, SparseTensor) else parts
            if parts or trained is not None:
                sparse[f"{path}.{name}" if path else name] = parts | ({"values"} if parts else set()), parts

    def weights(names: Iterable[str]) -> set[str]:
        found = set()
        for name in names:
            above, _, last = name.rpartition(".")
            key = above.removesuffix(SUFFIX)
            after, beside = sparse.get(key, (set(), set()))
            inside = last in after if above == key else last in beside or is_of_run(last)
            found.add(key if key in sparse and inside else name)
        return found

    want, have = weights(model.state_dict(keep_vars=True)), weights(entries)
    have -= {key for key in sparse if key not in entries and f"{key}.values" not in entries}
    if want != have:
        missing, surplus = sorted(want - have), sorted(have - want)
        raise FormatError(
            f"Expected the model's names in the file, got none for {missing[:5]} and {surplus[:5]} too many."
        )


def _expect_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raise FormatError unless the optimizer can load this state: a twin of it does, whose state is its own."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not isinstance(state.get("state"), dict):
        raise FormatError("Expected the state of an optimizer in the file, got another.")
    for group, own in zip(groups, optimizer.param_groups, strict=False):
        missing = own.keys() - group.keys() if isinstance(group, dict) else own.keys()
        wrong = [key for key in own if key not in missing and not _alike(group[key], own[key])]
        if missing or wrong:
            raise FormatError(
                f"Expected the groups of {type(optimizer).__name__}, got another {sorted([*missing, *wrong])[0]!r}."
            )
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer), state={}, param_groups=[dict(group) for group in optimizer.param_groups])
    try:
        twin.load_state_dict(state)
    except Exception as error:  # of any kind: each optimizer reads its state in its own way
        raise FormatError(
            f"Expected a state that {type(optimizer).__name__} can load, got {type(error).__name__}: {error}."
        ) from error
    if not all(isinstance(key, Tensor) and isinstance(slots, dict) for key, slots in twin.state.items()):
        raise FormatError("Expected the state of the optimizer's parameters, got one of others.")


def _alike(value: Any, own: Any) -> bool:
    """Whether a setting of an optimizer's group can take the place of the present one."""
    numbers = (int, float, Tensor)
    if isinstance(own, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(value) == len(own) and all(map(_alike, value, own))
    return type(value) is type(own) or None in (value, own) or (isinstance(value, numbers) and isinstance(own, numbers))


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
