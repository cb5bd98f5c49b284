"""save and load: one safetensors file with the parts of every weight, and their layouts as JSON in its header.

No pickle, no import of a name found in a file; a layout must be registered, and every index is checked before use. The
file appears under its name only when it is complete, and a checksum finds bytes that were changed later.

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
from .conversion.select import Target, all_weights, once_each
from .conversion.state_dict_hooks import finalized_state
from .layouts.registry import fields
from .tensor import SparseTensor, checked

Model = TypeVar("Model", bound=nn.Module)
VERSION = 1
EXTRA = "sten.save and sten.load need the package safetensors: pip install safetensors (or sten-torch[hf])."


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model's parameters and buffers to a safetensors file, sparse weights as their parts.

    Args:
        model: in any form; weights in trainable form are written like finalized ones.
        path: the file; it is replaced in one step, so that a killed process leaves the old file or the new one.

    Raises:
        ValueError: the state holds something that is not a tensor (an extra state of a module).

    Example:
        >>> import tempfile, torch, sten
        >>> model = sten.sparsify(torch.nn.Linear(8, 4))
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> sten.save(model, path)
        >>> sten.load(torch.nn.Linear(8, 4), path).weight.sparse_layout
        NM(n=2, m=4)
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(EXTRA) from None
    tensors, sparse, ties = _flatten(model)
    header = json.dumps({"version": VERSION, "sparse": sparse, "ties": ties, "crc32": _checksum(tensors)})
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {os.fspath(path.parent)!r} to write {path.name!r} in.")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata={"format": "pt", "sten": header})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flatten(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict], dict[str, str]]:
    """(plain tensors, what is sparse, what is tied to what) of a model's state."""
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, dict] = {}
    ties: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, value in finalized_state(model).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}, not a tensor: sten.save writes tensors only.")
        if seen.setdefault(id(value), name) != name:
            ties[name] = seen[id(value)]
        elif isinstance(value, SparseTensor):
            about = {"layout": type(value.sparse_layout).__name__, "fields": fields(value.sparse_layout)}
            sparse[name] = {**about, "shape": list(value.stored_shape), "transposed": value.transposed}
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


def load(model: Model, path: str | os.PathLike) -> Model:
    """Read a file of `sten.save` into a model of the same architecture, dense or sparse, in place; it is returned.

    All or nothing: names, shapes, layouts and indices are checked before the model is touched. Weights that are sparse
    in the file become SparseTensor Parameters, the others dense ones, in the model's dtype and on its device. They
    keep their identity, ties of the model stay, and optimizers that sten knows (`sten.attach`) follow.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a complete sten file, an unknown layout, an index out of range, or names and shapes that do not
            fit the model; one sentence.

    Example:
        >>> import tempfile, torch, sten
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> sten.save(sten.sparsify(torch.nn.Linear(8, 4)), path)
        >>> model = sten.load(torch.nn.Linear(8, 4), path)
        >>> model.weight.density
        0.5
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(EXTRA) from None
    targets = once_each(all_weights(model))
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("sten")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not a complete safetensors file ({error}).") from None
    header = _header(header, path)
    if header.get("crc32") != _checksum(tensors):
        raise ValueError(f"The checksum of {os.fspath(path)!r} does not match its tensors: the file was damaged.")
    state = _unflatten(tensors, header)
    current = finalized_state(model)
    _expect_fit(current, state)
    _adopt(targets, current, state)
    return model


def _header(text: str | None, path) -> dict:
    if text is None:
        raise ValueError(f"{os.fspath(path)!r} was not written by sten.save: its header has no 'sten' entry.")
    try:
        header = json.loads(text)
        version = header.get("version")
        fits = version != VERSION or (isinstance(header["sparse"], dict) and isinstance(header["ties"], dict))
    except (ValueError, KeyError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"The 'sten' entry in the header of {os.fspath(path)!r} is damaged.")
    if version != VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has format version {version}; this sten reads {VERSION}: update sten-torch."
        )
    return header


def _unflatten(tensors: dict[str, Tensor], header: dict) -> dict[str, Tensor]:
    """The state that a file holds, sparse weights validated."""
    state: dict[str, Tensor] = {}
    for name, about in header["sparse"].items():
        parts = {k.removeprefix(name + "."): tensors.pop(k) for k in list(tensors) if k.startswith(name + ".")}
        try:
            layout, values = str(about["layout"]), dict(about["fields"])
            state[name] = SparseTensor(*checked(layout, values, parts, about["shape"], about["transposed"]))
        except KeyError as error:
            raise ValueError(f"The description of {name} in the file lacks {error}.") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None
    state.update(tensors)
    for name, other in header["ties"].items():
        if other not in state:
            raise ValueError(f"The file ties {name} to {other}, which it does not have.")
        state[name] = state[other]
    return state


def _expect_fit(current: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """The file's names, shapes and kinds of numbers are the model's, and tied entries are equal."""
    missing, surplus = sorted(set(current) - set(state)), sorted(set(state) - set(current))
    if missing or surplus:
        raise ValueError(f"The file does not fit the model: it lacks {missing[:5]} and has {surplus[:5]} too many.")
    first: dict[int, str] = {}
    for name, have in current.items():
        value = state[name]
        if not isinstance(have, Tensor):
            raise ValueError(
                f"{name} of the model is a {type(have).__name__}, not a tensor: sten.load reads tensors only."
            )
        if value.shape != have.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)} in the file and {tuple(have.shape)} in the model.")
        if value.is_floating_point() != have.is_floating_point() or value.is_complex() != have.is_complex():
            raise ValueError(f"{name} holds {value.dtype} in the file and {have.dtype} in the model.")
        if have.is_meta:
            raise ValueError(f"{name} of the model is on the meta device: call model.to_empty(device=...) first.")
        other = state[first.setdefault(id(have), name)]
        if value is not other and not _same(value, other):
            raise ValueError(f"{first[id(have)]} and {name} are one tied weight of the model, but differ in the file.")


def _same(a: Tensor, b: Tensor) -> bool:
    dense = [t.to_dense() if isinstance(t, SparseTensor) else t for t in (a, b)]
    return torch.equal(*dense)


@torch.no_grad()
def _adopt(targets: list[Target], current: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Put a state that fits into the model: the weights that are sparse on either side move, all else is copied."""
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
