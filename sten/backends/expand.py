"""Expansion to dense, for every built-in layout and operator on any device, where no faster kernel is registered.

It saves memory, not time, and `sten.which` says so.
"""

from __future__ import annotations

import functools
import itertools

from .. import ops as ops  # declares the operators
from ..dispatch import OPERATORS, Flags, Plan, kernel
from ..layouts import BSR, CSR, NM, FanIn, GroupedNM, Masked, VectorNM
from ..layouts.base import Layout

LAYOUTS = (Masked, CSR, BSR, NM, GroupedNM, VectorNM, FanIn)

EXPANDS = "expands to dense: no faster kernel for this layout here; saves memory, not time"
MASKED = "multiplies the dense values under the mask; saves no memory, no time"
GATHERS = "computes the dense gradient and gathers it at the pattern: no faster kernel for this layout here"
INPUT = "expands the input to dense: no faster kernel for an input in this layout here"
REASONS = {
    "linear_grad_weight": GATHERS,
    "conv2d_grad_weight": GATHERS,
    "embedding": "unpacks only the rows that are looked up",
    "embedding_grad_weight": GATHERS,
}


def expand(name: str, layout: type[Layout]) -> None:
    """Register an operator's reference implementation for a layout on any device, with the reason it is no faster."""
    reference, reason = OPERATORS[name].reference, REASONS.get(name, MASKED if layout is Masked else EXPANDS)

    def prepare(layout: Layout, shape: tuple[int, ...], dtype, flags: Flags) -> Plan:
        return Plan.of(None, reason, functools.partial(reference, layout=layout, shape=shape))

    prepare.__name__ = f"{name}_expand"
    kernel(name, weight=layout, device="any", prepare=True)(prepare)


def expand_input(name: str, layout: type[Layout]) -> None:
    """The same for a sparse input and a dense weight."""
    reference = OPERATORS[name].reference

    def prepare(layout: tuple, shape: tuple, dtype, flags: Flags) -> Plan:
        return Plan.of("dense", INPUT, functools.partial(reference, layout=layout, shape=shape))

    prepare.__name__ = f"{name}_expand"
    kernel(name, input=layout, device="any", prepare=True)(prepare)


for _name, _layout in itertools.product(("linear", "linear_grad_weight", "linear_grad_sparse_input"), LAYOUTS):
    expand_input(_name, _layout)
for _name, _layout in itertools.product(OPERATORS, LAYOUTS):
    if "weight" in OPERATORS[_name].sparse and not OPERATORS[_name].required:
        expand(_name, _layout)
