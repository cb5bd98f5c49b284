"""save, load and inspect: one safetensors file with the parts of every weight, and their layouts as JSON in its header.

No pickle, and no import of a name from a file: a layout must be registered, or declared by an installed package, and
every index is checked before use. The file has its name only when it is complete, and checksums detect bytes that were
changed later. docs/formats.md describes the format and its versions.
"""

from __future__ import annotations

import copy
import json
import math
import os
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import tensor_file
from .backends import cpp
from .checked import checked
from .conversion.pretrained import KEY
from .conversion.recipe import recipes_of, set_recipes
from .conversion.reparametrize import move
from .conversion.select import Target, all_weights, expect_model, once_each
from .conversion.site_files import change_of_sites, described_sites, expect_site_entries
from .conversion.state_dict_hooks import accept_every_form, expect_undivided, finalized_state
from .errors import FormatError
from .layouts.registry import fields
from .tensor import SparseTensor
from .training import engine
from .training.inference_mode import ordinary_tensors

Model = TypeVar("Model", bound=nn.Module)
VERSION = 4


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model's parameters, buffers and sites to a safetensors file, sparse weights as their parts.

    Args:
        model: in any form; weights in trainable form are written like finalized ones.
        path: the file; it is replaced in one step, so that a killed process leaves the old file or the new one.

    Raises:
        ValueError: the state has something that is not a tensor (an extra state of a module), a site has a method with
            fields that JSON cannot hold, or `path` is no regular file.
        FileNotFoundError: the folder does not exist.
        PermissionError: the file is read-only.
        OSError: the disk is full.

    Example:
        >>> import tempfile, torch, sten
        >>> model = sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4))
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> sten.save(model, path)
        >>> sten.load(torch.nn.Linear(8, 4), path).weight.sparse_layout
        NM(n=2, m=4)
    """
    expect_model(model)
    tensors, sparse, ties = _flatten(model)
    header = {"version": VERSION, "sparse": sparse, "ties": ties, "sites": described_sites(model)}
    header["recipes"] = recipes_of(model)
    tensor_file.write(path, tensors, {"format": "pt", "sten": json.dumps(header)}, cpp.crc32())


def _flatten(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict], dict[str, str]]:
    """(plain tensors, descriptions of sparse weights, ties) of a model's state."""
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, dict] = {}
    ties: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, value in finalized_state(model).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"Expected only tensors in the state, got a {type(value).__name__} for {name}.")
        if value.is_meta:
            raise ValueError(f"Expected a model with numbers, got {name} on the meta device; load or initialize it.")
        if seen.setdefault(id(value), name) != name:
            ties[name] = seen[id(value)]
        elif isinstance(value, SparseTensor):
            sparse[name] = description(value)
            tensors.update({f"{name}.{part}": tensor for part, tensor in value.parts.items()})
        else:
            tensors[name] = value
    return tensors, sparse, ties


@ordinary_tensors
def load(model: Model, path: str | os.PathLike | None = None, assign: bool = False, mmap: bool = False) -> Model:
    """Read a file of `sten.save` into a model of the same architecture, dense or sparse, in place.

    All or nothing: names, shapes, layouts and indices are checked before the model is changed. Weights that are sparse
    in the file become SparseTensor Parameters, the others dense ones, in the model's dtype and on its device. Their
    identity and ties do not change, and optimizers that sten knows (`sten.attach`) are updated. Training with a method
    ends: a run is resumed from `model.state_dict()`, not from such a file. The sites of the model
    (`sten.sparsify(site=...)`) become those of the file; a file of a version before 4 knows none, and leaves them.

    Args:
        model: on the meta device only with `assign`.
        path: the file.
        assign: the file's dense tensors take the place of the model's, as in `load_state_dict`, so that a model made on
            the meta device is loaded without a second copy of it.
        mmap: the numbers of weights are pages of the file, read when they are used and copied when they are written, as
            in `torch.load`; the file must not be changed meanwhile. Patterns are always read.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        FormatError: not a complete sten file, an unknown layout or method, an index out of range, or names, shapes and
            sites that are not the model's.
        TypeError: the model is wrapped, by DistributedDataParallel or the like: load into the inner one.

    Example:
        >>> import tempfile, torch, sten
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> sten.save(sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4)), path)
        >>> model = sten.load(torch.nn.Linear(8, 4), path)
        >>> model.weight.density
        0.5
        >>> with torch.device("meta"):
        ...     empty = torch.nn.Linear(8, 4)
        >>> sten.load(empty, path, assign=True).weight.device
        device(type='cpu')
    """
    if path is None:  # as for torch.load, which needs no model
        raise TypeError("Expected sten.load(model, path), got one argument; make a model of this architecture first.")
    targets = once_each(all_weights(model))
    expect_undivided(model)
    state, recipes, entries = read_state(path, mmap)
    sites = change_of_sites(model, entries, state)
    sites.take(state)
    current = sites.without_gone(finalized_state(model))
    _expect_fit(model, current, state, assign)
    engine.release(model)
    sites.remove()
    _adopt(targets, current, state, _owners(model) if assign else {})
    sites.install()
    accept_every_form(model)
    set_recipes(model, recipes)
    return model


