"""The launch cache: prepared launches of operators called on plain tensors, and cuSPARSELt plans by size.

A key is a name, numbers, and the ``signature`` of each tensor; a value is what ``make()`` returned: a function of such
tensors that goes straight to its launches. Nothing is invalidated, since the key holds everything that decided; at
``LIMIT`` entries all are dropped. What is made while a CUDA graph is captured was not timed and is not stored. Products
of sparse weights do not use this cache: a weight stores its own plans.
"""

import torch

from .backend import backend

LIMIT = 4096
_launches: dict[tuple, object] = {}


def signature(t: torch.Tensor | None) -> tuple | None:
    """Everything of a tensor that a launch depends on; kernels are compiled for the alignment of addresses."""
    return t if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() & 15)


def cached(key: tuple, x: torch.Tensor, make):
    """The value of ``key``, made on a miss; ``x`` is on the device of the launch."""
    launch = _launches.get(key)
    if launch is not None:
        return launch
    launch = make()
    if launch is None or backend.capturing(x):
        return launch
    if len(_launches) >= LIMIT:
        _launches.clear()
    return _launches.setdefault(key, launch)  # one that another thread stored first wins


def clear() -> None:
    """Forget every launch."""
    _launches.clear()
