"""A layout that sten does not have, with a kernel, without a change to sten: whole input columns are stored."""

from dataclasses import dataclass

import torch

import sten


@dataclass(frozen=True)
class Columns(sten.Layout):
    """Whole columns of the weight as a matrix (R, C): `values` (R, k) and `column` (k,) int64, ascending."""

    pattern = ("column",)

    def unit_totals(self, score):  # a column is kept or dropped as a whole
        return score.flatten(1).float().sum(0)

    def unit_entries(self, chosen, shape):
        return chosen.repeat(shape[0], 1).view(shape)

    def pack(self, dense, mask):
        column = mask.flatten(1).any(0).nonzero().flatten()
        return {"values": dense.masked_fill(~mask, 0).flatten(1)[:, column].contiguous(), "column": column}

    def unpack(self, parts, shape):
        return parts["values"].new_zeros(shape).flatten(1).index_copy(1, parts["column"], parts["values"]).view(shape)

    def validate(self, parts, shape):
        sten.extend.expect_parts(self, parts, {"values": ((shape[0], -1), None), "column": ((-1,), torch.int64)})
        sten.extend.expect_range(self, "column", parts["column"], 0, torch.Size(shape[1:]).numel())
        if len(parts["column"]) != parts["values"].shape[1] or bool((parts["column"].diff() <= 0).any()):
            raise ValueError(f"Expected part 'column' of {self} to ascend, one number for each column of 'values'.")


@sten.kernel("linear", weight=Columns, device="cpu")
def columns_linear(x, weight, bias, *, layout, shape):
    """Gather the stored inputs, then a smaller dense product."""
    return torch.nn.functional.linear(x[..., weight["column"]], weight["values"], bias)
