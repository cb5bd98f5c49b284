"""One picture of quality against speed, from the JSON of one_shot.py and speed.py: docs/images/pruning.svg and .png.

    python benchmarks/pruning/picture.py

A vertical line is a layout, a point on it a method: the higher methods on a line differ in quality alone. Lower and
further to the right is better. int8 and int4 are rounded to nearest, without calibration.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from cells import MASKS, RECONSTRUCTED, Cell, chosen
from report import RESULTS, ROOT, Results

MOST = 300.0  # perplexity: what lies above is drawn at the edge
PANELS = (
    ("cuda", "decode 1", "decode, 1 sequence"),
    ("cuda", "prefill 8x1024", "prefill, 8 x 1024 tokens"),
    ("cpu", "decode 1", "decode, 1 sequence"),
    ("cpu", "prefill 1x512", "prefill, 512 tokens"),
)
KINDS = {  # legend: (colour, marker)
    "Magnitude": ("#bbbbbb", "x"),
    "Wanda": ("#88bbdd", "v"),
    "SparseGPT": ("#2277bb", "s"),
    "chain without gradients": ("#ee9933", "D"),
    "chain with Reconstruct": ("#cc5511", "P"),
    "chain, then distill": ("#228833", "o"),
}


def kind(cell: Cell) -> str:
    if cell.steps:
        return "chain, then distill"
    if cell.method in MASKS:
        return cell.method.removesuffix("()")
    return "chain with Reconstruct" if cell.method == RECONSTRUCTED else "chain without gradients"


def points(results: Results, speeds: dict, what: str, domain: str) -> dict[str, list[tuple[float, float, str]]]:
    """{layout: (speed, perplexity, kind)}, the best of each kind, a mean over the seeds."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for cell in chosen(1, ["grid", "chains", "permute", "distill"]):
        row = speeds.get(f"smollm2 | {cell.pattern}", {})
        if cell.model != "smollm2" or what not in row:
            continue
        values = results.numbers(cell, f"perplexity {domain}")
        if not values:
            continue
        point = row[what]["ratio"], statistics.mean(values)
        key = cell.pattern, kind(cell)
        if key not in best or point[1] < best[key][1]:
            best[key] = point
    found: dict[str, list] = {}
    for (pattern, name), (x, y) in best.items():
        found.setdefault(pattern, []).append((x, y, name))
    return found


def short(pattern: str) -> str:
    """A layout's name as a label: "VectorNM(2, 4, 32)" becomes "VectorNM 2:4 v=32"."""
    name, _, rest = pattern.partition("(")
    inside, _, at = rest.rpartition(")")
    numbers = [part for part in inside.replace("(", "").replace(")", "").split(",") if part.strip()]
    if name == "BSR":
        return f"BSR {numbers[0]}{at}"
    if len(numbers) >= 2:
        last = f" {'v=' if name == 'VectorNM' else 'g='}{numbers[2].strip()}" if len(numbers) > 2 else ""
        return f"{name} {numbers[0]}:{numbers[1].strip()}{last}"
    return f"{name}{at}"


