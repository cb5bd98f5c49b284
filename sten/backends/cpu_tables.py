"""Few tokens of CSR and FanIn by the C++ kernels of the CPU, with a table of the pattern in place of its columns.

The table is derived once from a pattern (docs/decisions/016): bits, or windows. Values stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import Flags
from ..kernels.pattern_cache import Derived
from ..layouts.base import Parts
from ..ops.epilogue import activate
from . import cpp

WHY = {
    "bits": "a bitmap, made once from the pattern, expands the stored entries in registers",
    "windows": "a table of columns within 256, made once from the pattern, selects activations in registers",
}


def with_empty_rows(some: Tensor, row: Tensor, outputs: int, bias: Tensor | None, activation: str) -> Tensor:
    """All outputs, from those of the stored rows: the others are the activation of the bias."""
    y = some.new_zeros(*some.shape[:-1], outputs)
    return (y if bias is None else y.copy_(activate(bias, activation))).index_copy_(-1, row, some)


def table_linear(
    linear: Callable[..., Tensor], shape: tuple[int, ...], kind: str, activation: str = "none"
) -> Callable[..., Tensor]:
    """`run` of linear with CSR (crow, col) or FanIn (index, row): a table, "bits" or "windows", replaces the columns.

    `linear` is the operator, which ends with the activation.

    It is made, and the pattern checked, once for its parts and versions, and cached as long as they live; of tensors
    made in inference mode at every call.
    """
    outputs, columns, last = shape[0], math.prod(shape[1:]), (None, None)
    make = {"bits": torch.ops.sten.pattern_bits.default, "windows": torch.ops.sten.pattern_windows.default}[kind]

    def run(x: Tensor, weight: Parts, bias: Tensor | None) -> Tensor:
        nonlocal last
        crow = weight.get("crow")
        col, lists = weight["col" if crow is not None else "index"], crow is None
        now, rows = None, col.shape[0] if lists else outputs
        if not col.is_inference():
            now = None if lists else (crow.data_ptr(), crow._version), col.data_ptr(), col._version
        known, table = last
        if now is None or now != known:
            derived = Derived(f"{kind} {columns}", lambda *_: make(crow, col, columns, rows), values=True)
            sources = (col,) if lists else (crow, col)
            table = make(crow, col, columns, rows) if now is None else derived(*sources)[0]
            last = now, table
        values, row = weight["values"].contiguous(), None if rows == outputs else weight["row"].long()
        own = bias if bias is None or row is None else bias[row]
        y = linear(x, values, crow, col, own, 1, columns, rows, trusted=True, table=table)
        return y if row is None else with_empty_rows(y, row, outputs, bias, activation)

    return run


def table_of(shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> str | None:
    """The table that multiplies few tokens of single entries fastest, or None; the numbers are measured on Zen 4.

    By bits a token costs the same at any density, since zeros are multiplied; by windows each group does, which has at
    most 32 entries within 256 columns. Both are compared with panels, whose cost is that of the entries.
    """
    features, density, tokens = cpp.features(), (flags.entries or 0) / max(1, math.prod(shape)), flags.tokens
    if not tokens or features["instruction_set"] != "avx512":
        return None
    if dtype is torch.float32:
        return "bits" if (density >= 0.22 if tokens == 1 else tokens <= 28 * density - 2) else None
    if dtype is not torch.bfloat16 or not features["bfloat16"]:
        return None
    if density < 0.2 and tokens <= min(4, 32 * density):
        return "windows"
    return "bits" if tokens <= 64 * density - 4 else None
