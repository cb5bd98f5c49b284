"""THE table: the layouts, shapes and dtypes that tests run over, each dtype with its tolerance.

Small and odd on purpose: sizes that divide nothing, a single row, a single column, primes. To put a new layout under
every test, add one line to LAYOUTS.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sten.layout import Layout, Parts
from sten.layouts import BSR, CSR, NM, FanIn, GroupedNM, Masked, VectorNM

LAYOUTS: list[Layout] = [
    Masked(),
    CSR(),
    FanIn(),
    BSR((16, 16)),
    BSR((4, 8)),
    NM(1, 4),
    NM(2, 4),
    NM(3, 7),
    NM(2, 8),
    VectorNM(1, 4, 8),
    VectorNM(2, 4, 64),
    GroupedNM(2, 4, 8),
    GroupedNM(1, 4, 4),
    GroupedNM(1, 10, 8),
]

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
    """A random weight in the layout: (dense with zeros off the mask, mask, parts). The kept entries are not zero."""
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=random, dtype=torch.float64)
    dense = (dense + dense.sign() * 0.1).to(dtype)
    mask = layout.mask(dense.abs(), sparsity_of(layout))
    dense = dense.masked_fill(~mask, 0)
    return dense, mask, layout.pack(dense, mask)
