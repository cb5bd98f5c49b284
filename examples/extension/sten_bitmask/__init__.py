"""Bitmask: one bit an entry and the non-zeros. A layout for sten with a C++ kernel, in a package of its own.

Importing it registers the layout and the kernel; nothing in sten knows about it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import sten

from . import _C as _C  # loads torch.ops.sten_bitmask


@dataclass(frozen=True)
class Bitmask(sten.Layout):
    """`values` (nnz,) row by row, `bits` (R, ceil(C / 8)) uint8, lowest bit first, `start` (R + 1,) int64."""

    pattern = ("bits", "start")

    def mask(self, score, sparsity=None):
        return sten.extend.top(score, sten.extend.count_to_keep(score.numel(), sparsity, self))

    def pack(self, dense, mask):
        live = mask.flatten(1)
        bits = F.pad(live, (0, -live.shape[1] % 8)).view(len(live), -1, 8).byte()
        start = F.pad(live.sum(1).cumsum(0), (1, 0))
        weight = torch.arange(8, dtype=torch.uint8, device=bits.device)
        return {"values": dense.flatten(1)[live], "bits": (bits << weight).sum(-1, dtype=torch.uint8), "start": start}

    def live(self, parts, shape):
        """The mask as a matrix (R, C)."""
        bits = parts["bits"].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=parts["bits"].device)
        return (bits & 1).flatten(1)[:, : math.prod(shape[1:])].bool()

    def unpack(self, parts, shape):
        live = self.live(parts, shape)
        zero = parts["values"].new_zeros(1)
        slot = torch.where(live, (live.flatten().cumsum(0) - 1).view(live.shape), parts["values"].numel())
        return torch.cat([parts["values"], zero])[slot].view(shape)

    def validate(self, parts, shape):
        rows, columns = shape[0], math.prod(shape[1:])
        sten.extend.expect_parts(
            self,
            parts,
            {
                "values": ((-1,), None),
                "bits": ((rows, -(-columns // 8)), torch.uint8),
                "start": ((rows + 1,), torch.int64),
            },
        )
        count = self.live(parts, (rows, 8 * parts["bits"].shape[1])).sum(1)
        if (
            not torch.equal(parts["start"], F.pad(count.cumsum(0), (1, 0)))
            or int(count.sum()) != parts["values"].numel()
        ):
            raise ValueError(f"Parts 'start' and 'values' of {self} must agree with the number of bits in every row.")
        if bool(self.live(parts, (rows, 8 * parts["bits"].shape[1]))[:, columns:].any()):
            raise ValueError(f"Part 'bits' of {self} has bits set beyond column {columns - 1}.")


@sten.kernel("linear", weight=Bitmask, device="cpu", prepare=True)
def bitmask_linear(layout, shape, dtype, flags):
    """The C++ kernel is float32; other dtypes take sten's reference."""
    if dtype != torch.float32:
        return sten.extend.Plan.of("reference", f"the kernel is for float32, not {dtype}", None)
    columns = math.prod(shape[1:])

    def run(x, weight, bias):
        return torch.ops.sten_bitmask.linear(x, weight["values"], weight["bits"], weight["start"], bias, columns)

    return sten.extend.Plan.of("cpp", "C++, rows over threads: the bits of a row decoded once, then every token", run)


@torch.library.register_fake("sten_bitmask::linear")
def _(x, values, bits, start, bias, columns):
    return x.new_empty(*x.shape[:-1], bits.shape[0])
