"""Few tokens of CSR and FanIn by the C++ kernels of the CPU, with a table of the pattern in place of its columns.

The table is derived once from a pattern (docs/decisions/016): bits, or windows. Values stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import Flags, Plan, kernel
from ..kernels.pattern_cache import Derived
from ..layouts import CSR, FanIn
from ..layouts.base import Layout, Parts
from . import cpp
from .cpu import FEW_TOKENS, Run, band_linear, csr_linear, end_of, ended, float32_by, with_empty_rows
from .cpu import LINEAR as OTHERS


def table_linear(shape: tuple[int, ...], kind: str, activation: str = "none") -> Run:
    """`run` of linear with CSR (crow, col) or FanIn (index, row): a table, "bits" or "windows", replaces the columns.

    It is made, and the pattern checked, once for its parts and versions, and cached as long as they live; of tensors
    made in inference mode at every call.
    """
    linear = ended(cpp.operator("band_linear", False), activation)
    outputs, columns, last = shape[0], math.prod(shape[1:]), (None, None)
    make = {"bits": torch.ops.sten.pattern_bits.default, "windows": torch.ops.sten.pattern_windows.default}[kind]

    def run(x: Tensor, weight: Parts, bias: Tensor | None) -> Tensor:
        nonlocal last  # `Band.pattern` and `stored_rows` are written out: a call of Python is seen in the time
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
        y = linear(x, values, crow, col, own, 1, columns, rows, table)
        return y if row is None else with_empty_rows(y, row, outputs, bias, activation)

    return run


def table_of(instruction_set: str, density: float, dtype: torch.dtype, tokens: int | None) -> str | None:
    """What multiplies single entries fastest, if it needs a table of the pattern: "bits", "windows" or "expand".

    By bits a token costs the same at any density, since zeros are multiplied; by windows each group does, which has at
    most 32 entries within 256 columns. Both are compared with panels, whose cost is that of the entries: numbers
    measured on Zen 4. AMX multiplies 16 tokens in the time of one, and dense weights faster than panels are ("expand",
    by the same bits): numbers measured on a Xeon (family 6, model 207).
    """
    if not tokens or instruction_set not in ("amx", "avx512"):
        return None
    if dtype is torch.float32:
        return "bits" if (density >= 0.22 if tokens == 1 else tokens <= 28 * density - 2) else None
    if dtype is not torch.bfloat16 or not cpp.features()["bfloat16"]:
        return None
    if density < 0.2 and tokens <= min(4, 32 * density):
        return "windows"
    if instruction_set == "amx" and tokens >= 4:
        if density < 0.06:
            return None
        return "bits" if tokens <= FEW_TOKENS else "expand"
    return "bits" if tokens <= 64 * density - 4 else None


VARIANTS = {  # of each kind: its name in a Plan, and why
    "bits": ("bitmap", "C++ kernel: a bitmap, made once from the pattern, expands the stored entries in registers"),
    "windows": (
        "windows",
        "C++ kernel: a table of columns within 256, made once from the pattern, selects activations",
    ),
    "expand": ("expand", "expands to dense by a C++ kernel: AMX multiplies so many tokens faster by a dense weight"),
}


def single_entries_by(run_of: Callable[..., Run]) -> Callable[..., Plan]:
    """The `prepare` of linear with CSR and FanIn, by a table of the pattern where that pays."""
    others = float32_by(run_of)

    def prepare(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
        density = (flags.entries or 0) / max(1, math.prod(shape))
        kind = table_of(cpp.features()["instruction_set"], density, dtype, flags.tokens)
        if kind is None:
            return others(layout, shape, dtype, flags)
        run = table_linear(shape, "windows" if kind == "windows" else "bits", **end_of(flags))
        return Plan.of(*VARIANTS[kind], run)

    prepare.__name__ = run_of.__name__
    return prepare


SINGLE = {CSR: single_entries_by(csr_linear), FanIn: single_entries_by(band_linear)}
LINEAR = OTHERS | SINGLE

if cpp.available():
    for _layout, _prepare in SINGLE.items():
        kernel("linear", weight=_layout, device="cpu", prepare=True)(_prepare)
