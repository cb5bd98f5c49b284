"""bench: linear layers in each layout against dense; what was measured as JSON and as a picture, and one sentence."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import markup
from ..conversion.sensitivity import Candidate
from ..explanation.inputs import place_of
from ..explanation.timing import Spread, take_turns
from ..ops.which import which
from ..tensor import from_dense
from .names import title

DEFAULT = (
    "GroupedNM(1, 10, 8)",
    "GroupedNM(1, 4, 16)",
    "CSR 0.75",
    "CSR 0.9",
    "CSR 0.95",
    "BSR(64, 64) 0.9",
    "NM(2, 4)",
    "VectorNM(1, 4, 64)",
)
ERROR = 2e-2  # relative to the dense result, of the same numbers
COLORS = ("#2b7bba", "#d9822b", "#4d9a5b", "#8a63b8", "#b0b7bf", "#c23b3b")


@dataclass(frozen=True)
class Cell:
    """One layout at one number of tokens: seconds of a call, and how many times as fast as dense it is."""

    shape: tuple[int, int]
    dtype: str
    layout: str
    tokens: int
    seconds: Spread
    dense_seconds: Spread
    speedup: Spread
    kernel: str
    reason: str


@torch.inference_mode()
def bench(
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    layouts: Sequence[Candidate],
    tokens: Sequence[int],
    device: torch.device,
    seconds: float,
    json_path: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Print a table for each shape and dtype, and one sentence; a wrong result ends the program."""
    torch.manual_seed(0)
    print(f"Linear layers on {place_of(device)}: times as fast as dense; below 1 is a loss.")
    cells: list[Cell] = []
    for dtype in dtypes:
        for shape in shapes:
            print(f"\n{shape[0]} -> {shape[1]}, {dtype}")
            print(f"{'layout':28}" + "".join(f"{t:>10} tokens" for t in tokens) + "  kernel at the most tokens")
            for row in _rows(shape, dtype, layouts, tokens, device, seconds):
                cells += row
    if not cells:
        raise SystemExit("Expected a layout that can store one of these shapes, got none; choose others in --layouts.")
    if json_path is not None:
        about = {"torch": torch.__version__, "device": place_of(device), "cells": [asdict(cell) for cell in cells]}
        json_path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if picture is not None:
        picture.write_text(_picture(cells, tokens), encoding="utf-8")
    print(f"\n{advice(cells, device)}")


def _rows(shape, dtype, layouts, tokens, device, seconds) -> Iterator[list[Cell]]:
    """The cells of each layout, printed as they are measured."""
    dense = torch.randn(shape[1], shape[0], device=device, dtype=dtype)
    inputs = {t: torch.randn(t, shape[0], device=device, dtype=dtype) for t in tokens}
    for candidate in layouts:
        layout, sparsity = candidate
        try:
            layout.check(tuple(dense.shape))
        except ValueError as error:
            print(f"{title(candidate):28}  cannot store this shape: {error}")
            continue
        w = from_dense(dense, layout, layout.mask(dense.abs(), sparsity))
        row = [_cell(candidate, shape, dense, w, x, seconds) for x in inputs.values()]
        print(f"{title(candidate):28}" + "".join(f"{c.speedup.median:>16.2f}x" for c in row) + f"  {row[-1].kernel}")
        yield row


def _cell(candidate, shape, dense, w, x, seconds) -> Cell:
    exact = F.linear(x, w.to_dense())
    error = (F.linear(x, w) - exact).norm() / exact.norm().clamp(min=1e-30)
    if not error < ERROR:
        raise SystemExit(
            f"Expected the dense result of {title(candidate)} at {len(x)} tokens, got a relative error of {error:.2g}."
        )
    runs = [(contextlib.nullcontext, lambda v=v: F.linear(x, v)) for v in (dense, w)]
    slow, fast = take_turns(runs, x.device, seconds)
    plan = which("linear", x, w)
    speedup = Spread.of([a / b for a, b in zip(slow, fast, strict=True)])
    dtype = str(x.dtype).removeprefix("torch.")
    kernel = f"{plan.kernel} [{plan.variant}]" if plan.variant else plan.kernel
    times = Spread.of(fast), Spread.of(slow), speedup
    return Cell(shape, dtype, title(candidate), len(x), *times, kernel, plan.reason)


def advice(cells: Sequence[Cell], device: torch.device) -> str:
    """Which layout is the fastest at each number of tokens, over all shapes and dtypes, in one sentence."""
    said: dict[str, list[int]] = {}
    for tokens in dict.fromkeys(cell.tokens for cell in cells):
        means = {}
        for name in dict.fromkeys(cell.layout for cell in cells):
            speedups = [c.speedup.median for c in cells if c.layout == name and c.tokens == tokens]
            if speedups:
                means[name] = math.exp(sum(map(math.log, speedups)) / len(speedups))
        best = max(means, key=lambda name: means[name])
        clear = all(c.speedup.low > 1 for c in cells if c.layout == best and c.tokens == tokens)
        text = (
            f"{best} is the fastest ({means[best]:.2f} times dense)"
            if clear
            else "nothing is clearly faster than dense"
        )
        said.setdefault(text, []).append(tokens)
    parts = []
    for text, counts in said.items():
        parts.append(f"at {_listed(counts)} token{'s' if counts != [1] else ''} {text}")
    return f"On this {device.type}, {'; '.join(parts)}."


def _listed(counts: list[int]) -> str:
    *most, last = map(str, counts)
    return f"{', '.join(most)} and {last}" if most else last


def _picture(cells: Sequence[Cell], tokens: Sequence[int]) -> str:
    """An SVG: a bar for each number of tokens."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.layout, cell.shape, cell.dtype), []).append(cell)
    rows = []
    for (layout, shape, dtype), group in groups.items():
        speedups = [cell.speedup.median for cell in group]
        rows.append((f"{layout}, {shape[0]}x{shape[1]} {dtype}", speedups, " / ".join(f"{s:.2f}" for s in speedups)))
    colors = [COLORS[i % len(COLORS)] for i in range(len(tokens))]
    return markup.bars(rows, [f"{t} tokens" for t in tokens], colors)