def inspect(path: str | os.PathLike) -> dict[str, Any]:
    """What a file of `sten.save` holds, from its header alone: no layout is made, and no number is read.

    Args:
        path: the file.

    Returns:
        A dictionary: `version` of the format; `tensors`, the dense ones, name -> `{"dtype", "shape", "bytes"}`;
        `sparse`, name -> `{"layout", "fields", "shape", "transposed", "parts", "bytes", "density"}`, where `density` is
        the number of values divided by that of entries (padding counts); `ties`, name -> the name that it is tied to;
        `sites`, a list of `{"module", "site", "method", "layout"}`; `recipes`, what `sten.sparsify` was called with, as
        data of `sten.Recipe.to_json`.

    Raises:
        FileNotFoundError: no such file.
        FormatError: not a file of `sten.save`.

    Example:
        >>> import tempfile, torch, sten
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> sten.save(sten.sparsify(torch.nn.Linear(8, 4), sten.CSR(), sparsity=0.75), path)
        >>> about = sten.inspect(path)
        >>> about["sparse"]["weight"]["layout"], about["sparse"]["weight"]["density"], about["tensors"]
        ('CSR', 0.25, {'bias': {'dtype': 'float32', 'shape': [4], 'bytes': 16}})
    """
    with tensor_file.open_file(path) as file:
        raw = tensor_file.read_header(file)
    header = _header(raw, path)
    tensors: dict[str, dict[str, Any]] = {
        name: {
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": list(entry.shape),
            "bytes": entry.end - entry.start,
        }
        for name, entry in raw.tensors.items()
    }
    sparse = {}
    for name, entry in header["sparse"].items():
        parts = {key.removeprefix(name + "."): tensors.pop(key) for key in list(tensors) if key.startswith(name + ".")}
        entries, values = math.prod(entry["shape"]), math.prod(parts.get("values", {"shape": [0]})["shape"])
        total = sum(part["bytes"] for part in parts.values())
        sparse[name] = {**entry, "parts": parts, "bytes": total, "density": values / max(entries, 1)}
    whole = {"version": header["version"], "tensors": tensors, "sparse": sparse, "ties": header["ties"]}
    return {**whole, "sites": header.get("sites", []), "recipes": header.get("recipes", [])}


def read_state(path: str | os.PathLike, mmap: bool = False) -> tuple[dict[str, Tensor], list, list | None]:
    """The state in a file, checked, the record of its recipes, and its sites (None: it does not know of any)."""
    with tensor_file.open_file(path) as file:
        raw = tensor_file.read_header(file)
        header = _header(raw, path)
        owned = {f"{name}." for name in header["sparse"]}
        pattern = {key for key in raw.tensors if key.rpartition(".")[0] + "." in owned and not key.endswith(".values")}
        mapped = frozenset(raw.tensors) - pattern if mmap else frozenset()
        tensors = tensor_file.read(file, raw, mapped, cpp.crc32())
    crc32 = header.get("crc32")
    if "crc32" not in raw.metadata and crc32 != checksum_of_version_1(tensors):
        raise FormatError(
            f"Expected tensors with the checksum of {os.fspath(path)!r}, got others: the file is damaged."
        )
    return _unflatten(tensors, header), header.get("recipes", []), header.get("sites")


