"""PatternCache: what is kept with the pattern of a weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import kernels
from .kernel_table import Plan


class PatternCache:
    """What is kept for one pattern; all SparseTensors whose pattern parts are the same tensors share it.

    States:
        empty: made for a SparseTensor with a pattern of its own: from_dense, a copy, another device, a file, `.data =`.
        filled: by calls and `sten.which` with Plans by signature (`sten.dispatch`), and with the live slots.
        empty, one generation later: after `invalidate`, which every writer of the pattern in place calls; what kernels
            derived from the pattern has been made again.

    Attributes:
        generation: how often the pattern was written.
        plans: signature -> Plan.
        dense_gradient: set while a training method wants the gradient of this weight dense: the operators that compute
            a weight's gradient then compute it dense, once, hand it over in the orientation of the layout, and return
            what lies in the pattern.
        live: (generation and versions of the parts, the slots that are not padding): `sten.ops.padding.live_slots`.

    A user's own edit of a pattern part in place is noticed on the CPU, by the part's version, for what was derived
    from it. On a GPU it is not: call `w.cache.invalidate(*pattern)`.
    """

    __slots__ = ("__weakref__", "dense_gradient", "generation", "live", "plans")

    def __init__(self) -> None:
        self.generation = 0
        self.plans: dict[tuple, Plan] = {}
        self.dense_gradient: Callable[[Tensor], None] | None = None
        self.live: tuple[tuple, Tensor | None] | None = None

    def invalidate(self, *pattern: Tensor) -> None:
        """The pattern was written in place: forget what was made for it. `pattern`: the parts that were written, so
        that what kernels derived from them is made again where it lies, as a recorded CUDA graph reads it."""
        self.generation += 1
        self.plans.clear()
        self.live = None
        if pattern and pattern[0].is_cuda:
            kernels.pattern_cache.invalidate(*pattern)

    def __reduce__(self) -> tuple:
        return PatternCache, ()  # copies, and what is read from a file, start empty
