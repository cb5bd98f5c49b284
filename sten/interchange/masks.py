"""Masks as `.npz`: one boolean array, or one of packed bits, for each weight."""

from __future__ import annotations

import math
import os
import zipfile

import numpy as np
import torch
from torch import Tensor, nn

from ..atomic_file import replacing
from ..conversion.state_dict_hooks import finalized_state
from ..errors import FormatError
from ..tensor import SparseTensor

HEADER = 2**12  # bytes that a small array's header may take


def save_masks(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the mask of each sparse weight to a compressed `.npz`, as `np.packbits(mask)`, under `<name>.mask`.

    Args:
        model: in any form.
        path: the file; it is replaced in one step.

    Example:
        >>> import tempfile, torch, sten
        >>> model = sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4))
        >>> path = tempfile.mkdtemp() + "/masks.npz"
        >>> sten.save_masks(model, path)
        >>> masks = sten.load_masks(torch.nn.Linear(8, 4), path)
        >>> bool((masks["weight"] == model.weight.mask()).all())
        True
    """
    weights = {name: w for name, w in finalized_state(model).items() if isinstance(w, SparseTensor)}
    packed = {f"{name}.mask": np.packbits(w.detach().mask().cpu().numpy()) for name, w in weights.items()}
    with replacing(path) as file:
        np.savez_compressed(file, **packed)


def load_masks(model: nn.Module, path: str | os.PathLike) -> dict[str, Tensor]:
    """Read masks of a model's weights from an `.npz`, as `save_masks`, MaskLLM and others write them.

    Each array is named as a parameter, with or without `.mask` behind, and is boolean (or 0 and 1) of the weight's
    shape, or `np.packbits` of that. To prune by them: multiply the parameters by their masks, then call
    `sten.sparsify(model, layout, sparsifier=None)`.

    Args:
        model: whose weights the masks are for; it is not changed.
        path: the file.

    Returns:
        Name of the parameter -> mask, bool (True is an active entry), on the CPU.

    Raises:
        FileNotFoundError: no such file.
        FormatError: not an `.npz`, a name that is no parameter of the model, or an array that is no mask of its shape.

    Example:
        >>> import tempfile, numpy, torch, sten
        >>> path = tempfile.mkdtemp() + "/masks.npz"
        >>> numpy.savez(path, **{"weight.mask": numpy.packbits(numpy.eye(4, dtype=bool))})
        >>> sten.load_masks(torch.nn.Linear(4, 4), path)["weight"].sum()
        tensor(4)
    """
    shapes = {name: tuple(w.shape) for name, w in finalized_state(model).items() if isinstance(w, Tensor)}
    masks: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as file:
            for info in file.infolist():
                name = info.filename.removesuffix(".npy").removesuffix(".mask")
                if name not in shapes or name in masks:
                    raise FormatError(
                        f"Expected masks named as parameters of the model, once each, got {name[:200]!r}."
                    )
                if info.file_size > HEADER + 8 * math.prod(shapes[name]):  # before anything is unpacked
                    raise FormatError(f"{name}: Expected a mask of shape {shapes[name]}, got {info.file_size} bytes.")
                with file.open(info) as array:
                    masks[name] = _mask(name, np.lib.format.read_array(array, allow_pickle=False), shapes[name])
    except FileNotFoundError:
        raise
    except FormatError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for a damaged file
        raise FormatError(f"Expected an .npz of masks, got {os.fspath(path)!r} ({type(error).__name__}).") from error
    return masks


def _mask(name: str, array: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape)
    if array.dtype == np.uint8 and array.shape == (-(-size // 8),) and shape != array.shape:
        array = np.unpackbits(array, count=size).reshape(shape)
    if array.shape != shape or array.dtype.kind not in "buif" or not np.isin(array, (0, 1)).all():
        raise FormatError(
            f"{name}: Expected a boolean mask of shape {shape}, or its packed bits, got {array.dtype} of {array.shape}."
        )
    return torch.from_numpy(array.astype(bool))
