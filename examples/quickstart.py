"""The main job: train digits dense, sparsify to 90 %, fine-tune in the pattern, save, load, compare."""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

import sten


def digits():
    """(train x, train y, test x, test y); pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split((images / 16.0).astype("float32"), labels, test_size=0.25, random_state=0, stratify=labels)
    return [torch.from_numpy(part) for part in parts]


def mlp(width):
    wide = [nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Linear(64, width), *wide, nn.Linear(width, 10))


def train(model, optimizer, data, epochs, title):
    """An ordinary loop: nothing in it knows about sparsity."""
    x, _, y, _ = data
    for _ in tqdm(range(epochs), desc=f"{title:20}", unit="epoch"):
        for rows in torch.randperm(len(x)).split(128):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def sparse_copy(dense, layout, sparsity, data, epochs, title):
    """A copy of the dense model, sparsified (all but the last layer) and fine-tuned in its pattern."""
    model = copy.deepcopy(dense)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sten.sparsify(model, layout={"6.weight": None, "*": layout}, sparsity=sparsity, optimizer=optimizer)
    return sten.finalize(train(model, optimizer, data, epochs, title))


@torch.inference_mode()
def accuracy(model, data):
    return float((model(data[1]).argmax(1) == data[3]).float().mean())


@torch.inference_mode()
def latencies(models, x, repeats):
    """Median milliseconds a call, the models in turn, so that a noisy machine is noisy for all of them."""
    times = []
    for model in (repeats + 2) * models:
        start = time.perf_counter()
        model(x)
        times.append((time.perf_counter() - start) * 1e3)
    return [sorted(times[2 * len(models) + i :: len(models)])[repeats // 2] for i in range(len(models))]


def table(dense, sparse, data, files, repeats):
    """Print the comparison, losses shown as losses; returns (speed-up at 1024 samples, accuracy)."""
    (a, b), (c, d) = [accuracy(m, data) for m in (dense, sparse)], [f.stat().st_size for f in files]
    print(f"\n{'':22}{'dense':>12}{'sparse':>12}")
    print(f"{'test accuracy':22}{a:>12.2%}{b:>12.2%}    {100 * (b - a):+.2f} points")
    print(f"{'bytes on disk':22}{c:>12,}{d:>12,}    {c / d:.1f}x smaller")
    for samples in (1, 16, 1024):
        slow, fast = latencies((dense, sparse), data[0].repeat(2, 1)[:samples], repeats)
        says = f"{slow / fast:.2f}x {'faster' if slow >= fast else '(SLOWER than dense)'}"
        print(f"{f'latency, {samples} samples':22}{slow:>9.3f} ms{fast:>9.3f} ms    {says}")
    return slow / fast, b


def picture(weight, results, path):
    """Left: a corner of the pattern. Right: accuracy against speed-up across layouts."""
    from matplotlib.figure import Figure

    left, right = (fig := Figure(figsize=(12, 4.5))).subplots(1, 2)
    left.imshow(weight.mask()[:80, :160], cmap="Greys", interpolation="nearest")
    left.set(title=f"Stored entries of {weight.sparse_layout}", xlabel="input", ylabel="output")
    for name, (speed, score) in results.items():
        right.scatter(speed, 100 * score)
        right.annotate(name, (speed, 100 * score), textcoords="offset points", xytext=(5, 4), fontsize=8)
    right.set(title="The trade-off", xlabel="speed-up over dense, 1024 samples", ylabel="test accuracy, %")
    fig.savefig(path, dpi=120, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of a minute: checks that it runs")
    parser.add_argument("--out", type=Path, default=Path("."), help="where the models and the picture go")
    args = parser.parse_args()
    width, epochs, repeats = (96, 1, 3) if args.tiny else (1024, 20, 20)
    files = [args.out / f"quickstart_{name}.safetensors" for name in ("dense", "model")]
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data, dense, layout = digits(), mlp(width), sten.GroupedNM(1, 10, 8)

    train(dense, torch.optim.AdamW(dense.parameters(), lr=1e-3), data, epochs, "dense")
    sparse = sparse_copy(dense, layout, None, data, epochs, "GroupedNM(1, 10, 8)")
    print(sten.summary(sparse), sten.which("linear", (1024, width), sparse[2].weight), sep="\n\n")
    sten.save(dense, files[0])
    sten.save(sparse, files[1])
    sparse = sten.load(mlp(width), files[1])
    results = {str(layout): table(dense, sparse, data, files, repeats), "dense": (1.0, accuracy(dense, data))}
    for name, other, rate in ("CSR 90 %", sten.CSR(), 0.9), ("GroupedNM(1, 4, 16)", sten.GroupedNM(1, 4, 16), None):
        model = sparse_copy(dense, other, rate, data, epochs, name)
        slow, fast = latencies((dense, model), data[0].repeat(2, 1)[:1024], repeats)
        results[name] = slow / fast, accuracy(model, data)
    picture(sparse[2].weight, results, args.out / "quickstart.png")
    print(f"\nWrote {files[1]} and {args.out / 'quickstart.png'}.")


if __name__ == "__main__":
    main()
