"""Where a warning points: the user's line, and the weight by the name that the user's model has for it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

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
