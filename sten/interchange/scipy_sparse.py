"""Sparse matrices of SciPy from and to SparseTensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError
from ..tensor import SparseTensor
from .torch_sparse import compressed, divides, from_coo, has_blocks, to_torch


def from_scipy(matrix: Any) -> SparseTensor:
    """Store a sparse matrix or array of SciPy as a SparseTensor: `bsr` as BSR, every other format as CSR.

    Args:
        matrix: floating point, of two dimensions. Repeated entries are added.

    Raises:
        TypeError: not a sparse matrix of SciPy.
        FormatError: its indices are out of range.

    Example:
        >>> import numpy, scipy.sparse, sten
        >>> sten.from_scipy(scipy.sparse.csr_array(numpy.eye(4, dtype="float32"))).sparse_layout
        CSR()
    """
    kind = getattr(matrix, "format", None)
    if not type(matrix).__module__.startswith("scipy.sparse") or not isinstance(kind, str):
        raise TypeError(f"Expected a sparse matrix of SciPy, got {type(matrix).__name__}; use sten.from_dense.")
    if kind in ("csr", "csc", "bsr"):
        try:
            matrix.check_format(full_check=True)  # SciPy's own conversions trust the indices
        except (ValueError, IndexError) as error:
            raise FormatError(
                f"Expected a {kind} matrix of SciPy in order, got one of which it says: {error}."
            ) from error
        matrix = matrix.tocsr() if kind == "csc" else matrix.copy()
        matrix.sum_duplicates()
        return compressed(_tensor(matrix.indptr), _tensor(matrix.indices), _tensor(matrix.data), tuple(matrix.shape))
    matrix = matrix.tocoo()
    index = torch.stack([_tensor(matrix.row).long(), _tensor(matrix.col).long()])
    return from_coo(index, _tensor(matrix.data), tuple(matrix.shape))


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiu" or not array.dtype.isnative:
        raise FormatError(f"Expected floating-point numbers in the matrix, got {array.dtype}; convert it first.")
    return torch.tensor(array)


def to_scipy(w: SparseTensor) -> Any:
    """A weight as a `scipy.sparse.bsr_array`, if it is stored in BSR, or a `csr_array`, explicit zeros included.

    Raises:
        TypeError: `w` is not a SparseTensor.
        ValueError: its dtype is not float32 or float64, which are all that SciPy computes with, or it is no matrix.

    Example:
        >>> import torch, sten
        >>> sten.to_scipy(sten.from_dense(torch.eye(4), sten.NM(2, 4))).shape
        (4, 4)
    """
    import scipy.sparse

    if isinstance(w, SparseTensor) and (w.dtype not in (torch.float32, torch.float64) or w.dim() != 2):
        raise ValueError(f"Expected a matrix of float32 or float64 for SciPy, got {w.dtype} of shape {tuple(w.shape)}.")
    if isinstance(w, SparseTensor) and w.transposed:
        return to_scipy(w.detach().t()).T
    ragged = isinstance(w, SparseTensor) and has_blocks(w) and not divides(w)
    tensor = to_torch(w, torch.sparse_csr if ragged else None).cpu()
    make = scipy.sparse.bsr_array if tensor.layout == torch.sparse_bsr else scipy.sparse.csr_array
    numbers = (tensor.values().numpy(), tensor.col_indices().numpy(), tensor.crow_indices().numpy())
    return make(numbers, shape=tuple(tensor.shape))
