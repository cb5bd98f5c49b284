"""The methods that the training benchmarks compare: how each sparsifies a model, and what its training loop needs."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import sten
from sten.training.pattern_weight import PatternWeight

Choose = Callable[[str, nn.Module, str], bool]


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        method: makes the sparsifier from the total steps; None: dense.
        layout, sparsity: as `sten.sparsify` takes them.
        start: when sparsify is called, as a fraction of the steps (one-shot pruning: half way).
        adams, distill: CAST's optimizer and loss.
        width: multiplies the hidden width (small dense).
        layers: only weights whose names end so.
    """

    method: Callable[[int], sten.Sparsifier] | None = None
    layout: sten.Layout | None = None
    sparsity: sten.Allocation | None = None
    start: float = 0.0
    adams: bool = False
    distill: bool = False
    width: float = 1.0
    layers: tuple[str, ...] = ("",)


def interval(total: int) -> int:
    """Steps between two mask updates: 100 as published, fewer in short runs."""
    return max(min(100, total // 30), 1)


def recipes(
    free: sten.Layout, block: int = 16, cast_decay: float = 1e-2, decay: float = 2e-4, fade: float = 8.0
) -> dict[str, Recipe]:
    """All of them, in the order of the report.

    Args:
        free: layout of unstructured patterns; Masked and CSR train the same numbers.
        block: of BSR.
        cast_decay: of the gradient's order of magnitude, so it depends on the task.
        fade: how far an exponential mask decays over a run, so that short runs decay as far as long ones.
    """
    table = {"dense": Recipe()}
    for s in (0.8, 0.9, 0.95, 0.98):
        at, erk = f"{s:.0%}", sten.ERK(s)
        table[f"small dense {at}"] = Recipe(width=(1 - s) ** 0.5)
        table[f"magnitude {at}"] = Recipe(lambda n: sten.Magnitude(), free, erk, start=0.5)
        table[f"gradual {at}"] = Recipe(lambda n: sten.Gradual(n // 10, 3 * n // 4, interval(n)), free, erk)
        table[f"static {at}"] = Recipe(lambda n: sten.Static(), free, erk)
        table[f"set {at}"] = Recipe(lambda n: sten.SET(n, every=interval(n), stop=0.75), free, erk)
        table[f"rigl {at}"] = Recipe(lambda n: sten.RigL(n, every=interval(n)), free, erk)
        table[f"srigl {at}"] = Recipe(lambda n: sten.SRigL(n, every=interval(n)), sten.FanIn(), erk)
    half = sten.Uniform(0.5)
    table["gradual 50%"] = Recipe(lambda n: sten.Gradual(n // 10, 3 * n // 4, interval(n)), free, half)
    for layout in (sten.NM(2, 4), sten.NM(16, 32), sten.NM(1, 4), sten.NM(1, 8)):
        at = f"{layout.n}:{layout.m}"
        table[f"magnitude {at}"] = Recipe(lambda n: sten.Magnitude(), layout, start=0.5)
        table[f"ste {at}"] = Recipe(lambda n: sten.STE(), layout)
        table[f"srste {at}"] = Recipe(lambda n: sten.SRSTE(decay), layout)
        table[f"decaying {at}"] = Recipe(lambda n: sten.DecayingMask(n, rate=fade / n), layout)
        table[f"cast {at}"] = Recipe(lambda n: sten.CAST(n, decay=cast_decay), layout, adams=True)
        table[f"cast, teacher {at}"] = Recipe(
            lambda n: sten.CAST(n, decay=cast_decay), layout, adams=True, distill=True, start=0.5
        )
    bsr = sten.BSR((block, block))
    table["blocks 80%"] = Recipe(
        lambda n: sten.BlockPruneGrow(n // 10, 3 * n // 4, interval(n)), bsr, sten.Uniform(0.8)
    )
    return table


def layout_recipes(cast_decay: float = 1e-2, fade: float = 8.0) -> dict[str, Recipe]:
    """One quality for each layout that is fast: the same methods on VectorNM and BSR, and on NM at the same rates."""

    def gradually(n: int) -> sten.Sparsifier:
        return sten.BlockPruneGrow(n // 10, 3 * n // 4, interval(n))

    table = {"dense": Recipe()}
    blocks = [(sten.BSR((b, b)), sten.Uniform(s)) for b in (64, 128) for s in (0.8, 0.9)]
    layouts: list[tuple[sten.Layout, sten.Allocation | None]] = [(sten.NM(2, 4), None)]
    for m in (2, 4, 8):
        layouts += [(layout, None) for layout in (sten.NM(1, m), *(sten.VectorNM(1, m, v) for v in (32, 64, 128)))]
    for layout, sparsity in [*layouts, *blocks]:
        at = layout_name(layout, sparsity)
        decaying = Recipe(lambda n: sten.DecayingMask(n, rate=fade / n), layout, sparsity)
        cast = Recipe(lambda n: sten.CAST(n, decay=cast_decay), layout, sparsity, 0.5, adams=True, distill=True)
        table |= {f"decaying {at}": decaying, f"cast, teacher {at}": cast}
        if sparsity is not None:
            table[f"prune and grow {at}"] = Recipe(gradually, layout, sparsity)
    return table


def layout_name(layout: sten.Layout, sparsity: sten.Allocation | None) -> str:
    if sparsity is not None:
        return f"BSR {layout.block[0]} {sparsity.sparsity:.0%}"
    vector = f" v={layout.v}" if isinstance(layout, sten.VectorNM) else ""
    return f"{type(layout).__name__} {layout.n}:{layout.m}{vector}"


@torch.no_grad()
def widen(model: nn.Module) -> None:
    """Divide the first weights of compressed layers by sqrt(density): their fan-in is smaller than init assumed."""
    for module in model.modules():
        if isinstance(getattr(module, "weight_pattern", None), PatternWeight):
            module.weight.mul_(module.weight.density**-0.5)


class Run:
    """A model under a recipe: call `before(step)` before each step of an ordinary loop."""

    def __init__(self, recipe: Recipe, model: nn.Module, total: int, weights: Choose, lr: float, **adam) -> None:
        self.recipe, self.model, self.total, self.weights = recipe, model, total, weights
        kind = sten.optim.AdamS if recipe.adams else torch.optim.AdamW
        adam = {k: v for k, v in adam.items() if not recipe.adams or k != "weight_decay"}
        self.optimizer = kind(model.parameters(), lr=lr, **adam)
        self.teacher: nn.Module | None = None

    def before(self, step: int) -> None:
        """Sparsify when the recipe says so."""
        recipe, left = self.recipe, self.total - step
        if recipe.method is None or step != int(recipe.start * self.total):
            return
        if recipe.distill:
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        method = recipe.method(left)

        def wanted(name: str, module: nn.Module, attribute: str) -> bool:
            return self.weights(name, module, attribute) and name.endswith(recipe.layers)

        chosen = {"layout": recipe.layout, "sparsifier": method, "sparsity": recipe.sparsity, "weights": wanted}
        sten.sparsify(self.model, **chosen, optimizer=self.optimizer)
        if step == 0:
            widen(self.model)

    def loss(self, logits: torch.Tensor, target: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, or the distillation loss where the recipe has a teacher."""
        if self.teacher is None:
            return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())
        with torch.no_grad():
            taught = self.teacher(x)
        return sten.distill_loss(logits, target, taught)

    def finish(self) -> tuple[nn.Module, float]:
        """The finalized model, and the density of what was made sparse."""
        if self.recipe.method is None:
            return self.model, 1.0
        sten.finalize(self.model)
        rows = [row for row in sten.summary(self.model).rows if row.layout != "dense"]
        entries = [torch.Size(row.shape).numel() for row in rows]
        return self.model, sum(row.density * n for row, n in zip(rows, entries, strict=True)) / sum(entries)


def picture(results: dict[str, list[float]], label: str, path: Path) -> None:
    """Mean and standard deviation over the seeds, one row each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.28 * len(results) + 1))
    for i, runs in enumerate(results.values()):
        deviation = statistics.stdev(runs) if len(runs) > 1 else 0.0
        axis.errorbar(statistics.mean(runs), i, xerr=deviation, fmt="o", capsize=3)
    axis.set_yticks(range(len(results)), list(results))
    axis.invert_yaxis()
    axis.set_xlabel(f"{label}, mean and standard deviation")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