def checksum_of_version_1(tensors: dict[str, Tensor]) -> int:
    """One CRC-32 of all tensors in the order of their names."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensor_file.as_bytes(tensors[name]), total)
    return total


def _same_header(header: dict[str, Any]) -> dict[str, Any]:
    """From version 1 to 2 the checksums moved to the file's own metadata; to 3, NM got bitmaps (`Layout.upgrade`); to
    4, `sites` came, without which a file leaves those of a model."""
    return header


# version -> to the next one
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = dict.fromkeys((1, 2, 3), _same_header)


def _header(raw: tensor_file.Header, path: str | os.PathLike) -> dict[str, Any]:
    """The description in a file of `sten.save`; FormatError if it is none."""
    if KEY in raw.metadata:
        raise FormatError(
            f"Expected a file of sten.save, got {os.fspath(path)!r} of save_pretrained; load it by from_pretrained."
        )
    return header_of(raw.metadata.get("sten"), path)


def header_of(text: str | None, path: str | os.PathLike) -> dict[str, Any]:
    """The description of the sparse weights, of the present version; FormatError unless it is well formed."""
    if text is None:
        raise FormatError(f"Expected a file of sten.save, got {os.fspath(path)!r} without 'sten' in its header.")
    try:
        header = json.loads(text)
        version = header.get("version")
    except (ValueError, AttributeError, RecursionError):
        header, version = {}, 0
    if type(version) is int and version > VERSION:
        raise FormatError(
            f"Expected format version {VERSION} of {os.fspath(path)!r} at most, got {version}: update sten-torch."
        )
    wrong = f"Expected valid JSON for 'sten' in the header of {os.fspath(path)!r}: the file is damaged."
    if type(version) is not int or version < 1:
        raise FormatError(wrong)
    sparse, ties = header.get("sparse"), header.get("ties")
    texts = isinstance(ties, dict) and all(isinstance(name, str) for name in ties.values())
    if not isinstance(sparse, dict) or not texts or not all(isinstance(entry, dict) for entry in sparse.values()):
        raise FormatError(wrong)
    if not isinstance(header.get("recipes", []), list):  # a record, of which nothing is made
        raise FormatError(wrong)
    expect_descriptions(sparse)
    expect_site_entries(header.get("sites", []))
    for step in range(version, VERSION):
        header = UPGRADES[step](header)
    return header


def description(w: SparseTensor) -> dict[str, Any]:
    """What a file says of a sparse weight beside its parts, as JSON."""
    layout = {"layout": type(w.sparse_layout).__name__, "fields": fields(w.sparse_layout)}
    return {**layout, "shape": list(w.stored_shape), "transposed": w.transposed}


def expect_descriptions(sparse: dict[str, dict]) -> None:
    """Raise FormatError unless each description of a sparse weight has entries of the right kinds."""
    for name, entry in sparse.items():
        for key, kind in (("layout", str), ("fields", dict), ("shape", list), ("transposed", bool)):
            if not isinstance(entry.get(key), kind):
                raise FormatError(
                    f"Expected {key!r} in the file's description of {name}, got {str(entry.get(key))[:80]}."
                )
        if not all(type(size) is int and 0 <= size < 2**62 for size in entry["shape"]):
            raise FormatError(f"{name}: Expected a shape of non-negative sizes, got {str(entry['shape'])[:80]}.")


def described(name: str, entry: dict[str, Any], parts: dict[str, Tensor]) -> SparseTensor:
    """The weight of this description and these parts, validated; FormatError if it is none."""
    try:
        made_of = checked(entry["layout"], entry["fields"], parts, entry["shape"], entry["transposed"])
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error
    return SparseTensor(*made_of)


def _unflatten(tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    """The state in a file, with sparse weights validated."""
    state: dict[str, Tensor] = {}
    for name, entry in header["sparse"].items():
        parts = {k.removeprefix(name + "."): tensors.pop(k) for k in list(tensors) if k.startswith(name + ".")}
        state[name] = described(name, entry, parts)
    state.update(tensors)
    for name, other in header["ties"].items():
        if other not in state:
            raise FormatError(f"Expected {other}, to which the file ties {name}, got a file without it.")
        state[name] = state[other]
    return state


def _expect_fit(model: nn.Module, current: dict[str, Tensor], state: dict[str, Tensor], assign: bool) -> None:
    """Raise FormatError unless names, shapes and kinds of dtypes are the model's, and tied entries equal."""
    missing, surplus = sorted(set(current) - set(state)), sorted(set(state) - set(current))
    if missing or surplus:
        raise FormatError(
            f"Expected the model's names in the file, got none for {missing[:5]} and {surplus[:5]} too many."
        )
    first: dict[int, str] = {}
    for name, have in current.items():
        value = state[name]
        if not isinstance(have, Tensor):
            raise FormatError(f"Expected only tensors in the model's state, got a {type(have).__name__} for {name}.")
        if value.shape != have.shape:
            raise FormatError(f"Expected shape {tuple(have.shape)} for {name}, got {tuple(value.shape)} in the file.")
        if value.is_floating_point() != have.is_floating_point() or value.is_complex() != have.is_complex():
            raise FormatError(f"Expected {have.dtype} or the like for {name}, got {value.dtype} in the file.")
        if have.is_meta and not assign:
            raise FormatError(
                f"Expected a model with memory, got {name} on meta: pass assign=True, or call "
                "model.to_empty(device=...) first."
            )
        other = state[first.setdefault(id(have), name)]
        if value is not other and not _same(value, other):
            raise FormatError(f"Expected equal numbers for {first[id(have)]} and {name}, which are tied, got others.")
    for name, buffer in model.named_buffers():
        if assign and buffer.is_meta and name not in current and "_pattern." not in name:
            raise FormatError(
                f"Expected buffers that the file can hold, got {name}, which is not persistent, on meta: make it on "
                "the CPU."
            )


