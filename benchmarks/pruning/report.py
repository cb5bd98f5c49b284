"""The tables of the pages on pruning and training, from the JSON of the benchmarks; what the targets say.

    python benchmarks/pruning/report.py           # prints all tables
    python benchmarks/pruning/report.py --docs    # writes them between the markers of the pages

What was not measured is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from cells import BEST, CHAINED, CHAINS, MASKS, PATTERNS, PERMUTED, RECONSTRUCTED, SENSITIVITY, STEPS, Cell
from cells import cells as planned
from cells import rates as tried

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SPEEDS = ("decode 1", "decode 16", "prefill 1x512", "prefill 1x1024", "prefill 8x1024", "forward 32x128")


class Results:
    """What the JSON of one_shot.py has, by cell."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text()) if path.exists() else {"cells": {}, "dense": {}}
        self.about, self.dense, self.cells = content.get("about", {}), content["dense"], content["cells"]

    def rows(self, cell: Cell) -> list[dict]:
        """The cell's results, of all seeds that there are."""
        names = [replace(cell, seed=seed).name for seed in range(10)]
        return [self.cells[name] for name in names if "error" not in self.cells.get(name, {"error": ""})]

    def numbers(self, cell: Cell, what: str) -> list[float]:
        return [row[what] for row in self.rows(cell)]

    def increase(self, cell: Cell, domain: str = "python") -> float:
        """ln of the perplexity's ratio to dense, or 1 - cosine; a mean over the seeds, NaN if not measured."""
        if cell.model == "minilm":
            values = [1 - v for v in self.numbers(cell, f"cosine {domain}")]
        else:
            dense = self.dense.get("smollm2", {}).get(f"perplexity {domain}", math.nan)
            values = [math.log(v / dense) for v in self.numbers(cell, f"perplexity {domain}")]
        return statistics.mean(values) if values else math.nan

    def shown(self, cell: Cell) -> str:
        """A table's cell: in-domain, deviation over the seeds, and (other domain)."""
        what = "cosine" if cell.model == "minilm" else "perplexity"
        python, manuals = (self.numbers(cell, f"{what} {domain}") for domain in ("python", "manuals"))
        if not python:
            return ""
        deviation = f" ± {digits(statistics.stdev(python), cell)}" if len(python) > 1 else ""
        return f"{digits(statistics.mean(python), cell)}{deviation} ({digits(statistics.mean(manuals), cell)})"


def digits(value: float, cell: Cell) -> str:
    if cell.model == "minilm":
        return f"{value:.3f}"
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def pattern(layout: str, at: float | None) -> str:
    return Cell("", "", layout, "", at).pattern


def table(header: list[str], rows: list[list[str]]) -> str:
    rows = [row for row in rows if any(row[1:])]
    lines = [header, ["---"] * len(header), *rows] if rows else []
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


# ---- one table each


def grid(results: Results, model: str) -> str:
    rows = []
    for layout, at in PATTERNS:
        cells = [Cell("grid", model, layout, method, at) for method in MASKS]
        found = [row for cell in cells for row in results.rows(cell)]
        size = f"{found[0]['bytes'] / found[0]['dense_bytes']:.0%}" if found else ""
        rows.append([f"`{pattern(layout, at)}`", size, *map(results.shown, cells)])
    return table(["layout", "bytes", *(f"`{method}`" for method in MASKS)], rows)


def chains(results: Results, model: str) -> str:
    columns = [*CHAINED, ("CSR()", 0.5)]
    rows = []
    for method in (*MASKS[1:], *CHAINS, RECONSTRUCTED):
        cells = [Cell("chains", model, layout, method, at) for layout, at in columns]
        rows.append([f"`{method}`", *map(results.shown, cells)])
    for steps in STEPS[model]:
        cells = [Cell("distill", model, layout, BEST, at, layout[0] == "V", steps) for layout, at in columns]
        rows.append([f"`{BEST}`, then {steps} steps of `distill`", *map(results.shown, cells)])
        both = [replace(cell, domain="both") for cell in cells]
        rows.append([f"the same, distilled on both domains, {steps} steps", *map(results.shown, both)])
    return table(["method", *(f"`{pattern(layout, at)}`" for layout, at in columns)], rows)


def permuted(results: Results, model: str) -> str:
    rows = []
    for layout, at in PERMUTED:
        for method in ("Wanda()", BEST):
            without = Cell("", model, layout, method, at)
            cells = without, replace(without, permute=True)
            kept = " → ".join(f"{share:.4f}" for row in results.rows(cells[1])[:1] for share in row["kept"])
            rows.append([f"`{pattern(layout, at)}`, `{method}`", *map(results.shown, cells), kept])
    return table(["", "as it is", "permuted", "score kept, mean over the weights"], rows)


def others(results: Results, model: str) -> str:
    rows = []
    for cell in planned(1):
        if cell.group in ("dsnot", "allocation", "domains") and cell.model == model and results.rows(cell):
            at = f"`{cell.layout}`, `sten.{cell.sparsity}`" if isinstance(cell.sparsity, str) else f"`{cell.pattern}`"
            rows.append([at, f"`{cell.method}`", cell.domain, results.shown(cell)])
    return table(["layout", "method", "calibrated on", "quality"], rows)


