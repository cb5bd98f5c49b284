"""The table of the layouts, shapes and dtypes that tests run over, each dtype with its tolerance.

Small and odd on purpose: sizes that divide nothing, a single row, a single column, primes. To test a new layout
everywhere, add one line to each of LAYOUTS, SMALL and ODD.

`COPIES` are copies of the built-in layouts as a user would write them: the same source under another name, without
kernels. A test that is parametrised by `every_layout` runs on them, too.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sten.extend import Layout, Parts
from sten.layouts import BSR, CSR, NM, DualMask, FanIn, GroupedNM, Masked, VectorNM
from sten.layouts.registry import fields

LAYOUTS: list[Layout] = [
    Masked(),
    DualMask(),
    CSR(),
    FanIn(),
    BSR((16, 16)),
    BSR((4, 8)),
    NM(1, 4),
    NM(2, 4),
    NM(3, 7),
    NM(2, 8),
    NM(16, 32),
    VectorNM(1, 4, 8),
    VectorNM(2, 4, 64),
    GroupedNM(2, 4, 8),
    GroupedNM(1, 4, 4),
    GroupedNM(1, 10, 8),
]

# one of each class that a model can be stored in, with blocks that fit layers of 8 to 32 features
SMALL: list[Layout] = [Masked(), CSR(), BSR((4, 4)), NM(2, 4), VectorNM(1, 4, 4), GroupedNM(2, 4, 1), FanIn()]


# of odd blocks, for weights of a few rows and columns
ODD: list[Layout] = [
    Masked(), CSR(), FanIn(), BSR((3, 2)), NM(2, 4), VectorNM(1, 3, 4), GroupedNM(1, 3, 2), GroupedNM(2, 4, 1),
]  # fmt: skip


def copy_of(layout: Layout) -> Layout:
    """A user's exact copy: the source of the class under another name (CSR: OtherCSR), registered, no kernels."""
    original = type(layout)
    name = "Other" + original.__name__
    if name not in sys.modules:  # a module of its own, where pickle and torch.compile look for what it uses
        source = inspect.getsource(original).replace(f"class {original.__name__}(", f"class {name}(")
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update({**vars(sys.modules[original.__module__]), "__name__": name})
        exec(compile(source, inspect.getsourcefile(original), "exec", dont_inherit=True), vars(module))
    return getattr(sys.modules[name], name)(**fields(layout))


COPIES: list[Layout] = [copy_of(layout) for layout in {type(layout): layout for layout in LAYOUTS}.values()]


def silent_copies(test: Callable) -> Callable:
    """The test, in which copies run their reference implementations without the warning that says so."""
    return pytest.mark.filterwarnings(r"ignore:sten. no kernel for .* with Other:UserWarning")(test)


def every_layout(test: Callable) -> Callable:
    """The test for each layout of the table and for a user's copy of each class."""
    return silent_copies(pytest.mark.parametrize("layout", LAYOUTS + COPIES, ids=str)(test))


# (out, in)
SHAPES: list[tuple[int, ...]] = [(32, 64), (63, 100), (1, 50), (29, 1), (17, 31), (80, 96)]

# (out, in / groups, *kernel), for convolutions in one, two and three dimensions
CONV_SHAPES: list[tuple[int, ...]] = [(8, 16, 3, 3), (7, 5, 3, 1), (6, 10, 3), (5, 1, 3, 3), (4, 6, 2, 3, 2)]

SPARSITY = 0.7  # for layouts without a rate of their own


class Precision(NamedTuple):
    """A dtype, and how far a result in it may lie from the same result in float64."""

    dtype: torch.dtype
    rtol: float
    atol: float


DTYPES: list[Precision] = [
    Precision(torch.float64, 1e-12, 1e-12),
    Precision(torch.float32, 1e-5, 1e-5),
    Precision(torch.float16, 1e-2, 1e-2),
    Precision(torch.bfloat16, 5e-2, 5e-2),
]


def sparsity_of(layout: Layout) -> float | None:
    """What to pass to `mask`: SPARSITY, or None where the layout has a rate."""
    return SPARSITY if layout.rate is None else None


def random_sparse_case(
    layout: Layout, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Parts]:
    """A random weight in the layout: (dense with zeros off the mask only, mask, parts)."""
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=random, dtype=torch.float64)
    dense = (dense + dense.sign() * 0.1).to(dtype)
    mask = layout.mask(dense.abs(), sparsity_of(layout))
    dense = dense.masked_fill(~mask, 0)
    return dense, mask, layout.pack(dense, mask)
