"""Prune two pre-trained models in one shot, every layout by every method, and say how good they are.

    python benchmarks/pruning/pack.py benchmarks/pruning/pack       # once: the models and the text
    python benchmarks/pruning/one_shot.py --device cuda             # all cells; goes on where it stopped
    python benchmarks/pruning/one_shot.py --cells grid --budget 500
    python benchmarks/pruning/one_shot.py --cells 'smollm2 | NM(2, 4) | *' --list

A GPU has room for several at a time; each begins with a copy of what there is:

    for i in 0 1 2 3; do python benchmarks/pruning/one_shot.py --shard $i/4 --out part$i.json & done; wait
    python benchmarks/pruning/one_shot.py --join part?.json

Everything goes through the public API, in float32 without TF32. A cell is calibrated on one domain of text and
evaluated on held-out text of both. The JSON is written after every cell, and cells that it has are skipped; cells that
differ in distillation alone are pruned once. --tiny runs on small random models and needs no pack.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import torch
from cells import Cell, bytes_of, chosen, chosen_weights, evaluated, settings
from models import FOLDER, PAD, Pack, cosine, embeddings, masked, perplexity, rank_correlation
from torch import Tensor, nn

import sten

RESULTS = Path(__file__).parents[1] / "results" / "one_shot.json"
DOMAINS = ("python", "manuals")


class Bench:
    """The dense models, their text and what is known of them, on one device."""

    def __init__(self, pack, arguments) -> None:
        self.pack, self.arguments, self.device = pack, arguments, arguments.device
        self.dense: dict[str, nn.Module] = {}
        self.expected: dict[str, Tensor] = {}  # MiniLM's embeddings
        self.last: tuple[Cell, nn.Module, dict] | None = None  # what was pruned last, which cells that distill share

    def model(self, name: str) -> nn.Module:
        if name not in self.dense:
            self.dense[name] = self.pack.model(name).to(self.device).requires_grad_(False)
        return self.dense[name]

    def text(self, cell: Cell, count: int, seed: int) -> Tensor:
        """Rows of calibration text; of "both" domains every other row."""
        draw = self.pack.windows if cell.model == "smollm2" else self.pack.passages
        if cell.domain != "both":
            return draw(cell.domain, count, seed=seed)
        halves = [draw(domain, -(-count // 2), seed=seed) for domain in DOMAINS]
        return torch.stack(halves, 1).flatten(0, 1)[:count]

    def batches(self, cell: Cell, count: int, size: int, seed: int) -> list[dict[str, Tensor]]:
        """What the model is called with, for calibration and distillation; passages with others of their length."""
        parts = self.text(cell, count, seed)
        if cell.model == "minilm":
            parts = parts[(parts != PAD).sum(1).argsort(stable=True)].split(size)
            order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
            inputs = [masked(parts[i]) for i in order]
        else:
            inputs = [{"input_ids": part} for part in parts.split(size)]
        return [{name: t.to(self.device) for name, t in each.items()} for each in inputs]

    def quality(self, name: str, model: nn.Module) -> dict[str, float]:
        """Perplexity, or cosine and rank correlation with the dense model, on held-out text of each domain."""
        result = {}
        for domain in DOMAINS:
            held = self.pack.held_out(name, domain)[: self.arguments.windows or None]
            if name == "smollm2":
                result[f"perplexity {domain}"] = perplexity(model, held)
                continue
            if domain not in self.expected:
                self.expected[domain] = embeddings(self.model(name), held)
            got = embeddings(model, held)
            result[f"cosine {domain}"] = cosine(got, self.expected[domain])
            result[f"rank {domain}"] = rank_correlation(got, self.expected[domain])
        return result

    def pruned(self, cell: Cell) -> tuple[nn.Module, dict]:
        """A copy of the dense model that was permuted and pruned, and what was measured of that."""
        cell, clock = cell.before_distillation, Clock(self.device, seconds := {})
        if self.last is None or self.last[0] != cell:
            self.last, model, report = None, copy.deepcopy(self.model(cell.model)), {}
            count, size = (self.arguments.sequences, 2) if cell.model == "smollm2" else (self.arguments.passages, 32)
            batches = self.batches(cell, count, size, cell.seed)
            if cell.permute:
                with clock("permute"):
                    done = sten.permute(model, evaluated(cell.layout), cell.sparsity, calibration=batches)
                report = {"kept": [statistics.mean(getattr(row, f"kept_{when}") for row in done.rows)
                                   for when in ("before", "after")]}  # fmt: skip
            with clock("choose"):
                given = settings(cell, model, batches)
            with clock("prune"):
                sten.sparsify(model, **given)
            self.last = cell, model, {**report, "seconds": seconds}
        return copy.deepcopy(self.last[1]), copy.deepcopy(self.last[2])

    def run(self, cell: Cell) -> dict:
        """One cell, from a copy of the dense model: quality, bytes, seconds of each step."""
        torch.manual_seed(cell.seed)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        dense = self.model(cell.model)
        model, report = self.pruned(cell)
        if cell.steps:
            size = cell.batch or (2 if cell.model == "smollm2" else 32)
            batches = self.batches(cell, cell.steps * size, size, cell.seed + 1000)
            with Clock(self.device, report["seconds"])("distill"):
                distilled(cell, model, dense, batches)
        quality, (stored, whole) = self.quality(cell.model, model), bytes_of(model, chosen_weights(dense))
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else 0
        return {**quality, **report, "bytes": stored, "dense_bytes": whole, "peak_bytes": peak}


def distilled(cell: Cell, model: nn.Module, dense: nn.Module, batches: list[dict]) -> None:
    """Train the sparse weights, biases and norms towards the dense model; embeddings stay as they are."""
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    features = 1.0 if cell.model == "minilm" else 0.0
    sten.distill(model, dense, batches, steps=cell.steps, lr=cell.lr, features=features)


class Clock:
    """with clock("name"): seconds of it, the device's work included."""

    def __init__(self, device: str, seconds: dict[str, float]) -> None:
        self.device, self.seconds = device, seconds

    def __call__(self, name: str) -> Clock:
        self.name = name
        return self

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> None:
        self.began = self.now()

    def __exit__(self, *_) -> None:
        self.seconds[self.name] = round(self.now() - self.began, 2)


