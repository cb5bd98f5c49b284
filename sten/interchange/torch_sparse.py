"""Tensors of `torch.sparse` from and to SparseTensors."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checked import checked
from ..conversion.state_dict_hooks import accept_every_form
from ..errors import FormatError
from ..layouts import BSR, CSR, NM
from ..layouts.checks import expect_range
from ..layouts.compressed_rows import expect_compressed, row_of_slots
from ..layouts.registry import fields
from ..tensor import SparseTensor, from_dense
from ..training.attribute import read_every_finalized

T = TypeVar("T", Tensor, nn.Module)


def from_torch(tensor: T) -> T:
    """Store a tensor of `torch.sparse` as a SparseTensor; of a module, each such Parameter, in place.

    COO, CSR and CSC become CSR, BSR stays BSR, `SparseSemiStructuredTensor` (on a GPU) becomes NM(2, 4).

    Args:
        tensor: floating point, without batch dimensions; or a module.

    Returns:
        SparseTensor with the same entries, explicit zeros included, over memory of its own. It does not require a
        gradient; the Parameters of a module do as before.

    Raises:
        TypeError: not a tensor of torch.sparse.
        FormatError: its indices are out of range or not in order; of a module, nothing was changed.

    Example:
        >>> import torch, sten
        >>> w = sten.from_torch(torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse_csr())
        >>> w.sparse_layout, w.density
        (CSR(), 0.5)
    """
    if isinstance(tensor, nn.Module):
        return _module_from_torch(tensor)
    if isinstance(tensor, torch.sparse.SparseSemiStructuredTensor):
        if not tensor.is_cuda:  # torch unpacks it by a product
            raise TypeError("Expected a semi-structured tensor on a GPU, got one on the CPU; call .cuda() on it.")
        return from_dense(tensor.to_dense(), NM(2, 4))
    if not isinstance(tensor, Tensor) or isinstance(tensor, SparseTensor) or tensor.layout == torch.strided:
        raise TypeError(f"Expected a tensor of torch.sparse, got {kind(tensor)}; use sten.from_dense for a dense one.")
    tensor, shape = tensor.detach(), tuple(tensor.shape)
    if tensor.layout == torch.sparse_coo:
        return from_coo(tensor._indices(), tensor._values(), shape)
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        rows, columns = tensor.ccol_indices(), tensor.row_indices()
        values = tensor.values() if tensor.layout == torch.sparse_csc else tensor.values().transpose(-1, -2)
        return compressed(rows, columns, values, shape[::-1]).t()
    return compressed(tensor.crow_indices(), tensor.col_indices(), tensor.values(), shape)


def _module_from_torch(module: nn.Module) -> nn.Module:
    found: dict[int, nn.Parameter] = {}
    for param in module.parameters():
        if not isinstance(param, SparseTensor) and kind(param) != "torch.strided":
            found[id(param)] = nn.Parameter(from_torch(param), param.requires_grad)
    if not found:
        raise TypeError("Expected a module with Parameters of torch.sparse, got none; sten.sparsify prunes dense ones.")
    for each in module.modules():
        for name, param in each._parameters.items():
            each._parameters[name] = found.get(id(param), param)
    read_every_finalized(module)
    accept_every_form(module)
    return module


def kind(thing: Any) -> str:
    plain = type(thing) in (Tensor, nn.Parameter)
    return str(thing.layout) if plain else type(thing).__name__


def from_coo(index: Tensor, values: Tensor, shape: tuple[int, ...]) -> SparseTensor:
    """A CSR weight of any number of dimensions; repeated entries are added."""
    if math.prod(shape) >= 2**62:
        raise FormatError(f"Expected fewer than 2**62 entries, got shape {shape}.")
    if len(shape) < 2 or len(index) != len(shape) or values.dim() != 1 or index.shape[1] != len(values):
        raise FormatError(
            f"Expected a matrix with one number an entry, got shape {shape} and {values.dim() - 1} dense."
        )
    sizes = torch.tensor(shape, device=index.device).view(-1, 1)
    if bool(((index < 0) | (index >= sizes)).any()):
        raise FormatError(f"Expected indices inside of shape {shape}, got others.")
    columns, flat = math.prod(shape[1:]), torch.zeros_like(index[0])
    for size, positions in zip(shape, index, strict=True):
        flat = flat * size + positions
    flat, slot = flat.unique(return_inverse=True)  # ascending: by rows, and by columns within a row
    values = values.new_zeros(len(flat)).index_add_(0, slot, values)
    crow = torch.searchsorted(flat, torch.arange(shape[0] + 1, device=flat.device) * columns)
    return compressed(crow, flat % max(columns, 1), values, shape)


def compressed(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, ...]) -> SparseTensor:
    """Of compressed rows, of numbers or of blocks."""
    if crow.dim() != 1 or col.dim() != 1 or values.dim() not in (1, 3):
        raise FormatError(f"Expected a matrix without batch or dense dimensions, got shape {shape}.")
    block = tuple(values.shape[1:])
    try:
        layout = BSR(block) if block else CSR()
        layout.check(shape)
        rows, columns = layout.grid(shape) if block else (shape[0], math.prod(shape[1:]))
        if len(crow) != rows + 1:
            raise ValueError(f"Expected {rows + 1} numbers in part 'crow' of {layout}, got {len(crow)}.")
        expect_range(layout, "crow", crow, 0, min(len(col) + 1, 2**31))
        expect_range(layout, "col", col, 0, columns)
        parts = {
            "values": values.clone(memory_format=torch.contiguous_format),
            "crow": _index(crow),
            "col": _index(col),
        }
        expect_compressed(layout, "crow", parts["crow"], "col", parts["col"], columns)
    except ValueError as error:
        raise FormatError(str(error)) from error
    if block:
        parts |= layout.by_columns(row_of_slots(parts["crow"], len(col)), col, col.long().bincount(minlength=columns))
    return SparseTensor(*checked(type(layout).__name__, fields(layout), parts, shape))


def _index(numbers: Tensor) -> Tensor:
    """A copy, also of what is int32."""
    return numbers.to(torch.int32, copy=True)


def to_torch(w: SparseTensor, layout: torch.layout | None = None) -> Tensor:
    """A weight as a tensor of `torch.sparse`, explicit zeros included.

    Args:
        w: a weight, or what `module.weight` reads as.
        layout: `torch.sparse_coo`, `torch.sparse_csr` or `torch.sparse_bsr` (of a weight in BSR). None: BSR for BSR,
            COO for more than two dimensions, CSR for all others. For semi-structured kernels call
            `torch.sparse.to_sparse_semi_structured(w.to_dense())`.

    Returns:
        A tensor without gradient over memory of its own; in CSC or BSC of a transposed weight (Hugging Face's Conv1D).

    Raises:
        TypeError: `w` is not a SparseTensor.
        ValueError: torch has no such tensor: another layout, or blocks that do not divide the shape.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.eye(4), sten.BSR((2, 2)))
        >>> sten.to_torch(w).layout, sten.to_torch(w, torch.sparse_coo).layout
        (torch.sparse_bsr, torch.sparse_coo)
    """
    if not isinstance(w, SparseTensor):
        raise TypeError(f"Expected a SparseTensor, got {kind(w)}; call .to_sparse_csr() on a dense tensor.")
    w, blocks = w.detach(), has_blocks(w)
    if layout is None:
        layout = torch.sparse_bsr if blocks else torch.sparse_csr if w.dim() == 2 else torch.sparse_coo
    if layout == torch.sparse_coo:
        mask = w.mask()
        return torch.sparse_coo_tensor(mask.nonzero().t(), w.to_dense()[mask], w.shape, is_coalesced=True)
    if layout not in (torch.sparse_csr, torch.sparse_bsr) or w.dim() != 2:
        raise ValueError(
            f"Expected torch.sparse_coo, or sparse_csr or sparse_bsr of a matrix, got {layout} of a weight of shape "
            f"{tuple(w.shape)}; use layout=torch.sparse_coo."
        )
    if layout == torch.sparse_bsr and not (blocks and divides(w)):
        raise ValueError(
            f"Expected a weight in BSR whose blocks divide its shape for torch.sparse_bsr, got {w.sparse_layout} of "
            f"shape {w.stored_shape}; use layout=torch.sparse_csr."
        )
    if layout == torch.sparse_csr and w.sparse_layout.pattern != CSR.pattern:
        w = from_dense(w.to_dense(), CSR(), w.mask())
    parts, shape, used = w.parts, w.stored_shape, int(w.parts["crow"][-1])  # the slots behind are free
    crow, col, values = parts["crow"].clone(), parts["col"][:used].clone(), parts["values"][:used].clone()
    if not w.transposed:
        make = torch.sparse_bsr_tensor if values.dim() == 3 else torch.sparse_csr_tensor
        return make(crow, col, values, shape)
    if values.dim() == 3:
        return torch.sparse_bsc_tensor(crow, col, values.transpose(1, 2).contiguous(), shape[::-1])
    return torch.sparse_csc_tensor(crow, col, values, shape[::-1])


def has_blocks(w: SparseTensor) -> bool:
    """Whether a weight is stored as BSR is, block rows after block rows."""
    return w.sparse_layout.pattern == BSR.pattern


def divides(w: SparseTensor) -> bool:
    """Whether the blocks of a weight in BSR divide its shape, as torch and SciPy want it."""
    return not any(size % side for size, side in zip(w.stored_shape, w.parts["values"].shape[1:], strict=True))
