"""save and load: one safetensors file with the parts of every weight, and their layouts as JSON in its header.

No pickle, and no import of a name from a file: a layout must be registered, and every index is checked before use. The
file has its name only when it is complete, and a checksum detects bytes that were changed later.

Format: each part of a sparse weight `fc.weight` is a tensor `fc.weight.<part>`, all else a tensor of its own name. The
header's `sten` entry is `{"version": 1, "sparse": {name: {"layout", "fields", "shape", "transposed"}}, "ties": {name:
name}, "crc32": checksum of all tensors in the order of their names}`.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import zlib
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .conversion.reparametrize import move
from .conversion.select import Target, all_weights, expect_model, once_each
from .conversion.state_dict_hooks import finalized_state
from .layouts.registry import fields
from .tensor import SparseTensor, checked
from .training import engine
from .training.checkpoint import replacing

Model = TypeVar("Model", bound=nn.Module)
VERSION = 1
EXTRA = "Expected the package safetensors for sten.save and sten.load: pip install safetensors (or sten-torch[hf])."


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model's parameters and buffers to a safetensors file, sparse weights as their parts.

    Args:
        model: in any form; weights in trainable form are written like finalized ones.
        path: the file; it is replaced in one step, so that a killed process leaves the old file or the new one.

    Raises:
        ValueError: the state has something that is not a tensor (an extra state of a module).
        FileNotFoundError: the folder does not exist.

    Example:
        >>> import tempfile, torch, sten
        >>> model = sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4))
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> sten.save(model, path)
        >>> sten.load(torch.nn.Linear(8, 4), path).weight.sparse_layout
        NM(n=2, m=4)
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(EXTRA) from None
    expect_model(model)
    tensors, sparse, ties = _flatten(model)
    header = json.dumps({"version": VERSION, "sparse": sparse, "ties": ties, "crc32": _checksum(tensors)})
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "sten": header})


def _flatten(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict], dict[str, str]]:
    """(plain tensors, descriptions of sparse weights, ties) of a model's state."""
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, dict] = {}
    ties: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, value in finalized_state(model).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"Expected only tensors in the state, got a {type(value).__name__} for {name}.")
        if seen.setdefault(id(value), name) != name:
            ties[name] = seen[id(value)]
        elif isinstance(value, SparseTensor):
            layout = {"layout": type(value.sparse_layout).__name__, "fields": fields(value.sparse_layout)}
            sparse[name] = {**layout, "shape": list(value.stored_shape), "transposed": value.transposed}
            tensors.update({f"{name}.{part}": _plain(tensor) for part, tensor in value.parts.items()})
        else:
            tensors[name] = _plain(value)
    return tensors, sparse, ties


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU; safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _checksum(tensors: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        size = tensor.numel() * tensor.element_size()
        if size:
            total = zlib.crc32((ctypes.c_ubyte * size).from_address(tensor.data_ptr()), total)
    return total


def load(model: Model, path: str | os.PathLike | None = None) -> Model:
    """Read a file of `sten.save` into a model of the same architecture, dense or sparse, in place.

    All or nothing: names, shapes, layouts and indices are checked before the model is changed. Weights that are sparse
    in the file become SparseTensor Parameters, the others dense ones, in the model's dtype and on its device. Their
    identity and ties do not change, and optimizers that sten knows (`sten.attach`) are updated. Training with a method
    ends: a run is resumed from `model.state_dict()`, not from such a file.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a complete sten file, an unknown layout, an index out of range, or names and shapes that are not
            the model's.
        TypeError: the model is wrapped, by DistributedDataParallel or the like: load into the inner one.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile, torch, sten
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> sten.save(sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4)), path)
        >>> model = sten.load(torch.nn.Linear(8, 4), path)
        >>> model.weight.density
        0.5
    """
    if path is None:  # as for torch.load, which needs no model
        raise TypeError("Expected sten.load(model, path), got one argument; make a model of this architecture first.")
    targets = once_each(all_weights(model))
    state = _read(path)
    current = finalized_state(model)
    _expect_fit(current, state)
    engine.release(model)
    _adopt(targets, current, state)
    return model


def _read(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state in a file, checked."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(EXTRA) from None
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a file of sten.save, got no file at {os.fspath(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("sten")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"Expected a complete safetensors file, got {os.fspath(path)!r} ({error}).") from None
    header = _header(header, path)
    if header.get("crc32") != _checksum(tensors):
        raise ValueError(f"Expected tensors with the checksum of {os.fspath(path)!r}, got others: the file is damaged.")
    return _unflatten(tensors, header)


def _header(text: str | None, path) -> dict:
    if text is None:
        raise ValueError(f"Expected a file of sten.save, got {os.fspath(path)!r} without 'sten' in its header.")
    try:
        header = json.loads(text)
        version = header.get("version")
        fits = version != VERSION or (isinstance(header["sparse"], dict) and isinstance(header["ties"], dict))
    except (ValueError, KeyError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"Expected valid JSON for 'sten' in the header of {os.fspath(path)!r}: the file is damaged.")
    if version != VERSION:
        raise ValueError(f"Expected format version {VERSION} of {os.fspath(path)!r}, got {version}: update sten-torch.")
    return header


def _unflatten(tensors: dict[str, Tensor], header: dict) -> dict[str, Tensor]:
    """The state in a file, with sparse weights validated."""
    state: dict[str, Tensor] = {}
    for name, entry in header["sparse"].items():
        parts = {k.removeprefix(name + "."): tensors.pop(k) for k in list(tensors) if k.startswith(name + ".")}
        try:
            layout, values = str(entry["layout"]), dict(entry["fields"])
            state[name] = SparseTensor(*checked(layout, values, parts, entry["shape"], entry["transposed"]))
        except KeyError as error:
            raise ValueError(f"Expected {error} in the file's description of {name}, got none.") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None
    state.update(tensors)
    for name, other in header["ties"].items():
        if other not in state:
            raise ValueError(f"Expected {other}, to which the file ties {name}, got a file without it.")
        state[name] = state[other]
    return state


def _expect_fit(current: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise ValueError unless names, shapes and kinds of dtypes are the model's, and tied entries equal."""
    missing, surplus = sorted(set(current) - set(state)), sorted(set(state) - set(current))
    if missing or surplus:
        raise ValueError(
            f"Expected the model's names in the file, got none for {missing[:5]} and {surplus[:5]} too many."
        )
    first: dict[int, str] = {}
    for name, have in current.items():
        value = state[name]
        if not isinstance(have, Tensor):
            raise ValueError(f"Expected only tensors in the model's state, got a {type(have).__name__} for {name}.")
        if value.shape != have.shape:
            raise ValueError(f"Expected shape {tuple(have.shape)} for {name}, got {tuple(value.shape)} in the file.")
        if value.is_floating_point() != have.is_floating_point() or value.is_complex() != have.is_complex():
            raise ValueError(f"Expected {have.dtype} or the like for {name}, got {value.dtype} in the file.")
        if have.is_meta:
            raise ValueError(
                f"Expected a model with memory, got {name} on meta: call model.to_empty(device=...) first."
            )
        other = state[first.setdefault(id(have), name)]
        if value is not other and not _same(value, other):
            raise ValueError(f"Expected equal numbers for {first[id(have)]} and {name}, which are tied, got others.")


def _same(a: Tensor, b: Tensor) -> bool:
    dense = [t.to_dense() if isinstance(t, SparseTensor) else t for t in (a, b)]
    return torch.equal(*dense)


@torch.no_grad()
def _adopt(targets: list[Target], current: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Put a checked state into the model: weights that are sparse on either side change form, all else is copied."""
    moved, used = set(), set()
    for target in targets:
        value = state.get(target.names[0])
        dense = target.weight is None and not isinstance(target.tensor, SparseTensor)
        if value is None or (dense and not isinstance(value, SparseTensor)):
            continue
        value = copy.deepcopy(value) if id(value) in used else value  # tied in the file, not in the model
        used.add(id(value))
        move(target, value.to(target.tensor.device, target.tensor.dtype), [])
        moved.update(target.names)
    for name, have in current.items():
        if name not in moved:
            have.copy_(state[name])
