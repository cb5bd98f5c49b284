"""save and load: one safetensors file with the parts of every weight, and their layouts as JSON in its header.

No pickle, no import of a name found in a file; a layout must be registered, and every index is checked before use. The
file appears under its name only when it is complete.

Format: each part of a sparse weight `fc.weight` is a tensor `fc.weight.<part>`, all else a tensor of its own name. The
header's `sten` entry is `{"version": 1, "sparse": {name: {"layout", "fields", "shape", "transposed"}}, "ties": {name: name}}`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .convert import become_sparse, finalize_names
from .layout import fields
from .tensor import SparseTensor, checked

VERSION = 1
EXTRA = "io needs the package safetensors: pip install safetensors (or sten-torch[hf])."


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
        >>> sten.load(torch.nn.Linear(8, 4), path).weight.spec
        NM(n=2, m=4)
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(EXTRA) from None
    tensors, sparse, ties = _flatten(model)
    header = json.dumps({"version": VERSION, "sparse": sparse, "ties": ties})
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"format": "pt", "sten": header})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _flatten(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, dict] = {}
    ties: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in finalize_names(model).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}, not a tensor: sten.save writes tensors only.")
        key = id(value.parts["values"]) if isinstance(value, SparseTensor) else (value.data_ptr(), value.shape, value.stride())
        if value.numel() and key in seen:
            ties[name] = seen[key]
            continue
        seen[key] = name
        if isinstance(value, SparseTensor):
            about = {"layout": type(value.spec).__name__, "fields": fields(value.spec)}
            sparse[name] = {**about, "shape": list(value.stored_shape), "transposed": value.transposed}
            tensors.update({f"{name}.{part}": tensor.detach().contiguous() for part, tensor in value.parts.items()})
        else:
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
    return tensors, sparse, ties


def load(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Read a file of `sten.save` into a model of the same architecture, dense or sparse, in place; it is returned.

    All or nothing: names, shapes, layouts and indices are checked before the model is touched. Sparse weights become
    SparseTensor Parameters; ties of the model stay.

    Raises:
        ValueError: not a complete sten file, an unknown layout, an index out of range, or names and shapes that do not
            fit the model; one sentence.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(EXTRA) from None
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("sten")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not a complete safetensors file ({error}).") from None
    state = _unflatten(tensors, _header(header, path))
    current = finalize_names(model)
    missing, surplus = sorted(set(current) - set(state)), sorted(set(state) - set(current))
    if missing or surplus:
        raise ValueError(f"The file does not fit the model: it lacks {missing[:5]} and has {surplus[:5]} too many.")
    for name, value in state.items():
        if value.shape != current[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)} in the file and {tuple(current[name].shape)} in the model.")
    become_sparse(model, {name: value for name, value in state.items() if isinstance(value, SparseTensor)})
    with torch.no_grad():
        for name, target in finalize_names(model).items():
            if not isinstance(state[name], SparseTensor):
                target.copy_(state[name])
    return model


def _header(text: str | None, path) -> dict:
    if text is None:
        raise ValueError(f"{os.fspath(path)!r} was not written by sten.save: its header has no 'sten' entry.")
    try:
        header = json.loads(text)
        fits = isinstance(header["sparse"], dict) and isinstance(header["ties"], dict)
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(f"The 'sten' entry in the header of {os.fspath(path)!r} is damaged.")
    if header.get("version") != VERSION:
        raise ValueError(f"{os.fspath(path)!r} has format version {header.get('version')}; this sten reads {VERSION}.")
    return header


def _unflatten(tensors: dict[str, Tensor], header: dict) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, about in header["sparse"].items():
        parts = {k.removeprefix(name + "."): tensors.pop(k) for k in list(tensors) if k.startswith(name + ".")}
        try:
            layout, values = str(about["layout"]), dict(about["fields"])
            state[name] = SparseTensor(*checked(layout, values, parts, about["shape"], about["transposed"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None
    state.update(tensors)
    for name, other in header["ties"].items():
        if other not in state:
            raise ValueError(f"The file ties {name} to {other}, which it does not have.")
        state[name] = state[other]
    return state