def rates(results: Results) -> str:
    """Other learning rates and batches of distillation."""
    rows: dict[str, list[str]] = {}
    for cell in tried():
        what = f"`{cell.method}`, {cell.steps} steps, batches of {cell.batch}, lr {cell.lr:g}"
        rows.setdefault(what, [what]).append(results.shown(cell))
    return table(["distilled on both domains", "`CSR() 50%`", "`NM(2, 4)`"], list(rows.values()))


def speeds(device: str, model: str) -> str:
    path = RESULTS / f"one_shot_speed_{device}.json"
    content = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    rows, columns = [], [c for c in SPEEDS if any(c in row for row in content["rows"].values())]
    for key, row in content["rows"].items():
        kind, _, name = key.partition(" | ")
        if kind == model and "error" not in row:
            rows.append([f"`{name}`", *(f"{row[c]['ratio']:.2f}" if c in row else "" for c in columns)])
    return table(["", *columns], rows)


def targets(results: Results) -> Iterator[tuple[str, bool | None, str]]:
    """(what is wanted, whether it holds or None if it was not measured, the numbers)."""

    def of(layout: str, method: str, at=None, model="smollm2", **more) -> float:
        return results.increase(Cell("", model, layout, method, at, **more))

    def least(values: list[float]) -> float:
        return min((v for v in values if not math.isnan(v)), default=math.nan)

    def says(what: str, value: float, holds: Callable[[float], bool], form: str = ".1%"):
        return what, None if math.isnan(value) else holds(value), "" if math.isnan(value) else format(value, form)

    for model in ("smollm2", "minilm"):
        for layout, at in (("CSR()", 0.5), ("NM(2, 4)", None)):
            found = [of(layout, method, at, model) for method in reversed(MASKS)]
            known = not any(map(math.isnan, found))
            numbers = " < ".join(f"{v:.3f}" for v in found) if known else ""
            yield (
                f"{model}, {pattern(layout, at)}: SparseGPT < Wanda < Magnitude",
                found == sorted(found) if known else None,
                numbers,
            )
    wanda = of("NM(2, 4)", "Wanda()")
    updates = [f"chain({first}, {update}())" for first in MASKS[1:] for update in ("ADMM", "LeastSquares")]
    removed = {
        "SparseGPT removes 45 % of Wanda's loss increase at 2:4": (0.45, [of("NM(2, 4)", "SparseGPT()")]),
        "a weight update 60 %": (0.60, [of("NM(2, 4)", method) for method in updates]),
        "the best chain without gradient steps 64 %": (0.64, [of("NM(2, 4)", method) for method in CHAINS]),
        "with reconstruction 66 %": (0.66, [of("NM(2, 4)", RECONSTRUCTED)]),
        "with at most 100 steps of distillation 78 %": (
            0.78, [of("NM(2, 4)", BEST, steps=steps) for steps in STEPS["smollm2"] if steps <= 100]),
    }  # fmt: skip
    for what, (share, values) in removed.items():
        yield says(what, 1 - least(values) / wanda, lambda v, share=share: v >= share)
    for method in MASKS[1:]:
        ratio = of("NM(16, 32)", method) / of("CSR()", method, 0.5)
        yield says(f"16:32 costs at most 25 % more than CSR 50 %, {method}", ratio - 1, lambda v: v <= 0.25)
    dense = results.dense.get("smollm2", {}).get("perplexity python", math.nan)
    best = least([of("NM(16, 32)", BEST, steps=steps) for steps in STEPS["smollm2"] if steps <= 100])
    limit = math.log(17 / 13.3)  # the target's two numbers are those of another text
    yield says(
        "16:32, best chain and 100 steps: loss increase below ln(17 / 13.3) = 0.245", best, lambda v: v < limit, ".3f"
    )
    vector = "VectorNM(2, 4, 32)"
    compensated = least([of(vector, m, permute=p) for m in (*CHAINS, RECONSTRUCTED) for p in (False, True)])
    yield says(
        "VectorNM 2:4 v=32: perplexity at most 150 with compensation",
        dense * math.exp(compensated),
        lambda v: v <= 150,
        ".1f",
    )
    trained = least([of(vector, BEST, permute=True, steps=steps) for steps in STEPS["smollm2"]])
    yield says("and at most 45 after 200 steps", dense * math.exp(trained), lambda v: v <= 45, ".1f")
    for model, method in (("smollm2", "Wanda()"), ("smollm2", "SparseGPT()"), ("minilm", "Wanda()")):
        gain = of("CSR()", method, 0.5, model) - of("CSR()", method, f"{SENSITIVITY}(0.5)", model)
        yield says(f"{model}: sensitivity beats uniform at 50 %, {method}, by", gain, lambda v: v > 0, ".3f")
    kept = [row["kept"] for row in results.cells.values() if "kept" in row]
    yield says(
        "permutation keeps no less: the least gain",
        min((b - a for a, b in kept), default=math.nan),
        lambda v: v >= 0,
        ".4f",
    )
    for model in ("smollm2", "minilm"):
        gain = of("CSR()", "Wanda()", 0.7, model) - of("CSR()", "chain(Wanda(), DSnoT())", 0.7, model)
        yield says(f"{model}: DSnoT improves Wanda at 70 %, by", gain, lambda v: v > 0, ".3f")
    for layout, at, wanted in (("CSR()", 0.5, 0.985), ("NM(2, 4)", None, 0.97)):
        texts = [{"steps": steps, "domain": domain} for steps in STEPS["minilm"] for domain in ("python", "both")]
        others = [results.increase(cell) for cell in tried() if cell.layout == layout]
        error = least([of(layout, BEST, at, "minilm", **text) for text in texts] + others)
        yield says(
            f"minilm, {pattern(layout, at)}: cosine {wanted} after at most 300 steps",
            1 - error,
            lambda v, w=wanted: v >= w,
            ".4f",
        )


