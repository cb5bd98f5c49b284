"""Who calls: torch's own code may ask for what users and other libraries are refused, and the other way round."""

from __future__ import annotations

import sys
from types import FrameType

PASSED = ("sten.", "torch._tensor", "torch.functional", "torch._C", "torch.utils._python_dispatch", "torch._ops")
SHARDING = ("torch.distributed.fsdp.", "torch.distributed.tensor.", "torch.distributed._composable.")


def calling_module() -> str:
    """The name of the module whose code calls the operator that runs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (name := frame.f_globals.get("__name__", "")).startswith(PASSED):
        frame = frame.f_back
    return "" if frame is None else name


def no_shards(got: str) -> NotImplementedError:
    """Make the exception for FSDP or tensor parallelism that cannot divide a weight."""
    return NotImplementedError(
        f"Expected a weight that torch.distributed can divide, got {got}; for FSDP2 call sten.trainable(model) "
        "before fully_shard, use DistributedDataParallel, or sten.densify for FSDP1 and tensor parallelism."
    )


def refuse_shards(layout: object) -> None:
    """Raise if FSDP or tensor parallelism divides a sparse tensor: the shards would be dense, with zeros that train."""
    if calling_module().startswith(SHARDING):
        raise no_shards(f"a {layout} tensor")
