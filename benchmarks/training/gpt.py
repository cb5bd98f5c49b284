"""Methods of sparse training on a byte-level GPT and a corpus that every machine has: Python's own standard library.

    python benchmarks/training/gpt.py --device cuda --size 25m --seconds 120 --seeds 2 --out gpt.json

The files are split into training and validation by a hash of their names. Every method gets the same number of steps,
which the dense model's speed and --seconds decide (or --steps). The linear layers of the blocks are sparse; embeddings
and head stay dense. Results are written after every run, and with --resume runs that the file has are skipped. Raises
if a finalized model does not have the requested density. --workers trains several models at the same time, spread over
all GPUs: the losses are the same, the times of a step are then meaningless. --compare layouts trains the layouts that
are fast on a GPU by a few methods, and times what comes of it as well: a step in the fixed pattern, and the forward
pass:

    python benchmarks/training/gpt.py --device cuda --compare layouts --size 25m --steps 1000 --batch 32 --seeds 1 \\
        --resume --budget 500 --out benchmarks/training/results/gpt-layouts.json
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import re
import statistics
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from recipes import Recipe, Run, layout_recipes, picture, recipes
from torch import Tensor, nn
from torch.nn import functional as F

import sten

SIZES = {
    "tiny": (64, 2, 2, 64),
    "10m": (384, 6, 6, 256),
    "25m": (512, 8, 8, 256),
    "85m": (768, 12, 12, 512),
}  # width, layers, heads, context


def corpus() -> tuple[Tensor, Tensor]:
    """(training, validation) bytes; about a tenth of the files is held out."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts):
        name = str(path.relative_to(root))
        parts[hashlib.sha256(name.encode()).digest()[0] < 26].append(path.read_bytes())
    train, held = (torch.frombuffer(bytearray(b"\n".join(parts[k])), dtype=torch.uint8) for k in (False, True))
    return train, held


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for name, param in self.named_parameters():
            if param.dim() > 1:
                nn.init.normal_(
                    param, std=0.02 / (math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 1)
                )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(x) + self.position.weight[: x.shape[1]])))


def in_blocks(name: str, module: nn.Module, attribute: str) -> bool:
    """The linear layers of the blocks."""
    return name.startswith("blocks.") and attribute == "weight" and isinstance(module, nn.Linear)


def make(size: str, width_factor: float) -> GPT:
    width, layers, heads, context = SIZES[size]
    narrow = max(round(width * width_factor / (2 * heads)), 1) * 2 * heads
    return GPT(narrow, layers, heads, context)


def draw(data: Tensor, batch: int, context: int, generator: torch.Generator, device) -> tuple[Tensor, Tensor]:
    start = torch.randint(len(data) - context - 1, (batch,), generator=generator)
    rows = data[start.unsqueeze(1) + torch.arange(context + 1)].long().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def validate(model: nn.Module, held: Tensor, args, context: int) -> float:
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(args.batches):
        x, y = draw(held, args.batch, context, generator, args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            losses.append(float(F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())))
    return statistics.mean(losses)


def train(recipe: Recipe, seed: int, steps: int, args, data: tuple[Tensor, Tensor]) -> dict:
    """One run: validation loss in nats a byte, perplexity, density, milliseconds a step, peak memory."""
    torch.manual_seed(seed)
    cuda, context = args.device == "cuda", SIZES[args.size][3]
    model = make(args.size, recipe.width).to(args.device)
    run = Run(recipe, model, steps, in_blocks, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    warm = max(steps // 20, 1)

    def rate(t: int) -> float:
        return min((t + 1) / warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(t / steps, 1))))

    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, rate)
    generator, began = torch.Generator().manual_seed(seed), time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        run.before(step)
        x, y = draw(data[0], args.batch, context, generator, args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=cuda):
            loss = run.loss(model(x), y, x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        schedule.step()
    last = float(loss)  # waits for the device
    took = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    model, density = run.finish()
    requested = 1.0 if recipe.method is None else recipe.layout.rate or 1 - recipe.sparsity.sparsity
    if abs(density - requested) > 0.02:
        raise RuntimeError(f"Expected a finalized model of density {requested:.3f}, got {density:.3f}.")
    loss = validate(model.eval(), data[1], args, context)
    numbers = {"loss": loss, "perplexity": math.exp(loss), "train_loss": last, "density": density}
    if args.compare == "layouts":
        numbers |= in_pattern(model, args, data[0])
    return {**numbers, "milliseconds": 1000 * took / steps, "peak_bytes": peak, "steps": steps, "seed": seed}


def in_pattern(model: nn.Module, args, data: Tensor, steps: int = 20) -> dict[str, float]:
    """Milliseconds of a training step with the pattern that the run ended with, and of a forward pass."""
    cuda = args.device == "cuda"
    x, y = draw(data, args.batch, SIZES[args.size][3], torch.Generator().manual_seed(0), args.device)

    def forward() -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=cuda):
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def milliseconds(call) -> float:
        for number in range(5 + steps):
            if number == 5:
                float(forward())  # waits for the device
                began = time.perf_counter()
            call()
        float(forward())
        return 1000 * (time.perf_counter() - began) / steps

    with torch.no_grad():
        result = {"forward_milliseconds": milliseconds(forward)}
    sten.trainable(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=cuda)

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {**result, "pattern_milliseconds": milliseconds(step)}


