"""PatternCache: what is cached for the pattern of a weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import kernels
from .kernel_table import Plan


class PatternCache:
    """The Plans and used slots of one pattern, shared by all SparseTensors whose pattern parts are the same tensors.

    States:
        empty: of a new pattern: from_dense, a copy, another device, a file, `.data =`.
        filled: calls and `sten.which` have stored Plans by signature (`sten.dispatch`), or the used slots.
        invalidated: as empty, one generation later; what kernels derived from the pattern has been made again.

    Attributes:
        generation: the number of calls of `invalidate`.
        plans: signature -> Plan.
        dense_gradient: a function that a training method sets to get the gradient of this weight dense. The operators
            that compute a weight's gradient then compute it dense, once, pass it to the function in the orientation of
            the layout, and return its entries at the pattern.
        activation: whether it is the pattern of an activation or a gradient, which is new at each call.
        full_gradient: whether the gradient of these tensors is computed dense, as of a straight-through activation:
            entries off the pattern get one, too.
        used_slots: (versions of the parts, mask of the slots that are not padding): `sten.ops.padding.used_slots`.
        times: seconds of the layer's calls in one call of the model, and of those with dense weights, as `sten.explain`
            has measured them last; `sten.summary` shows them.

    Every writer of a pattern in place calls `invalidate`. Without it, a write to a pattern part is noticed on the CPU,
    by the version of the part; on a GPU it is not: call `w.cache.invalidate(*pattern)`.
    """

    __slots__ = (
        "__weakref__",
        "activation",
        "dense_gradient",
        "full_gradient",
        "generation",
        "plans",
        "times",
        "used_slots",
    )

    def __init__(self) -> None:
        self.generation = 0
        self.plans: dict[tuple, Plan] = {}
        self.dense_gradient: Callable[[Tensor], None] | None = None
        self.activation = self.full_gradient = False
        self.used_slots: tuple[list, Tensor | None] | None = None
        self.times: tuple[float, float] | None = None

    def invalidate(self, *pattern: Tensor) -> None:
        """Drop everything that was cached for the pattern, which was written in place.

        Args:
            *pattern: the parts that were written. What CUDA kernels derived from them is made again at the same
                address, which a recorded CUDA graph reads; what the CPU's derived, at their next call.
        """
        self.generation += 1
        self.plans.clear()
        self.used_slots = self.times = None
        if pattern and not pattern[0].is_meta:
            kernels.pattern_cache.invalidate(*pattern)

    def __reduce__(self) -> tuple:
        return PatternCache, ()  # copies, and what is read from a file, start empty
