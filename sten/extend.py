"""What authors of layouts, kernels and methods need: the contracts, the registration, and helpers.

    a layout    Layout, Parts, and the helpers that choose entries (top, ...) and check parts (expect_..., ...)
    a kernel    kernel, operator, OPERATORS, Plan, Flags; run, for operators of one's own
    a method    Sparsifier, PatternMethod, DenseWeightMethod, View, Edit, State; BlockView, of whole blocks;
                keep_largest, fill_up, to drop and grow; ActivationMethod, of activations and gradients

`sten.testing` checks what is made with them.
"""

from .calibration import BlockView
from .dispatch import OPERATORS, Flags, Plan, kernel, operator, run
from .layouts.base import Layout, Parts
from .layouts.checks import (
    check_sparsity,
    count_to_keep,
    expect_dense,
    expect_parts,
    expect_range,
    expect_score,
    expect_whole,
    expect_zero,
)
from .layouts.topk import top, top_of_groups
from .sparsifiers.activation import ActivationMethod
from .sparsifiers.granularity import fill_up, keep_largest
from .sparsifiers.sparsifier import DenseWeightMethod, Edit, PatternMethod, Sparsifier, State, View

__all__ = [
    "OPERATORS", "ActivationMethod", "BlockView", "DenseWeightMethod", "Edit", "Flags", "Layout", "Parts",
    "PatternMethod", "Plan", "Sparsifier", "State", "View", "check_sparsity", "count_to_keep", "expect_dense",
    "expect_parts", "expect_range", "expect_score", "expect_whole", "expect_zero", "fill_up", "keep_largest",
    "kernel", "operator", "run", "top", "top_of_groups",
]  # fmt: skip
