"""summary and plan: a table of a model's weights, as rich text where rich is installed and as plain text elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..markup import Tabular, count_of_bytes, time_of
from ..tensor import SparseTensor
from ..training.trained_weight import TrainedWeight
from .record import record_of
from .select import all_weights
from .sites import Site, sites_of

NUMERIC = ("density", "bytes", "time", "dense")  # columns of numbers


@dataclass(frozen=True)
class Row:
    """One weight of a summary or a plan; what has a default is None or empty where it does not apply.

    `kernel` is what ran last with the present pattern, and the seconds are those of the layer in one call of the model,
    as it is and dense, that `sten.explain` has measured with this pattern.
    """

    name: str
    layout: str
    shape: tuple[int, ...]
    density: float
    stored_bytes: int
    dense_bytes: int
    energy: float | None = None
    why: str = ""
    tied_to: str = ""
    kernel: str = ""
    seconds: float | None = None
    dense_seconds: float | None = None


@dataclass(frozen=True)
class Table(Tabular):
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

    @property
    def numeric(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(i for i, title in enumerate(self.header()) if title in NUMERIC or title == self.energy)

    def header(self) -> list[str]:
        return ["weight", "layout", "shape", "density", "bytes", self.energy, *self._measured(), "note"]

    def cells(self) -> list[list[str]]:
        return [self._cells(row) for row in self.rows]

    def last_row(self) -> list[str]:
        once = [r for r in self.rows if not r.tied_to]
        stored, dense = sum(r.stored_bytes for r in once), sum(r.dense_bytes for r in once)
        entries = sum(math.prod(r.shape) for r in once)
        live = sum(math.prod(r.shape) * r.density for r in once)
        ratio = f"{stored / dense:.2f} of dense" if dense else ""
        density, size = f"{live / max(entries, 1):.3f}", count_of_bytes(stored)
        return ["total", "", "", density, size, "", *("" for _ in self._measured()), ratio]

    def notes(self) -> list[str]:
        return [self.chosen(), *(site.described() for site in self.sites)]

    def dim(self) -> list[bool]:
        return [bool(row.why) for row in self.rows]

    def records(self) -> list[dict[str, Any]]:
        """A dictionary of each row."""
        return [vars(row) | {"shape": "x".join(map(str, row.shape))} for row in self.rows]

    def _measured(self) -> list[str]:
        """The columns that there are once the model has run, or `sten.explain` has timed it."""
        found = ["kernel"] if any(row.kernel for row in self.rows) else []
        return found + (["time", "dense"] if any(row.seconds is not None for row in self.rows) else [])

    def _cells(self, r: Row) -> list[str]:
        energy = "" if r.energy is None else f"{r.energy:.3f}"
        times = ["" if s is None else time_of(s) for s in (r.seconds, r.dense_seconds)]
        known = dict(zip(("kernel", "time", "dense"), (r.kernel, *times), strict=True))
        start = [r.name, r.layout, "x".join(map(str, r.shape)), f"{r.density:.3f}", count_of_bytes(r.stored_bytes)]
        return [*start, energy, *(known[title] for title in self._measured()), r.why]


class Summary(Table):
    """What a model's weights are now (`sten.summary`); the energy is that of their last `sten.sparsify`."""

    energy = "energy kept (at sparsify)"


class SparsifyPlan(Table):
    """What `sparsify` would make of a model's weights (`sten.plan`)."""


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
    kernel, times = (_kernel(w), w.cache.times or (None, None)) if sparse else ("", (None, None))
    return Row(name, layout, tuple(w.shape), density, stored, dense, energy, why, tied_to, kernel, *times)


def _kernel(w: SparseTensor) -> str:
    """The kernel that ran last in a forward pass."""
    plans = [plan for plan in w.cache.plans.values() if plan.run is not None and not plan.operator.endswith("_weight")]
    forward = [plan for plan in plans if "_grad_" not in plan.operator] or plans
    if not forward:
        return ""
    last = forward[-1]
    return f"{last.kernel} [{last.variant}]" if last.variant else last.kernel


def summary(model: nn.Module) -> Summary:
    """Per weight of two or more dimensions: layout, shape, density, bytes, energy that was kept, why it is dense.

    All is as it is now, but for the energy, sum |w kept| / sum |w|, which was measured at the last `sten.sparsify` of
    the weight: what was dropped is gone. A tied weight is listed under each of its names and counted once. Once the
    model has run there is a column of the kernels, and after `sten.explain` there are times. The result prints as a
    table and shows in notebooks; `rows` and `to_pandas()` have the numbers.

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
    found, own = {}, {name for site in sites_of(model) for name in map(site.full, site.state)}
    for module in model.modules():
        if not isinstance(module, TrainedWeight):
            params = {name: p for name, p in module._parameters.items() if p is not None and name not in own}
            found |= {id(p): p.numel() for p in params.values() if p.dim() < 2}
    return sum(found.values())
