"""Readers of raw storage: a SparseTensor has none of its own, only its parts have.

Torch gives every tensor a storage, and that of a SparseTensor has no memory: who reads it gets one sentence. Readers in
C++ that no Python function sees are stopped where they take the pointer (`SparseTensor.__new__`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..caller import calling_module
from ..tensor import SparseTensor, function


def _refusal(w: SparseTensor) -> TypeError:
    return TypeError(
        f"Expected a tensor with a storage, got a {w.sparse_layout} tensor; read w.to_dense() or a part, "
        "w.parts['values'], and write files with sten.save or torch.save."
    )


@function(Tensor.untyped_storage)
def untyped_storage(w: SparseTensor) -> torch.UntypedStorage:
    """The empty storage, for torch's own modules, which compare identities; nobody else can use it."""
    if not calling_module().startswith("torch."):
        raise _refusal(w)
    return w.untyped_storage()


@function(Tensor.data_ptr, Tensor.storage, Tensor.__cuda_array_interface__.__get__)
def no_storage(w: SparseTensor, *args):
    raise _refusal(w)


@function(Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__)
def to_other_library(w: Tensor, *args, **kwargs):
    raise TypeError(
        "Expected a dense tensor for numpy(), tolist() or DLPack, got a SparseTensor; call to_dense() first."
    )


@function(Tensor.share_memory_)
def share_memory_(w: SparseTensor) -> SparseTensor:
    for part in w.parts.values():
        part.share_memory_()
    return w


@function(Tensor.is_shared)
def is_shared(w: SparseTensor) -> bool:
    return all(part.is_shared() for part in w.parts.values())


@function(Tensor.pin_memory)
def pin_memory(w: SparseTensor, *args) -> SparseTensor:
    parts = {name: part.pin_memory(*args) for name, part in w.parts.items()}
    return SparseTensor(w.sparse_layout, parts, w.stored_shape, w.transposed)


@function(Tensor.is_pinned)
def is_pinned(w: SparseTensor, *args) -> bool:
    return all(part.is_pinned(*args) for part in w.parts.values())


@function(Tensor.record_stream)
def record_stream(w: SparseTensor, stream) -> None:
    """Until the work on the stream is done, the memory of the parts is not given to others."""
    for part in w.parts.values():
        part.record_stream(stream)