def panel(axis, results: Results, speeds: dict, what: str, title: str, domain: str) -> None:
    dense = results.dense["smollm2"][f"perplexity {domain}"]
    labels = [(1.0, dense, "dense")]
    axis.plot(1.0, dense, "*", color="black", markersize=13, zorder=4)
    for name in ("dense-bfloat16", "int8", "int4"):
        row = speeds.get(f"smollm2 | {name}", {})
        if what in row:
            x, y = row[what]["ratio"], row["quality"][f"perplexity {domain}"]
            axis.plot(x, min(y, MOST), "*", color="#aa3377", markersize=13, zorder=4)
            labels.append((x, y, name.replace("-", " ")))
    for pattern, found in points(results, speeds, what, domain).items():
        x, heights = found[0][0], [min(y, MOST) for _, y, _ in found]
        axis.plot([x, x], [min(heights), max(heights)], "-", color="#dddddd", linewidth=1.2, zorder=1)
        for _, y, name in found:
            colour, marker = KINDS[name]
            axis.plot(x, min(y, MOST), marker, color=colour, markersize=6, zorder=3, clip_on=False)
        labels.append((x, min(heights), short(pattern)))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.axhline(dense, color="black", linewidth=0.6, linestyle=":")
    axis.set_ylim(dense * 0.33, MOST * 1.05)
    low, high = axis.get_xlim()
    axis.set_xlim(low / 1.05, high * 1.05)
    place(axis, labels, dense)
    ticks = [t for t in (0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 8) if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    ticks = [t for t in (10, 15, 20, 30, 50, 100, 200) if t >= dense * 0.9] + [MOST]
    axis.set_yticks(ticks, [*(f"{t:g}" for t in ticks[:-1]), f"≥{MOST:g}"])
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("times faster than dense")
    axis.grid(color="#f0f0f0")
    axis.set_axisbelow(True)


def place(axis, labels: list[tuple[float, float, str]], dense: float) -> None:
    """Names in a row below the dense line, slanted, from left to right, with a thin line to what they name."""
    low, high = (math.log(x) for x in axis.get_xlim())
    labels = sorted(labels)
    step = (high - low) / (len(labels) + 1)
    for number, (x, y, text) in enumerate(labels, 1):
        at = math.exp(low + number * step)
        axis.plot([x, at], [min(y, MOST) * 0.985, dense * 0.83], "-", color="#cccccc", linewidth=0.6, zorder=0)
        axis.text(at, dense * 0.81, text, fontsize=7, rotation=-55, ha="left", va="top", rotation_mode="anchor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "one_shot.json")
    parser.add_argument("--speeds", type=Path, default=RESULTS, help="folder of one_shot_speed_<device>.json")
    parser.add_argument("--domain", default="python", help="of the held-out text")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "pruning")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sten"  # the same file for the same numbers
    from matplotlib import pyplot as plt

    results, wanted = Results(arguments.results), []
    for device, what, title in PANELS:
        path = arguments.speeds / f"one_shot_speed_{device}.json"
        content = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        if any(what in row for row in content["rows"].values()):
            about = content["about"]
            where = f"{about['device']}, bfloat16" if device == "cuda" else f"CPU, {about['threads']} threads, float32"
            wanted.append((content["rows"], what, f"{title} ({where})"))
    if not wanted:
        raise SystemExit(f"Expected the results of benchmarks/pruning/speed.py in {arguments.speeds}, got none.")
    rows, columns = -(-len(wanted) // 2), min(len(wanted), 2)
    figure, axes = plt.subplots(rows, columns, figsize=(6.4 * columns, 5.2 * rows), squeeze=False)
    for axis, (speeds, what, title) in zip(axes.flat, wanted, strict=False):
        panel(axis, results, speeds, what, title, arguments.domain)
    for axis in axes.flat[len(wanted) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("perplexity on held-out text")
    marks = [plt.Line2D([], [], color=c, marker=m, linestyle="", label=name) for name, (c, m) in KINDS.items()]
    marks += [plt.Line2D([], [], color=c, marker="*", linestyle="", markersize=11, label=name)
              for name, c in (("dense", "black"), ("quantized", "#aa3377"))]  # fmt: skip
    figure.legend(handles=marks, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle("SmolLM2-135M-Instruct, pruned in one shot: quality against speed", fontsize=12)
    figure.tight_layout(rect=(0, 0.09 / rows, 1, 1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".svg", ".png"):
        date = {"metadata": {"Date": None}} if suffix == ".svg" else {}
        figure.savefig(arguments.out.with_suffix(suffix), dpi=150, **date)
        print(f"wrote {arguments.out.with_suffix(suffix)}")


if __name__ == "__main__":
    main()
