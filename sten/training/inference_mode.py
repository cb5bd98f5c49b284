"""Conversions inside torch.inference_mode(): what they make of an ordinary model is ordinary, too."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def ordinary_tensors(function: F) -> F:
    """The function of a model, its first argument, run outside of the caller's inference mode.

    Tensors that are made in inference mode can never train, nor be written outside of it, so one call of `sparsify`
    there would spoil a model for good. A model that was made in inference mode stays in it.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled() or _made_inside(args[0] if args else kwargs.get("model")):
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return cast(F, run)


def _made_inside(model: object) -> bool:
    if not isinstance(model, nn.Module):
        return False
    return any(t.is_inference() for t in itertools.chain(model.parameters(), model.buffers()))
