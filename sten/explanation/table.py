"""Explanation: what `sten.explain` found, as a table, a frame, and a page."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import markup
from ..conversion.sites import Site
from . import page
from .measure import Alternative
from .timing import Spread

NOISY = 1.5  # the ratio of the quartiles of a speed-up
VERDICTS = {"keep": "", "dense": "go dense: ", "layout": "another layout: ", "": ""}


@dataclass(frozen=True)
class LayerRow:
    """One layer of an explanation. Times are those of all its calls in one call of the model.

    Attributes:
        name: of the module; for a weight that was not used, of the weight.
        weights: their names.
        layout: how they are stored; "dense".
        shape: of the first weight.
        density, energy: entries stored, and the share of sum |w| that the last `sten.sparsify` kept (None: not known).
        stored_bytes, dense_bytes: of the weights.
        kernel, reason: what ran, and why.
        calls, input: how often it is called, and the shape of its first input.
        seconds, dense_seconds: as it is, and with dense weights. None: it was not called, or is dense.
        speedup: dense_seconds / seconds, round by round.
        verdict: "keep", "dense" or "layout"; empty if it was not called.
        advice: the verdict's reason.
        alternatives: other layouts that were timed.
    """

    name: str
    weights: tuple[str, ...]
    layout: str
    shape: tuple[int, ...]
    density: float
    energy: float | None
    stored_bytes: int
    dense_bytes: int
    kernel: str = ""
    reason: str = ""
    calls: int = 0
    input: tuple[int, ...] = ()
    seconds: Spread | None = None
    dense_seconds: Spread | None = None
    speedup: Spread | None = None
    verdict: str = ""
    advice: str = "not called with these inputs"
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Explanation(markup.Tabular):
    """What `sten.explain` found; print it, show it in a notebook, or `save` it as a page.

    Attributes:
        rows: one for each layer with weights of two or more dimensions.
        model: seconds of one call of the model as it was.
        where: the device.
        sizes: bytes of all these weights, as they were, and dense; tied ones count once.
        densified: the names of the weights that `keep_faster` made dense.
        patterns: by name of a weight, HTML of the pictures of its pattern; one of each kind.
        sites: other sites than weights, with their methods (`sten.sparsify(site=...)`).
    """

    rows: list[LayerRow]
    model: Spread
    where: str
    sizes: tuple[int, int]
    densified: list[str] = field(default_factory=list)
    patterns: dict[str, str] = field(default_factory=dict, repr=False)
    sites: list[Site] = field(default_factory=list)

    numeric = (2, 3, 4, 6, 7, 8)

    @property
    def dense_model(self) -> float:
        """Seconds that the model would take with dense weights: these layers dense, and what it does besides."""
        dense = sum((row.dense_seconds or row.seconds).median for row in self.rows if row.seconds is not None)
        return max(self.model.median - self._inside(), 0.0) + dense

    def _inside(self) -> float:
        """Seconds in these layers, as they are; more than the model's if other load came in between."""
        return sum(row.seconds.median for row in self.rows if row.seconds is not None)

    def header(self) -> list[str]:
        return ["layer", "layout", "density", "energy", "bytes", "kernel", "time", "dense", "speed-up", "advice"]

    def cells(self) -> list[list[str]]:
        return [_cells(row) for row in self.rows]

    def last_row(self) -> list[str]:
        stored, dense = self.sizes
        times = [markup.time_of(self.model.median), markup.time_of(self.dense_model)]
        speedup = f"{self.dense_model / self.model.median:.2f}"
        ratio = f"{stored / dense:.2f} of the bytes" if dense else ""
        return ["model", "", "", "", markup.count_of_bytes(stored), "", *times, speedup, ratio]

    def notes(self) -> list[str]:
        inside = min(self._inside() / self.model.median, 1.0)
        found = [f"On {self.where}; these layers take {inside:.0%} of the model's time. {self.in_short()}"]
        spreads = sorted(row.speedup.high / row.speedup.low for row in self.rows if row.speedup is not None)
        if spreads and spreads[len(spreads) // 2] > NOISY:
            found.append("The rounds differ much: the machine has other load. Measure again on a quiet one.")
        if self.densified:
            found.append(f"made dense: {', '.join(self.densified)}")
        return found + [site.described() for site in self.sites]

    def in_short(self) -> str:
        """How many sparse layers are worth keeping, in one sentence."""
        sparse = [row for row in self.rows if row.speedup is not None]
        counts = {verdict: sum(row.verdict == verdict for row in sparse) for verdict in ("keep", "dense", "layout")}
        if not sparse:
            return "No layer that was called is sparse."
        gains = {"layout": "another layout", "dense": "going dense"}
        parts = [f"{counts[verdict]} would gain by {what}" for verdict, what in gains.items() if counts[verdict]]
        return f"Worth keeping: {counts['keep']} of {len(sparse)} sparse layers{''.join(f'; {p}' for p in parts)}."

    def dim(self) -> list[bool]:
        return [row.speedup is None for row in self.rows]

    def records(self) -> list[dict[str, Any]]:
        """A dictionary of each row: numbers in seconds and bytes."""
        return [_record(row) for row in self.rows]

    def to_html(self, path: str | os.PathLike | None = None) -> str:
        """The explanation as one HTML page with pictures, which needs no other file; written to `path` if given."""
        text = page.page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def save(self, path: str | os.PathLike) -> None:
        """Write the HTML page."""
        self.to_html(path)


def _cells(row: LayerRow) -> list[str]:
    times = ["", "", ""]
    if row.seconds is not None:
        times[0] = markup.time_of(row.seconds.median)
    if row.dense_seconds is not None and row.speedup is not None:
        times[1] = markup.time_of(row.dense_seconds.median)
        times[2] = f"{row.speedup.median:.2f} ({row.speedup.low:.2f}-{row.speedup.high:.2f})"
    energy = "" if row.energy is None else f"{row.energy:.3f}"
    size = markup.count_of_bytes(row.stored_bytes)
    advice = f"{VERDICTS[row.verdict]}{row.advice}"
    name = row.name or "(model)"
    return [name, row.layout, f"{row.density:.3f}", energy, size, row.kernel, *times, advice]


def _record(row: LayerRow) -> dict[str, Any]:
    flat = {name: value for name, value in vars(row).items() if not isinstance(value, (Spread, tuple))}
    flat |= {
        "weights": ", ".join(row.weights),
        "shape": "x".join(map(str, row.shape)),
        "input": "x".join(map(str, row.input)),
    }
    for name in ("seconds", "dense_seconds", "speedup"):
        spread = getattr(row, name)
        flat[name] = None if spread is None else spread.median
        flat[f"{name}_low"] = None if spread is None else spread.low
        flat[f"{name}_high"] = None if spread is None else spread.high
    return flat