def _same(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, SparseTensor) and isinstance(b, SparseTensor) and a.sparse_layout == b.sparse_layout:
        return a.same_pattern(b) and torch.equal(a.parts["values"], b.parts["values"])
    dense = [t.to_dense() if isinstance(t, SparseTensor) else t for t in (a, b)]
    return torch.equal(*dense)


Owners = dict[int, list[tuple[dict[str, Any], str]]]


def _owners(model: nn.Module) -> Owners:
    """Where each parameter and buffer is stored: id -> (dictionary of a module, key)."""
    places: Owners = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, t in table.items():
                places.setdefault(id(t), []).append((table, key))
    return places


@torch.no_grad()
def _adopt(targets: list[Target], current: dict[str, Tensor], state: dict[str, Tensor], owners: Owners) -> None:
    """Put a checked state into the model: weights that are sparse on either side change form, all else is copied, or
    put in the place of what `owners` lists."""
    moved, used = set(), set()
    for target in targets:
        value = state.get(target.names[0])
        dense = target.weight is None and not isinstance(target.tensor, SparseTensor)
        if value is None or (dense and not isinstance(value, SparseTensor)):
            continue
        value = copy.deepcopy(value) if id(value) in used else value  # tied in the file, not in the model
        used.add(id(value))
        device = value.device if target.tensor.is_meta else target.tensor.device
        move(target, value.to(device, target.tensor.dtype), [])
        moved.update(target.names)
    done: set[int] = set()
    for name, have in current.items():
        if name in moved or id(have) in done:
            continue
        done.add(id(have))
        if id(have) not in owners:
            have.copy_(state[name])
            continue
        value = state[name].to(state[name].device if have.is_meta else have.device, have.dtype)
        new = nn.Parameter(value, have.requires_grad) if isinstance(have, nn.Parameter) else value
        for table, key in owners[id(have)]:
            table[key] = new
