"""Tables and pictures: as plain text, as rich text where rich is installed, as HTML and pandas frames in notebooks.

It knows nothing of sten: what has columns and rows inherits `Tabular`, and a pattern is a mask.
"""

from __future__ import annotations

import base64
import html
import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PIXELS = 96  # of the longer side of a picture of a pattern
CORNER = 32  # entries a side, of the picture of its first entries
CELL = "padding:2px 8px;text-align:{};white-space:nowrap"


class Tabular:
    """What prints as a table. A subclass defines `header`, `cells` and, if it likes, `last_row`, `notes`, `numeric`.

    `str` gives rich's table where rich is installed, and `plain` never does; notebooks show HTML.
    """

    numeric: Sequence[int] = ()  # the columns that are aligned on the right

    def header(self) -> list[str]:
        """The titles of the columns."""
        raise NotImplementedError

    def cells(self) -> list[list[str]]:
        """The rows, as texts."""
        raise NotImplementedError

    def last_row(self) -> list[str] | None:
        """A row below a line."""
        return None

    def notes(self) -> list[str]:
        """Sentences below the table."""
        return []

    def dim(self) -> list[bool]:
        """Of each row, whether it is of less interest."""
        return [False] * len(self.cells())

    def _lines(self) -> list[list[str]]:
        last = self.last_row()
        return [self.header(), *self.cells(), *([] if last is None else [last])]

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return self.plain()
        out = io.StringIO()
        width = max(map(len, self.plain().splitlines())) + 8
        Console(file=out, width=width, color_system=None).print(self.__rich__())
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def plain(self) -> str:
        """The table without rich."""
        lines = self._lines()
        widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
        text = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in lines]
        return "\n".join([*text, *self.notes()])

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, title in enumerate(self.header()):
            table.add_column(title, justify="right" if i in self.numeric else "left", no_wrap=i == 0)
        for row, dim in zip(self.cells(), self.dim(), strict=True):
            table.add_row(*map(Text, row), style="dim" if dim else "")
        if (last := self.last_row()) is not None:
            table.add_section()
            table.add_row(*map(Text, last), style="bold")
        return Group(table, *map(Text, self.notes()))

    def _repr_html_(self) -> str:
        aligned = [CELL.format("right" if i in self.numeric else "left") for i in range(len(self.header()))]
        aligned[-1] = aligned[-1].replace("nowrap", "normal;min-width:24em")  # it is a sentence
        head = "".join(
            f'<th style="{css}">{html.escape(c)}</th>' for c, css in zip(self.header(), aligned, strict=True)
        )
        rows = []
        for row, dim in zip(self._lines()[1:], [*self.dim(), False], strict=False):
            inside = "".join(f'<td style="{css}">{html.escape(c)}</td>' for c, css in zip(row, aligned, strict=True))
            rows.append(f'<tr style="opacity:{0.6 if dim else 1}">{inside}</tr>')
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{notes}"

    def records(self) -> list[dict[str, Any]]:
        """Each row as a dictionary of numbers and texts: what `to_pandas` takes."""
        return [dict(zip(self.header(), row, strict=True)) for row in self.cells()]

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`, numbers as numbers; needs pandas."""
        try:
            import pandas
        except ImportError:
            raise ImportError("Expected pandas for to_pandas, got none; `pip install pandas`.") from None
        return pandas.DataFrame(self.records())


class WithPattern:
    """What notebooks show of a sparse tensor: its `repr`, and pictures of its `mask()` if its `parts` have numbers."""

    parts: dict[str, Tensor]

    def _repr_html_(self) -> str:
        values, shown = self.parts["values"], ""
        if type(values) in (Tensor, torch.nn.Parameter) and not values.is_meta:
            with torch.no_grad():
                shown = pattern_figure(self.mask())  # type: ignore[attr-defined]
        return f"<div><code>{html.escape(repr(self))}</code><br>{shown}</div>"


def facts(title: str, rows: dict[str, Any]) -> str:
    """HTML of a few named values, each as its text."""
    cells = "".join(
        f'<tr><th style="{CELL.format("left")}">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<div><b>{html.escape(title)}</b><table>{cells}</table></div>"


def count_of_bytes(count: float) -> str:
    """The number with a unit, such as 1.133 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def time_of(seconds: float) -> str:
    """The time with a unit, such as 1.5 ms."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def png(gray: Tensor) -> str:
    """A picture of (rows, columns) numbers from 0, white, to 1, black, as a data URI."""
    height, width = gray.shape
    levels = (255 - gray.float().clamp(0, 1) * 225).to(torch.uint8).cpu().contiguous()
    lines = b"".join(b"\0" + bytes(line) for line in levels.tolist())

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def densities(mask: Tensor, pixels: int = PIXELS) -> Tensor:
    """The share of True of each pixel of a picture of a mask, which is at most `pixels` wide and high."""
    flat = mask.flatten(1)
    steps = [max(-(-size // pixels), 1) for size in flat.shape]
    sizes = [size // step for size, step in zip(flat.shape, steps, strict=True)]
    inside = flat[: sizes[0] * steps[0], : sizes[1] * steps[1]]
    return inside.reshape(sizes[0], steps[0], sizes[1], steps[1]).sum((1, 3)) / (steps[0] * steps[1])


def pattern_figure(mask: Tensor) -> str:
    """HTML of two pictures of a pattern: all of it, a pixel as dark as its part is dense, and its first entries."""
    if not mask.numel():
        return ""
    corner = mask.flatten(1)[:CORNER, :CORNER]
    pictures = (
        (densities(mask), 160, "all of it"),
        (corner, 160, f"its first {corner.shape[0]}x{corner.shape[1]} entries"),
    )
    return "".join(
        f'<img src="{png(gray)}" alt="pattern, {title}" title="{title}" '
        f'style="height:{side}px;max-width:100%;image-rendering:pixelated;border:1px solid #8888;margin:4px 8px 4px 0">'
        for gray, side, title in pictures
    )


def bars(rows: Sequence[tuple[str, Sequence[float], str]], series: Sequence[str], colors: Sequence[str]) -> str:
    """An SVG of horizontal bars: of each row a label, one length for each of `series`, and a text at its end."""
    label, width, bar, gap = 300, 600, 9, 8
    most = max((value for _, values, _ in rows for value in values), default=0.0) or 1.0
    step = bar * len(series) + gap
    height = step * len(rows) + 26
    lines = [
        f'<svg viewBox="0 0 {label + width + 160} {height}" role="img" xmlns="http://www.w3.org/2000/svg" '
        'style="width:100%;min-width:760px;max-width:1060px;font:12px system-ui,sans-serif" fill="currentColor">'
    ]
    for i, (title, color) in enumerate(zip(series, colors, strict=True)):
        lines.append(f'<rect x="{label + i * 140}" y="2" width="12" height="12" fill="{color}"/>')
        lines.append(f'<text x="{label + i * 140 + 18}" y="12">{html.escape(title)}</text>')
    for i, (name, values, text) in enumerate(rows):
        top = 24 + i * step
        short = name if len(name) <= 40 else "..." + name[-37:]
        middle = top + bar * len(series) / 2 + 4
        lines.append(f'<text x="{label - 8}" y="{middle}" text-anchor="end">{html.escape(short)}</text>')
        for k, (value, color) in enumerate(zip(values, colors, strict=True)):
            long = max(value / most * width, 0.5 if value else 0)
            lines.append(
                f'<rect x="{label}" y="{top + k * bar}" width="{long:.1f}" height="{bar - 1}" fill="{color}"/>'
            )
        end = label + max(values, default=0) / most * width + 6
        lines.append(f'<text x="{end:.1f}" y="{middle}">{html.escape(text)}</text>')
    return "\n".join([*lines, "</svg>"])
