"""Collectives: dense gradients averaged, masks broadcast from rank 0, shards of a weight gathered."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sharded(t: object) -> bool:
    """Whether a tensor is a DTensor, as FSDP2 makes them."""
    return type(t).__name__ == "DTensor"


def whole(t: Tensor) -> Tensor:
    """The tensor itself, or the full tensor of a DTensor, which is a collective."""
    return t.full_tensor() if sharded(t) else t


def shard_like(t: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, as a DTensor like `like`; itself if `like` is none."""
    if not sharded(like):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def mean(t: Tensor) -> Tensor:
    """The average over all ranks, as DDP averages gradients."""
    if ranks() > 1:
        dist.all_reduce(t)
        t /= ranks()
    return t


def agreed(mask: Tensor) -> Tensor:
    """Rank 0's mask."""
    if ranks() == 1:
        return mask
    sent = mask.to(torch.uint8)
    dist.broadcast(sent, 0)
    return sent.bool()


def from_rank_0(t: Tensor | None) -> Tensor | None:
    """Rank 0's tensor, which all have in one shape; None stays."""
    if t is not None and ranks() > 1:
        t = t.contiguous()
        dist.broadcast(t, 0)
    return t


def everywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    if ranks() == 1:
        return flag
    sent = torch.tensor(int(flag), device=device)
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    return bool(sent)