def speed(args, data) -> int:
    """How many steps of the dense model fit into --seconds."""
    train(Recipe(), 0, 5, args, data)
    return max(int(args.seconds * 1000 / train(Recipe(), 0, 30, args, data)["milliseconds"]), 10)


def one(name: str, seed: int, steps: int, args) -> tuple[str, dict]:
    """A run in a process of its own: every worker draws a number and takes the GPU of that number."""
    warnings.simplefilter("ignore")
    if args.device == "cuda":
        torch.cuda.set_device(int(multiprocessing.current_process().name.split("-")[-1]) % torch.cuda.device_count())
    torch.set_num_threads(max(os.cpu_count() // args.workers, 1))
    return name, train(table(args)[name], seed, steps, args, corpus())


def trained(args, steps: int, stop: float, done: set[tuple[str, int]]) -> Iterator[tuple[str, dict]]:
    """Every wanted run that is not done, seed by seed in the table's order; none starts after `stop`."""
    wanted = tuple(re.split(",(?! )", args.only)) if args.only else ("",)
    runs = [(name, seed) for seed in range(args.seeds) for name in table(args) if name.startswith(wanted)]
    runs = [run for run in runs if run not in done]
    if args.workers == 1:
        data = corpus()
        for name, seed in runs:
            if time.perf_counter() < stop:
                yield name, train(table(args)[name], seed, steps, args, data)
        return
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, fresh) as pool:
        tasks = [pool.submit(one, name, seed, steps, args) for name, seed in runs]
        for task in concurrent.futures.as_completed(tasks):
            if not task.cancelled():
                yield task.result()
            if time.perf_counter() > stop:
                pool.shutdown(wait=False, cancel_futures=True)


def table(args) -> dict[str, Recipe]:
    if args.compare == "layouts":
        return layout_recipes(args.cast_decay)
    free = sten.Masked() if args.free == "masked" else sten.CSR()
    table = recipes(free, args.block, args.cast_decay, args.decay)
    # BLaST leaves attention dense.
    table["MLP blocks 80%"] = dataclasses.replace(table["blocks 80%"], layers=("up.weight", "down.weight"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=40, help="validation batches")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--free", choices=["masked", "csr"], default="masked", help="layout of unstructured patterns")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--cast-decay", type=float, default=3e-4)
    parser.add_argument("--decay", type=float, default=2e-4, help="of SR-STE")
    parser.add_argument("--compare", choices=["methods", "layouts"], default="methods")
    parser.add_argument("--resume", action="store_true", help="go on with what --out has, of the same steps")
    parser.add_argument("--only", default="", help="comma-separated beginnings of recipe names")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no new run starts")
    parser.add_argument("--workers", type=int, default=1, help="models trained side by side")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/training/results/gpt.json"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    began, data = time.perf_counter(), corpus()
    steps = args.steps or speed(args, data)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    metadata = {
        "device": device,
        "torch": torch.__version__,
        "size": args.size,
        "steps": steps,
        "batch": args.batch,
        "lr": args.lr,
    }
    metadata |= {
        "train_bytes": len(data[0]),
        "held_bytes": len(data[1]),
        "free": args.free,
        "block": args.block,
        "cast_decay": args.cast_decay,
        "decay": args.decay,
        "workers": args.workers,
    }
    print(metadata, flush=True)
    results: dict[str, list[dict]] = {}
    if args.resume and args.out.exists():
        results = json.loads(args.out.read_text())["results"]
    done = {(name, run["seed"]) for name, runs in results.items() for run in runs if run["steps"] == steps}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, result in trained(args, steps, began + args.budget, done):
        results.setdefault(name, []).append(result)
        args.out.write_text(json.dumps({"about": metadata, "results": results}, indent=1))
        memory = f"{result['peak_bytes'] / 2**20:7.0f} MiB" if result["peak_bytes"] else ""
        text = f"loss {result['loss']:.4f}  {result['milliseconds']:7.1f} ms a step {memory}"
        print(f"{name:20} seed {result['seed']}  {text}", flush=True)
    results = {name: results[name] for name in table(args) if name in results}  # not as they came in
    args.out.write_text(json.dumps({"about": metadata, "results": results}, indent=1))
    losses = {name: [run["loss"] for run in runs] for name, runs in results.items()}
    picture(losses, "validation loss, nats a byte", args.out.with_suffix(".png"))
    print()
    for name, runs in results.items():
        losses = [run["loss"] for run in runs]
        dense = statistics.mean(run["loss"] for run in results["dense"]) if "dense" in results else math.nan
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
        mean = statistics.mean(losses)
        worse = 100 * (math.exp(mean - dense) - 1)
        print(f"{name:20} loss {mean:.4f} +- {deviation:.4f}   perplexity {math.exp(mean):.3f}, {worse:+.1f} %")


if __name__ == "__main__":
    main()
