"""torch.distributed on a SparseTensor: what would write to a dense copy, or give it to other ranks in shards."""

from __future__ import annotations

import torch
from torch import Tensor

from ..caller import calling_module, no_replicas, refuse_shards
from ..tensor import ATEN, OTHERS, SparseTensor, as_it_is, aten, function
from .others import sparse_in

# collectives in place, whose schemas do not say which tensors they write: their first argument
COLLECTIVES = """broadcast_ allreduce_ allreduce_coalesced_ reduce_ allgather_ _allgather_base_ allgather_coalesced_
    allgather_into_tensor_coalesced_ reduce_scatter_ _reduce_scatter_base_ reduce_scatter_tensor_coalesced_ gather_
    scatter_ alltoall_ alltoall_base_ recv_ recv_any_source_"""
FUNCTIONS = """broadcast all_reduce all_reduce_coalesced reduce all_gather all_gather_into_tensor all_gather_coalesced
    gather scatter reduce_scatter reduce_scatter_tensor all_to_all all_to_all_single send recv isend irecv"""


def collective(func, tensors, *args, **kwargs):
    """Refuse what would be written to a dense copy. (Lists of lists do not come here: torch copies to each tensor.)"""
    if written := sparse_in(tensors):
        raise TypeError(
            f"Expected dense tensors for {func._schema.name}, got a {written[0].sparse_layout} tensor; call it on the "
            "parts, w.parts.values(), or only w.parts['values'] where all ranks have one pattern."
        )
    return ATEN[OTHERS](func, tensors, *args, **kwargs)


for _name in COLLECTIVES.split():
    if hasattr(torch.ops.c10d, _name):
        aten(getattr(torch.ops.c10d, _name).default)(collective)


for _name in FUNCTIONS.split():
    if hasattr(torch.distributed, _name):
        as_it_is(getattr(torch.distributed, _name))


@function(Tensor.is_leaf.__get__)
def is_leaf(w: SparseTensor) -> bool:
    """`w.is_leaf`, which `distribute_tensor` asks for first."""
    refuse_shards(w.sparse_layout)
    return w.is_leaf


@function(Tensor.is_complex)
def is_complex(w: SparseTensor) -> bool:
    """`w.is_complex()`, which `nn.DataParallel` asks for before it copies a Parameter to each GPU."""
    if calling_module() == "torch._utils":
        raise no_replicas(f"a {w.sparse_layout} tensor")
    return False
