"""The launch cache: what was decided for operators called on plain tensors, and for sizes that many weights share.

A key is a name, numbers, and the ``signature`` of each tensor; a value is what ``make()`` returned for it: a function
of such tensors that goes straight to its launches. Nothing is invalidated, since all that was decided by is in the key;
at ``LIMIT`` entries all are dropped. What is made while a CUDA graph is captured was not timed and is not stored. A
product of a sparse weight does not come here: the weight keeps its own.
"""

import torch

from .backend import backend

LIMIT = 4096
_launches: dict[tuple, object] = {}


def signature(t: torch.Tensor | None) -> tuple | None:
    """All of a tensor that the decisions of a launch depend on; kernels are compiled for the alignment of addresses."""
    return t if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() & 15)


def cached(key: tuple, x: torch.Tensor, make):
    """The value of ``key``, made if need be; ``x`` says on which device."""
    launch = _launches.get(key)
    return store(key, x, make()) if launch is None else launch


def store(key: tuple, x: torch.Tensor, launch):
    """Keeps ``launch``, unless a graph is captured; the one that another thread kept first wins."""
    if launch is None or backend.capturing(x):
        return launch
    if len(_launches) >= LIMIT:
        _launches.clear()
    return _launches.setdefault(key, launch)


def clear() -> None:
    """Forget every launch."""
    _launches.clear()
