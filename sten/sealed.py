"""Sealed: what a SparseTensor stores is set when it is made, and not by the state of a pickle.

`torch.load(weights_only=True)` sets any attribute of a tensor, after `sten.tensor._load` has checked its parts. So the
attributes that kernels read are refused here, and sten writes them by `vars(w)`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import FormatError
from .pattern_cache import PatternCache

MADE_OF = frozenset(("sparse_layout", "parts", "stored_shape", "transposed"))
# what is set later, with types that no file can make; torch.utils.swap_tensors sets __dict__
LATER = {"cache": PatternCache, "trained": (nn.Module, type(None)), "__dict__": PatternCache}


class Unset:
    """What a tensor has in place of an attribute that nothing has set: reading it raises FormatError."""

    def __get__(self, w: Any, owner: type) -> Unset:
        if w is None:
            return self
        raise FormatError("Expected a SparseTensor with parts, got one without; make it by sten.from_dense.")


class Sealed:
    """The base of SparseTensor that refuses assignments to what it stores."""

    __slots__ = ()
    sparse_layout = parts = stored_shape = transposed = cache = Unset()

    def __setattr__(self, name: str, value: Any) -> None:
        kind = LATER.get(name)
        given = value.get("cache") if name == "__dict__" and isinstance(value, dict) else value
        if name in MADE_OF or name.startswith("part_") or (kind is not None and not isinstance(given, kind)):
            raise FormatError(
                f"Expected {name!r} of a SparseTensor to be set when it is made, got an assignment; write into the "
                "parts, or make another tensor."
            )
        super().__setattr__(name, value)

    def __setstate__(self, state: Any) -> None:
        raise FormatError("Expected a pickled SparseTensor as sten writes it, got one with a state of its own.")
