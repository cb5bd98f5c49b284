"""The main job in one file: train dense, sparsify to 90 %, fine-tune in the pattern, save, load, compare.

Real data that ships with scikit-learn (8x8 digits), a wide MLP, AdamW, an ordinary loop. Run it with `make quickstart`;
`--tiny` is a fast check that it works. It writes quickstart_model.safetensors and quickstart.png to --out.
"""

import argparse
import copy
import os
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
    parts = train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(p, dtype=torch.float32) for p in parts[:2])
    train_y, test_y = (torch.tensor(p) for p in parts[2:])
    return train_x, train_y, test_x, test_y


def mlp(width):
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def train(model, optimizer, x, y, epochs, title):
    """An ordinary loop: nothing in it knows about sparsity."""
    model.train()
    for _ in tqdm(range(epochs), desc=title, unit="epoch", leave=True):
        for rows in torch.randperm(len(x)).split(128):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def accuracy(model, x, y):
    with torch.inference_mode():
        return float((model(x).argmax(1) == y).float().mean())


def latencies(models, x, repeats):
    """Median milliseconds a call, the models in turn, so that a noisy machine is noisy for all of them."""
    times = {name: [] for name in models}
    with torch.inference_mode():
        for i in range(repeats + 2):
            for name, model in models.items():
                start = time.perf_counter()
                model(x)
                if i >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def saved_bytes(model, path):
    sten.save(model, path)
    return os.path.getsize(path)


def sparse_copy(dense, layout, sparsity, data, epochs, title):
    """A copy of the dense model, sparsified and fine-tuned in its pattern."""
    model = copy.deepcopy(dense)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sten.sparsify(model, layout={"6.weight": None, "*": layout}, sparsity=sparsity, optimizer=optimizer)
    train(model, optimizer, *data[:2], epochs, title)
    return sten.finalize(model)


def picture(weight, results, path):
    """Left: a corner of the pattern. Right: accuracy against speed-up across layouts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    left.imshow(weight.mask()[:80, :160], cmap="Greys", interpolation="nearest")
    left.set(title=f"Stored entries of {weight.spec}", xlabel="input", ylabel="output")
    for name, (speed, score) in results.items():
        right.scatter(speed, 100 * score)
        right.annotate(name, (speed, 100 * score), textcoords="offset points", xytext=(5, 4), fontsize=8)
    right.axvline(1, color="grey", linestyle=":")
    right.set(title="Fine-tuned accuracy against speed", xlabel="speed-up over dense, 1024 samples", ylabel="test accuracy, %")
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def table(dense, sparse, data, out, repeats):
    """The comparison, losses shown as losses; returns the speed-up at 1024 samples."""
    score = {name: accuracy(m, *data[2:]) for name, m in (("dense", dense), ("sparse", sparse))}
    size = {"dense": saved_bytes(dense, out / "quickstart_dense.safetensors"), "sparse": os.path.getsize(out / "quickstart_model.safetensors")}
    print(f"\n{'':24}{'dense':>12}{'sparse':>12}{'':>4}")
    print(f"{'test accuracy':24}{score['dense']:>11.2%} {score['sparse']:>11.2%}    {100 * (score['sparse'] - score['dense']):+.2f} points")
    print(f"{'bytes on disk':24}{size['dense']:>12,}{size['sparse']:>12,}    {size['dense'] / size['sparse']:.1f}x smaller")
    speed = 1.0
    for samples in (1, 16, 1024):
        x = data[0].repeat(1024 // len(data[0]) + 1, 1)[:samples]
        ms = latencies({"dense": dense, "sparse": sparse}, x, repeats)
        speed = ms["dense"] / ms["sparse"]
        verdict = "faster" if speed >= 1 else "SLOWER"
        print(f"{f'latency, {samples} samples':24}{ms['dense']:>9.3f} ms{ms['sparse']:>9.3f} ms    {speed:.2f}x {verdict}")
    return speed, score["sparse"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of a minute: checks that it runs")
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    width, epochs, repeats = (96, 1, 3) if args.tiny else (1024, 16, 20)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = digits()

    dense = mlp(width)
    train(dense, torch.optim.AdamW(dense.parameters(), lr=1e-3), *data[:2], epochs, "dense")
    layout = sten.GroupedNM(1, 10, 8)
    sparse = sparse_copy(dense, layout, None, data, epochs, f"{layout}")
    print(sten.summary(sparse))
    print(sten.which("linear", (1024, width), sparse[2].weight))
    sten.save(sparse, args.out / "quickstart_model.safetensors")
    sparse = sten.load(mlp(width), args.out / "quickstart_model.safetensors").eval()
    results = {"GroupedNM(1, 10, 8)": table(dense, sparse, data, args.out, repeats)}

    others = {"CSR 90 %": (sten.CSR(), 0.9), "GroupedNM(1, 4, 16)": (sten.GroupedNM(1, 4, 16), None), "CSR 75 %": (sten.CSR(), 0.75)}
    x = data[0].repeat(2, 1)[:1024]
    for name, (other, sparsity) in others.items():
        model = sparse_copy(dense, other, sparsity, data, max(epochs // 3, 1), name)
        ms = latencies({"dense": dense, "sparse": model}, x, repeats)
        results[name] = ms["dense"] / ms["sparse"], accuracy(model, *data[2:])
    results["dense"] = 1.0, accuracy(dense, *data[2:])
    picture(sparse[2].weight, results, args.out / "quickstart.png")
    print(f"\nWrote {args.out / 'quickstart_model.safetensors'} and {args.out / 'quickstart.png'}.")


if __name__ == "__main__":
    main()
