"""summary and plan: a table of a model's weights, as rich text where rich is installed and as plain text elsewhere."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ..tensor import SparseTensor
from ..training.trained_weight import TrainedWeight
from .record import record_of
from .select import all_weights
from .sites import Site, sites_of


@dataclass(frozen=True)
class Row:
    """One weight of a summary or a plan; the last three are None or empty where they do not apply."""

    name: str
    layout: str
    shape: tuple[int, ...]
    density: float
    stored_bytes: int
    dense_bytes: int
    energy: float | None = None
    why: str = ""
    tied_to: str = ""


@dataclass(frozen=True)
class Table:
    """Rows, and how they print.

    Attributes:
        rows: one for each weight of two or more dimensions.
        others: how many parameters the model has besides (biases, norms).
        sites: other sites than weights, with their methods (`sten.sparsify(site=...)`).
    """

    energy: ClassVar[str] = "energy kept"
    rows: list[Row]
    others: int = 0
    sites: list[Site] = field(default_factory=list)

    def chosen(self) -> str:
        """How many of the model's weights and parameters are in a sparse layout, in one line."""
        once = [row for row in self.rows if not row.tied_to]
        sparse = [row for row in once if row.layout != "dense"]
        inside, total = (sum(math.prod(row.shape) for row in rows) for rows in (sparse, once))
        total += self.others
        share = f" ({inside / total:.0%})" if total else ""
        return f"sparse: {len(sparse)} of {len(once)} weights, with {inside:,} of {total:,} parameters{share}"

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
        cells = [self._header(), *(self._cells(r) for r in self.rows), self._total()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, self.chosen(), *map(str, self.sites)])

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table as RichTable

        table = RichTable(box=None, pad_edge=False, header_style="bold")
        for i, title in enumerate(self._header()):
            table.add_column(title, justify="right" if i in (3, 4, 5) else "left", no_wrap=i == 0)
        for row in self.rows:
            table.add_row(*self._cells(row), style="dim" if row.why else "")
        table.add_section()
        table.add_row(*self._total(), style="bold")
        return Group(table, self.chosen(), *map(str, self.sites))

    def _header(self) -> list[str]:
        return ["weight", "layout", "shape", "density", "bytes", self.energy, "note"]

    def _cells(self, r: Row) -> list[str]:
        energy = "" if r.energy is None else f"{r.energy:.3f}"
        return [r.name, r.layout, "x".join(map(str, r.shape)), f"{r.density:.3f}", _size(r.stored_bytes), energy, r.why]

    def _total(self) -> list[str]:
        once = [r for r in self.rows if not r.tied_to]
        stored, dense = sum(r.stored_bytes for r in once), sum(r.dense_bytes for r in once)
        entries = sum(math.prod(r.shape) for r in once)
        live = sum(math.prod(r.shape) * r.density for r in once)
        ratio = f"{stored / dense:.2f} of dense" if dense else ""
        return ["total", "", "", f"{live / max(entries, 1):.3f}", _size(stored), "", ratio]


class Summary(Table):
    """What a model's weights are now (`sten.summary`); the energy is that of their last `sten.sparsify`."""

    energy = "energy kept (at sparsify)"


class SparsifyPlan(Table):
    """What `sparsify` would make of a model's weights (`sten.plan`)."""


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def rows_of(items: Iterable[tuple[str, Tensor, float | str | None]]) -> list[Row]:
    """Rows of (name, tensor, energy kept or the reason why it is dense)."""
    return [_row(*item) for item in items]


def _row(name: str, w: Tensor, remark: float | str | None, tied_to: str = "") -> Row:
    dense = w.numel() * w.element_size()
    sparse = isinstance(w, SparseTensor)
    energy, why = (None, remark) if isinstance(remark, str) else (remark, "")
    layout = f"{w.sparse_layout}{' transposed' if w.transposed else ''}" if sparse else "dense"
    density, stored = (w.density, w.stored_bytes) if sparse else (1.0, dense)
    why = "; ".join(filter(None, (tied_to and f"tied to {tied_to}", why)))
    return Row(name, layout, tuple(w.shape), density, stored, dense, energy, why, tied_to)


def summary(model: nn.Module) -> Summary:
    """Per weight of two or more dimensions: layout, shape, density, bytes, energy that was kept, why it is dense.

    All is as it is now, but for the energy, sum |w kept| / sum |w|, which was measured at the last `sten.sparsify` of
    the weight: what was dropped is gone. A tied weight is listed under each of its names and counted once. The
    result prints as a table; `rows` has the numbers.

    Example:
        >>> import torch, sten
        >>> table = sten.summary(sten.sparsify(torch.nn.Linear(8, 4), layout=sten.NM(2, 4)))
        >>> table.rows[0].layout, table.rows[0].density
        ('NM(n=2, m=4)', 0.5)
    """
    rows, seen = [], {}
    for target in all_weights(model, wrapped=True):
        module, name = target.owners[0]
        w = target.tensor if target.weight is None else target.weight.tensor(target.tensor)
        first = seen.setdefault(id(target.weight or target.tensor), target.name)
        record = record_of(module, name)
        remark = record.energy if isinstance(w, SparseTensor) else record.why
        rows.append(_row(target.name, w, remark, first if first != target.name else ""))
    return Summary(rows, other_parameters(model), sites_of(model))


def other_parameters(model: nn.Module) -> int:
    """How many parameters are no weights of two or more dimensions; those of methods are not the model's."""
    found = {}
    for module in model.modules():
        if not isinstance(module, TrainedWeight):
            found |= {id(p): p.numel() for p in module._parameters.values() if p is not None and p.dim() < 2}
    return sum(found.values())
