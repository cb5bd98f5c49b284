"""Bitmask: one bit an entry and the non-zeros. A layout for sten with a C++ kernel, in a package of its own.

Importing it registers the layout and the kernel, without a change to sten.
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

    def pack(self, dense, mask):
        stored = mask.flatten(1)
        bits = F.pad(stored, (0, -stored.shape[1] % 8)).view(len(stored), -1, 8).byte()
        start = F.pad(stored.sum(1).cumsum(0), (1, 0))
        weight = torch.arange(8, dtype=torch.uint8, device=bits.device)
        return {"values": dense.flatten(1)[stored], "bits": (bits << weight).sum(-1, dtype=torch.uint8), "start": start}

    def stored(self, parts, shape):
        """The mask as a matrix (R, C)."""
        bits = parts["bits"].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=parts["bits"].device)
        return (bits & 1).flatten(1)[:, : math.prod(shape[1:])].bool()

    def unpack(self, parts, shape):
        stored = self.stored(parts, shape)
        zero = parts["values"].new_zeros(1)
        slot = torch.where(stored, (stored.flatten().cumsum(0) - 1).view(stored.shape), parts["values"].numel())
        return torch.cat([parts["values"], zero])[slot].view(shape)

    def validate(self, parts, shape):
        rows, columns = shape[0], math.prod(shape[1:])
        pattern = {"bits": ((rows, -(-columns // 8)), torch.uint8), "start": ((rows + 1,), torch.int64)}
        sten.extend.expect_parts(self, parts, {"values": ((-1,), None), **pattern})
        stored = self.stored(parts, (rows, 8 * parts["bits"].shape[1]))
        start = F.pad(stored.sum(1).cumsum(0), (1, 0))
        if not torch.equal(parts["start"], start) or int(start[-1]) != parts["values"].numel():
            raise ValueError(f"Expected 'start' and 'values' of {self} to agree with the number of bits in each row.")
        if bool(stored[:, columns:].any()):
            raise ValueError(f"Expected no bits beyond column {columns - 1} in part 'bits' of {self}, got some.")


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
