"""The honest expansion to dense, for every built-in layout, operator and device; faster kernels then replace it.

It is correct, it saves memory and not time, and `sten.which` says so.
"""

from __future__ import annotations

import itertools

from .. import ops as ops  # declares the operators
from ..dispatch import OPERATORS, kernel
from ..layout import Layout
from ..layouts import BSR, CSR, NM, FanIn, GroupedNM, Masked, VectorNM

LAYOUTS = (Masked, CSR, BSR, NM, GroupedNM, VectorNM, FanIn)
DEVICES = ("cpu", "cuda")

EXPANDS = "expands to dense: no faster kernel for this layout here; saves memory, not time"
GATHERS = "makes the dense gradient and gathers it at the pattern: no faster kernel for this layout here"
REASONS = {
    "linear_grad_weight": GATHERS,
    "conv2d_grad_weight": GATHERS,
    "embedding": "unpacks the rows that are looked up, and no others",
    "embedding_grad_weight": GATHERS,
}


def expand(name: str, layout: type[Layout], device: str) -> None:
    """Register an operator's reference implementation as the kernel of a layout, with the reason it is no faster."""
    reference = OPERATORS[name].reference

    def kernel_of(*args, **kwargs):
        return reference(*args, **kwargs)

    kernel_of.__name__ = f"{name}_expand"
    kernel_of.__doc__ = REASONS.get(name, EXPANDS)
    if layout is Masked and name not in REASONS:
        kernel_of.__doc__ = "multiplies the dense values under the mask; saves neither memory nor time"
    kernel(name, weight=layout, device=device)(kernel_of)


for _name, _layout, _device in itertools.product(OPERATORS, LAYOUTS, DEVICES):
    if "weight" in OPERATORS[_name].sparse:
        expand(_name, _layout, _device)
