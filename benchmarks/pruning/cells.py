"""What one_shot.py measures: a cell is a model, a layout, a method and what comes before and after it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

import sten

# as a user writes them, without "sten."
SWAPS = "SparseSwaps()"
UPDATE = "ADMM()"
CHAINS = (
    f"chain(Wanda(), {UPDATE})",
    f"chain(Wanda(), {SWAPS})",
    f"chain(Wanda(), {SWAPS}, {UPDATE})",
    f"chain(SparseGPT(), {UPDATE})",
    f"chain(SparseGPT(), {SWAPS}, {UPDATE})",
)
BEST = f"chain(Wanda(), {SWAPS}, {UPDATE})"
RECONSTRUCTED = f"chain(Wanda(), {SWAPS}, {UPDATE}, Reconstruct())"
MASKS = ("Magnitude()", "Wanda()", "SparseGPT()")


@dataclass(frozen=True)
class Cell:
    """One sparse model.

    Attributes:
        group: what `--cells` chooses by, besides the name.
        layout, method: expressions of sten's names.
        sparsity: a fraction, an expression of an Allocation, or None where the layout has a rate.
        permute: hidden channels are reordered first.
        steps: of distillation, after it.
        domain: of the text of calibration and distillation.
        seed: chooses that text.
        lr: of distillation.
        batch: sequences a step of distillation; None: 2 of SmolLM2, 32 of MiniLM.
    """

    group: str
    model: str
    layout: str
    method: str
    sparsity: float | str | None = None
    permute: bool = False
    steps: int = 0
    domain: str = "python"
    seed: int = 0
    lr: float = 3e-4
    batch: int | None = None

    @property
    def pattern(self) -> str:
        """Layout and sparsity: what speed and bytes depend on."""
        if self.sparsity is None:
            return self.layout
        return f"{self.layout} {self.sparsity if isinstance(self.sparsity, str) else format(self.sparsity, '.0%')}"

    @property
    def before_distillation(self) -> Cell:
        """The same for all cells that differ in distillation alone."""
        return replace(self, group="", steps=0, lr=Cell.lr, batch=None)

    @property
    def name(self) -> str:
        """The key in the JSON."""
        parts = [self.model, self.pattern, self.method]
        parts += ["permuted"] if self.permute else []
        parts += [f"distill {self.steps}"] if self.steps else []
        parts += [f"lr {self.lr:g}"] if self.lr != Cell.lr else []
        parts += [f"batch {self.batch}"] if self.batch else []
        parts += [self.domain] if self.domain != "python" else []
        return " | ".join([*parts, f"seed {self.seed}"])


def evaluated(text: str):
    """The object that an expression of sten's names makes; refuses names that sten lacks."""
    return eval(text, {"__builtins__": {}}, vars(sten))


PATTERNS: tuple[tuple[str, float | None], ...] = (
    ("CSR()", 0.5), ("CSR()", 0.6), ("CSR()", 0.7), ("FanIn()", 0.5),
    ("NM(2, 4)", None), ("NM(4, 8)", None), ("NM(8, 16)", None), ("NM(16, 32)", None),
    ("VectorNM(2, 4, 8)", None), ("VectorNM(2, 4, 32)", None), ("VectorNM(2, 4, 64)", None),
    ("BSR((16, 16))", 0.3), ("BSR((16, 16))", 0.5), ("BSR((32, 32))", 0.3), ("BSR((32, 32))", 0.5),
    ("GroupedNM(2, 4, 8)", None),
)  # fmt: skip
CHAINED = (("NM(2, 4)", None), ("NM(16, 32)", None), ("VectorNM(2, 4, 32)", None), ("BSR((32, 32))", 0.3))
PERMUTED = (*CHAINED[2:], ("NM(2, 4)", None), ("GroupedNM(2, 4, 8)", None))
SENSITIVITY = "sensitivity"  # in place of an Allocation: what sten.sensitivity chooses
CANDIDATES = tuple(round(0.3 + 0.05 * i, 2) for i in range(9))
AGAIN, REPEATED = ("NM(2, 4)", "NM(16, 32)", "VectorNM(2, 4, 32)"), (CHAINS[0], BEST, RECONSTRUCTED)
RATES = (5e-4, 1e-3, 2e-3)  # of distillation with batches of RATES_BATCH
RATES_BATCH = 128
STEPS = {"smollm2": (40, 100, 200), "minilm": (100, 300)}


