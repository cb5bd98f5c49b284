"""A layout that sten does not have, with a kernel, without touching a file of sten: whole input columns are kept."""

import math
from dataclasses import dataclass

import torch

import sten


@dataclass(frozen=True)
class Columns(sten.Layout):
    """Keeps whole inputs: `values` (R, k) and `column` (k,) int64, for a weight seen as a matrix (R, C)."""

    pattern = ("column",)

    def mask(self, score, sparsity=None):
        total = torch.where(score.isnan(), -math.inf, score).float().flatten(1).sum(0)
        keep = sten.extend.top(total, sten.extend.count_to_keep(len(total), sparsity, self))
        return keep.expand(len(score), -1).reshape(score.shape).clone()

    def pack(self, dense, mask):
        column = mask.flatten(1).any(0).nonzero().flatten()
        return {"values": dense.masked_fill(~mask, 0).flatten(1)[:, column].contiguous(), "column": column}

    def unpack(self, parts, shape):
        out = parts["values"].new_zeros(shape[0], math.prod(shape[1:]))
        return out.index_copy(1, parts["column"], parts["values"]).view(shape)

    def validate(self, parts, shape):
        sten.extend.expect_parts(self, parts, {"values": ((shape[0], -1), None), "column": ((-1,), torch.int64)})
        sten.extend.expect_range(self, "column", parts["column"], 0, math.prod(shape[1:]))
        if len(parts["column"]) != parts["values"].shape[1] or bool((parts["column"].diff() <= 0).any()):
            raise ValueError(f"Part 'column' of {self} must be ascending, one entry for every column of 'values'.")


@sten.kernel("linear", weight=Columns, device="cpu")
def columns_linear(x, weight, bias, *, layout, shape):
    """Gather the inputs that live, then a smaller dense product."""
    return torch.nn.functional.linear(x[..., weight["column"]], weight["values"], bias)