def about(arguments, pack) -> dict:
    cuda = arguments.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "sten": sten.__version__,
        "sequences": arguments.sequences,
        "passages": arguments.passages,
        "windows": arguments.windows or "all",
        "processes": int(arguments.shard.partition("/")[2]),  # at the same time, so seconds are not of one alone
        "text": pack.about,
    }


def save(path: Path, content: dict) -> None:
    """Whole or not at all, so that a run that is cut off leaves the file of the cell before."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)


def says(result: dict, dense: dict) -> str:
    if "error" in result:
        return result["error"]
    numbers = {name: value for name, value in result.items() if name in dense}
    losses = [f"dL {math.log(v / dense[n]):.3f}" for n, v in numbers.items() if n.startswith("perplexity")]
    took = " + ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items() if value > 0.1)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    return f"{shown}  {'  '.join(losses)}  {result['bytes'] / result['dense_bytes']:.0%} of the bytes  {took}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=FOLDER)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cells", nargs="*", default=[], help="groups, models or globs of names; all if not given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=16, help="of 1024 tokens, for calibration of SmolLM2")
    parser.add_argument("--passages", type=int, default=512, help="for calibration of MiniLM")
    parser.add_argument("--windows", type=int, default=0, help="evaluate on the first so many only")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no cell starts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="print the cells that are missing")
    parser.add_argument("--retry", action="store_true", help="cells that failed, again")
    parser.add_argument("--tiny", action="store_true", help="small random models and random tokens")
    parser.add_argument(
        "--shard", default="0/1", help="i/n: every n-th pruned model only, for n processes with files of their own"
    )
    parser.add_argument("--join", nargs="+", type=Path, help="put the cells of these files into --out; measure nothing")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="sten:")
    torch.set_float32_matmul_precision("highest")
    content = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"dense": {}, "cells": {}}
    if arguments.join:
        for path in arguments.join:
            part = json.loads(path.read_text())
            content = {**content, **part, **{key: content[key] | part[key] for key in ("dense", "cells")}}
        save(arguments.out, content)
        return
    shard, shards = map(int, arguments.shard.split("/"))
    done = {name for name, row in content["cells"].items() if not (arguments.retry and "error" in row)}
    groups: dict[Cell, list[Cell]] = {}
    for cell in chosen(arguments.seeds, arguments.cells):
        if cell.name not in done:
            groups.setdefault(cell.before_distillation, []).append(cell)
    wanted = [cell for group in list(groups.values())[shard::shards] for cell in group]
    if arguments.list:
        print(*(cell.name for cell in wanted), f"{len(wanted)} cells", sep="\n")
        return
    if arguments.tiny:
        from tiny import Tiny

        pack = Tiny()
    else:
        pack = Pack(arguments.pack)
    bench, began = Bench(pack, arguments), time.perf_counter()
    content["about"] = about(arguments, pack)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for cell in wanted:
        if time.perf_counter() - began > arguments.budget:
            print(f"The budget is spent; the same command goes on with {cell.name}.")
            break
        if cell.model not in content["dense"]:
            content["dense"][cell.model] = bench.quality(cell.model, bench.model(cell.model))
            print(f"{cell.model} dense  {content['dense'][cell.model]}", flush=True)
        try:
            result = bench.run(cell)
        except (ValueError, TypeError, RuntimeError, AttributeError, NameError) as problem:  # a result, too
            result = {"error": f"{type(problem).__name__}: {problem}"}
        content["cells"][cell.name] = {**dataclasses.asdict(cell), **result}
        save(arguments.out, content)
        print(f"{cell.name}  {says(result, content['dense'][cell.model])}", flush=True)


if __name__ == "__main__":
    main()