def cells(seeds: int) -> Iterator[Cell]:
    """In the order in which they are worth most; a cell with several seeds is seed 0 first."""
    for model in ("smollm2", "minilm"):
        dense = [Cell("grid", model, layout, method, at) for layout, at in PATTERNS for method in MASKS]
        yield from dense
        chains = [Cell("chains", model, layout, method, at) for layout, at in CHAINED for method in CHAINS]
        chains += [Cell("chains", model, layout, RECONSTRUCTED, at) for layout, at in CHAINED]
        chains += [Cell("chains", model, "CSR()", method, 0.5) for method in (*CHAINS, RECONSTRUCTED)]
        yield from chains
        for layout, at in PERMUTED:
            yield from (Cell("permute", model, layout, method, at, permute=True) for method in ("Wanda()", BEST))
        recovered = [
            Cell("distill", model, layout, BEST, at, permute=layout[0] == "V", steps=steps)
            for steps in STEPS[model]
            for layout, at in (*CHAINED, ("CSR()", 0.5))
        ]
        yield from recovered
        yield Cell("dsnot", model, "CSR()", "chain(Wanda(), DSnoT())", 0.7)
        yield Cell("dsnot", model, "CSR()", "chain(Magnitude(), DSnoT())", 0.7)
        for how in ("ERK(0.5)", "Global(0.5)", f"{SENSITIVITY}(0.5)"):
            yield from (Cell("allocation", model, "CSR()", method, how) for method in ("Wanda()", "SparseGPT()"))
        for domain in ("manuals", "both"):
            yield from (
                Cell("domains", model, layout, method, at, domain=domain)
                for layout, at in CHAINED[:2]
                for method in ("Wanda()", "SparseGPT()", BEST)
            )
        yield from (replace(cell, domain="both") for cell in recovered if cell.layout in ("NM(2, 4)", "CSR()"))
        if model == "minilm":
            yield from rates()
        again = [
            cell for cell in (*dense, *chains) if cell.layout in AGAIN[:2] and cell.method in (*MASKS[1:], *REPEATED)
        ]
        again += [cell for cell in recovered if cell.layout in AGAIN]
        for seed in range(1, seeds):  # another draw of the calibration text
            yield from (replace(cell, seed=seed) for cell in again)


def rates() -> Iterator[Cell]:
    """Other learning rates and batches of MiniLM's distillation, all of which are reported: none is chosen by them."""
    for layout, at in (("CSR()", 0.5), ("NM(2, 4)", None)):
        for lr in RATES:
            yield Cell("rates", "minilm", layout, CHAINS[3], at, False, 300, "both", 0, lr, RATES_BATCH)


def chosen(seeds: int, patterns: list[str]) -> list[Cell]:
    """Those whose group or name fits one of the patterns, which are globs; all without patterns."""

    def fits(cell: Cell) -> bool:
        return any(fnmatch.fnmatchcase(text, p) for p in patterns for text in (cell.group, cell.model, cell.name))

    return [cell for cell in cells(seeds) if not patterns or fits(cell)]


def settings(cell: Cell, model: torch.nn.Module, calibration: list) -> dict:
    """The arguments of `sten.sparsify`; `calibration` where something reads it."""
    layout, method, sparsity = evaluated(cell.layout), evaluated(cell.method), cell.sparsity
    given = {"calibration": calibration} if method.needs or hasattr(method, "reconstruct") else {}
    if isinstance(sparsity, str) and sparsity.startswith(SENSITIVITY):
        table = sten.sensitivity(model, [(layout, at) for at in CANDIDATES], calibration, method)
        return {"layout": table.choose(sparsity=float(sparsity.removeprefix(SENSITIVITY).strip("()"))), **given}
    if isinstance(sparsity, str):
        sparsity = evaluated(sparsity)
    return {"layout": layout, "sparsifier": method, "sparsity": sparsity, **given}


def bytes_of(model: torch.nn.Module, chosen: set[str]) -> tuple[int, int]:
    """(stored, dense) bytes of the chosen weights, as 16-bit numbers with the indices of their layout."""
    stored = dense = 0
    for row in sten.summary(model).rows:
        if row.name not in chosen or row.tied_to:
            continue
        weight = model.get_parameter(row.name)
        parts = weight.parts.values() if row.layout != "dense" else [weight]
        stored += sum(p.nbytes if p.dtype != torch.float32 else p.nbytes // 2 for p in parts)
        dense += 2 * torch.Size(row.shape).numel()
    return stored, dense


def chosen_weights(model: torch.nn.Module) -> set[str]:
    """The names of the weights that sten.sparsify chooses by default."""
    return {row.name for row in sten.plan(model, sten.Masked(), sparsity=0.5).rows if row.layout != "dense"}