def trained_layouts() -> str:
    """Of benchmarks/training/gpt.py --compare layouts: the loss by each method, and how fast the layout is.

    Times are of short runs, one at a time; the pattern that a method finds does not matter to them, so of the runs of a
    layout the least disturbed counts.
    """
    folder = ROOT / "benchmarks" / "training" / "results"
    paths = [folder / name for name in ("gpt-layouts.json", "gpt-layouts-times.json")]
    runs, timed = (json.loads(path.read_text())["results"] if path.exists() else {} for path in paths)
    methods = {"decaying ": "DecayingMask", "cast, teacher ": "CAST", "prune and grow ": "BlockPruneGrow"}
    layouts = dict.fromkeys(name.removeprefix(m) for name in runs for m in methods if name.startswith(m))
    times = {"pattern_": "ms a step in the final pattern", "forward_": "ms a forward pass"}

    def loss(name: str) -> str:
        losses = [run["loss"] for run in runs.get(name, [])]
        return f"{statistics.mean(losses):.3f}" if losses else ""

    def least(names: list[str], what: str) -> str:
        values = [run[f"{what}milliseconds"] for name in names for run in timed.get(name, [])]
        return f"{min(values):.1f}" if values else ""

    def row(title: str, losses: list[str], names: list[str]) -> list[str]:
        return [title, *(loss(name) for name in losses), *(least(names, what) for what in times)]

    rows = [row("dense", ["dense", "", ""], ["dense"])] if "dense" in runs else []
    rows += [row(layout, [m + layout for m in methods], [m + layout for m in methods]) for layout in layouts]
    return table(["", *methods.values(), *times.values()], rows)


def verdicts(results: Results) -> str:
    words = {True: "yes", False: "**no**", None: ""}
    return table(
        ["target", "holds", "measured"], [[what, words[holds], numbers] for what, holds, numbers in targets(results)]
    )


def head(results: Results) -> str:
    about = results.about
    if not about:
        return "Not measured yet."
    dense = ", ".join(f"{name} {value:.2f}" for name, value in results.dense.get("smollm2", {}).items())
    versions = f"{about['device']}, torch {about['torch']}, sten {about['sten']}"
    return (
        f"{versions}; calibration with {about['sequences']} windows of 1024 tokens (SmolLM2) and {about['passages']} "
        f"passages (MiniLM); SmolLM2 dense: {dense or 'not measured yet'}. Cells without a number were not run."
    )


def tables(results: Results) -> dict[str, str]:
    """{name of a marker: Markdown}."""
    image = "![Perplexity of SmolLM2 against its speed, for every layout and method]"
    drawn = (ROOT / "docs" / "images" / "pruning.svg").exists()
    found = {"picture": f"{image}(images/pruning.svg)", "picture readme": f"{image}(docs/images/pruning.svg)"}
    found = {name: text if drawn else "" for name, text in found.items()} | {
        "head": head(results),
        "targets": verdicts(results),
    }
    found |= {"trained layouts": trained_layouts(), "rates": rates(results)}
    for model in ("smollm2", "minilm"):
        found |= {f"{f.__name__} {model}": f(results, model) for f in (grid, chains, permuted, others)}
        found |= {f"speed {device} {model}": speeds(device, model) for device in ("cuda", "cpu")}
    return found


def filled(page: str, found: dict[str, str]) -> str:
    """The page with what stands between <!-- name --> and <!-- end --> replaced."""

    def put(match: re.Match) -> str:
        return "\n".join(filter(None, [f"<!-- {match[1]} -->", found[match[1]], "<!-- end -->"]))

    return re.sub(r"<!-- ([a-z0-9 ]+) -->\n.*?<!-- end -->", put, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "one_shot.json")
    parser.add_argument("--docs", action="store_true", help="write the pages")
    arguments = parser.parse_args()
    found = tables(Results(arguments.results))
    if arguments.docs:
        for page in (ROOT / "README.md", ROOT / "docs" / "pruning.md", ROOT / "docs" / "training.md"):
            page.write_text(filled(page.read_text(), found))
        return
    for name, text in found.items():
        print(f"\n## {name}\n{text}")


if __name__ == "__main__":
    main()
