"""The forms of a sparse tensor: each layout of the table, stored as it stands or transposed."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

import sten
from sten.extend import Layout

from ..cases import LAYOUTS, SMALL, sparsity_of


class Form(NamedTuple):
    """A layout, and whether the parts store the transpose."""

    layout: Layout
    transposed: bool = False

    def __str__(self) -> str:
        return f"{self.layout}{' transposed' if self.transposed else ''}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be stored."""
        if self.transposed and len(shape) != 2:
            return False
        try:
            self.layout.check(tuple(reversed(shape)) if self.transposed else tuple(shape))
        except ValueError:
            return False
        return True

    def store(self, dense: Tensor, salt: int = 0) -> sten.SparseTensor:
        """A sparse tensor with the numbers of `dense` at a pattern that depends on the shape and the salt alone."""
        dense = dense.detach()
        stored = dense.t() if self.transposed else dense
        mask = pattern(self.layout, tuple(stored.shape), salt)
        sparse = sten.from_dense(stored.clone().masked_fill(~mask, 0), self.layout, mask)
        return sparse.t().detach() if self.transposed else sparse


@functools.lru_cache(maxsize=4096)
def pattern(layout: Layout, shape: tuple[int, ...], salt: int) -> Tensor:
    """A mask that the layout can hold."""
    score = torch.rand(shape, generator=torch.Generator().manual_seed(salt))
    mask = layout.mask(score, sparsity_of(layout))
    return mask if mask.any() or layout.rate is not None else layout.mask(score, 0.0)  # of few entries, all


ALL = [Form(layout) for layout in LAYOUTS] + [Form(layout, True) for layout in SMALL]
FEW = [Form(layout, transposed) for layout in SMALL for transposed in (False, True)]
