"""Methods of sparse training on real digits (scikit-learn's, 8x8): accuracy on held-out images, mean and spread over
seeds.

    python benchmarks/training/digits.py --model mlp --seeds 3 --out results.json

A wide MLP (64-256-256-10) or a small conv net; every method gets the same steps, batches and learning rate schedule.
The last layer stays dense. Raises if the finalized model does not have the requested density.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
from recipes import Recipe, Run, picture, recipes
from sklearn.datasets import load_digits
from torch import nn

import sten


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and test images and classes; every fourth image is held out."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    held = torch.arange(len(x)) % 4 == 0
    return x[~held], y[~held], x[held], y[held]


def make(kind: str, width: float) -> nn.Sequential:
    if kind == "mlp":
        hidden = round(256 * width)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )
    channels = round(32 * width)
    convs = [
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    more = [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*convs, *more, nn.Linear(4 * channels, 10))


def train(recipe: Recipe, kind: str, seed: int, steps: int, sets) -> dict:
    """One run: test accuracy and loss, density, seconds."""
    x, y, test_x, test_y = sets
    torch.manual_seed(seed)
    model = make(kind, recipe.width)
    last = len(model) - 1
    first = "0." if kind == "conv" else "-"
    chosen = lambda name, module, attribute: attribute == "weight" and not name.startswith((f"{last}.", first))  # noqa: E731
    run = Run(recipe, model, steps, chosen, lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, steps)
    draw, began = torch.Generator().manual_seed(seed), time.perf_counter()
    for step in range(steps):
        run.before(step)
        index = torch.randint(len(x), (64,), generator=draw)
        run.loss(model(x[index]), y[index], x[index]).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - began
    model, density = run.finish()
    requested = 1.0 if recipe.method is None else recipe.layout.rate or 1 - recipe.sparsity.sparsity
    if abs(density - requested) > 0.02:
        raise RuntimeError(f"Expected a finalized model of density {requested:.3f}, got {density:.3f}.")
    with torch.no_grad():
        logits = model.eval()(test_x)
    accuracy = float((logits.argmax(1) == test_y).float().mean())
    return {
        "accuracy": accuracy,
        "loss": float(nn.functional.cross_entropy(logits, test_y)),
        "density": density,
        "seconds": seconds,
    }


def spread(runs: list[dict], key: str) -> tuple[float, float]:
    values = [run[key] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["mlp", "conv"], default="mlp")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", default="", help="comma-separated beginnings of recipe names")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/training/results/digits-mlp.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sets, results = data(), {}
    wanted = tuple(args.only.split(",")) if args.only else ("",)
    for name, recipe in recipes(sten.CSR()).items():
        if not name.startswith(wanted) or (args.model == "conv" and "small" in name and "80" not in name):
            continue
        results[name] = [train(recipe, args.model, seed, args.steps, sets) for seed in range(args.seeds)]
        (mean, deviation), (loss, _), (seconds, _) = (
            spread(results[name], key) for key in ("accuracy", "loss", "seconds")
        )
        print(
            f"{name:18} {100 * mean:6.2f} +- {100 * deviation:4.2f} %   loss {loss:.4f}   {seconds:5.1f} s", flush=True
        )
    metadata = {
        "model": args.model,
        "steps": args.steps,
        "cpu": platform.processor(),
        "torch": torch.__version__,
        "sten": "0.1.0",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"about": metadata, "results": results}, indent=1))
    shown = {name: [100 * run["accuracy"] for run in runs] for name, runs in results.items()}
    picture(shown, "test accuracy, %", args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
