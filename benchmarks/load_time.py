"""Seconds to load 500 MB: sten.load, with what it checks, beside safetensors' load_file. Interleaved medians.

    python benchmarks/load_time.py [--megabytes 500] [--repeats 7]

load_file maps the file and reads nothing, so it is timed with one pass over the numbers, and with a copy of each tensor
into memory of its own, which is what sten.load makes. Numbers that are read from a mapped file can change after they
have been checked.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time

import safetensors.torch
import torch
from torch import nn

import sten
from sten import io, tensor_file
from sten.backends import cpp

LAYOUTS = {
    "CSR 90 %": (sten.CSR(), 0.9),
    "NM(2, 4)": (sten.NM(2, 4), None),
    "VectorNM(1, 4, 64)": (sten.VectorNM(1, 4, 64), None),
    "BSR 64, 90 %": (sten.BSR((64, 64)), 0.9),
}


def layer_of(layout: sten.Layout, sparsity: float | None, size: int) -> nn.Linear:
    dense = torch.randn(size, size)
    layer = nn.Linear(size, size)
    layer.weight = nn.Parameter(sten.from_dense(dense, layout, layout.mask(dense.abs(), sparsity)))
    return layer


def empty(layers: int, size: int) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))


def touch(path: str) -> float:
    return sum(float(t.sum()) for t in safetensors.torch.load_file(path).values())


def read_only(path: str) -> None:
    """The file read and its checksums compared, without validation."""
    with tensor_file.open_file(path) as file:
        tensor_file.read(file, tensor_file.read_header(file), crc32=cpp.crc32())


def medians(runs: dict, repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(own)[len(own) // 2] for name, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", type=int, default=4096)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; milliseconds")
    with tempfile.TemporaryDirectory() as folder:
        for name, (layout, sparsity) in LAYOUTS.items():
            one = layer_of(layout, sparsity, args.size)
            layers = max(1, round(args.megabytes * 1e6 / one.weight.stored_bytes))
            path, plain = f"{folder}/sparse", f"{folder}/plain"
            sten.save(nn.Sequential(*([one] + [layer_of_copy(one) for _ in range(layers - 1)])), path)
            with contextlib.suppress(FileNotFoundError):
                os.remove(plain)
            safetensors.torch.save_file(safetensors.torch.load_file(path), plain)

            def copied(plain=plain) -> dict:
                return {key: value.clone() for key, value in safetensors.torch.load_file(plain).items()}

            models = [empty(layers, args.size) for _ in range(2 * (args.repeats + 1))]
            runs = {
                "load_file": lambda plain=plain: safetensors.torch.load_file(plain),
                "load_file, one pass": lambda plain=plain: touch(plain),
                "load_file, copied": copied,
                "sten, read and checksums": lambda path=path: read_only(path),
                "sten, and validated": lambda path=path: io._read(path),
                "sten.load": lambda path=path, models=models: sten.load(models.pop(), path, assign=True),
                "sten.load, mmap": lambda path=path, models=models: sten.load(models.pop(), path, True, True),
            }
            got = medians(runs, args.repeats)
            share = (got["sten, and validated"] - got["sten, read and checksums"]) / got["sten.load"]
            ratio = got["sten.load"] / got["load_file, copied"]
            print(f"{name}, {os.path.getsize(path) / 1e6:.0f} MB in {layers} layers:")
            print("  " + ", ".join(f"{key} {1e3 * seconds:.0f}" for key, seconds in got.items()))
            print(f"  sten.load / load_file, copied: {ratio:.2f}; validation: {100 * share:.0f} % of sten.load")


def layer_of_copy(one: nn.Linear) -> nn.Linear:
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(one.weight.detach().clone())
    layer.bias = nn.Parameter(one.bias.detach().clone())
    return layer


if __name__ == "__main__":
    main()
