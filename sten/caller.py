"""Who calls: the line that a warning shows, the name of the weight in the user's model, and which library it is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

PASSED = ("sten.", "torch._tensor", "torch.functional", "torch._C", "torch.utils._python_dispatch", "torch._ops")
SHARDING = ("torch.distributed.fsdp.", "torch.distributed.tensor.", "torch.distributed._composable.")
PARAMETRIZE = "torch.nn.utils.parametrize"
BY_MATRIX = ("torch.optim._adafactor", "torch.optim._muon", "torch.optim.lbfgs")
LIBRARIES = tuple(f"{Path(file).parent}/" for file in (torch.__file__, __file__))


def user_stacklevel() -> int:
    """The `stacklevel` at which the caller's `warnings.warn` shows the innermost line outside of torch and sten."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    return level


def weight_name(w: Any) -> str | None:
    """The parameter name of a sparse weight in the outermost module that is being called; None if there is none.

    A rule gets an alias of the Parameter, which has the same `PatternCache`.
    """
    if w.trained is not None:
        return w.trained.name
    frame: FrameType | None = sys._getframe(1)
    modules: list[torch.nn.Module] = []
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module):
            modules.append(module)
        frame = frame.f_back
    for module in reversed(modules):
        for name, param in module.named_parameters():
            if getattr(param, "cache", None) is w.cache:
                return name
        for part in module.modules():  # of a weight in trainable form: its TrainedWeight
            if getattr(part, "cache", None) is w.cache:
                return part.name
    return None


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
        "before fully_shard, for tensor parallelism sten.parallelize_module, for FSDP1 sten.densify."
    )


def no_replicas(got: str) -> NotImplementedError:
    """Make the exception for nn.DataParallel, which copies Parameters as plain tensors."""
    return NotImplementedError(f"Expected a dense model for nn.DataParallel, got {got}; use DistributedDataParallel.")


def refuse_shards(layout: object) -> None:
    """Raise if FSDP or tensor parallelism divides a sparse tensor: the shards would be dense, with zeros that train."""
    if calling_module().startswith(SHARDING):
        raise no_shards(f"a {layout} tensor")


def splits_for_export() -> bool:
    """Whether `run_decompositions` makes a Parameter of each part of a weight that asks whether it requires a gradient.

    Parts of integers cannot, and the program that it makes is for inference.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (name := frame.f_globals.get("__name__", "")).startswith((*PASSED, PARAMETRIZE)):
        frame = frame.f_back
    return frame is not None and name == "torch._functorch._aot_autograd.subclass_parametrization"


def refuse_matrix_optimizer(w: Any) -> None:
    """Raise if an optimizer that works on rows, columns or all numbers at once asks for a sparse gradient."""
    name = calling_module()
    if name in BY_MATRIX:
        raise TypeError(
            f"Expected an optimizer that works entry by entry for a {w.sparse_layout} weight, got one of {name}; use "
            "torch.optim.SGD, AdamW or the like."
        )
