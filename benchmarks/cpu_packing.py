"""Seconds to choose a mask of 4096x11008, to store it and to expand it again, layout by layout; the CPU, two threads.

    python benchmarks/cpu_packing.py [--layouts csr90 nm2:4 2:4:8] [--shape 4096 11008] [--threads 2]

"mask" is `layout.mask(weight.abs())`, "from_dense" stores that mask, "to_dense" expands it, and "sparsify" is one call
of `sten.sparsify` for a Linear layer, all of it included: the fastest of `--repeats`. "kept" is the part of the
magnitude of Gaussian weights that the mask keeps.
"""

import argparse
import json
import platform
import statistics
import time

import torch
from cpu_linear import make_layout
from torch import nn

import sten
from sten.backends import cpp

LAYOUTS = ["csr90", "nm2:4", "nm8:16", "nm2:8", "nm16:32", "v8:1:4", "v64:2:4", "v128:4:16", "bsr90", "fanin90"]
LAYOUTS += ["2:4:8", "1:4:16", "1:10:8", "2:5:8", "4:8:4"]
TIMES = ["mask", "from_dense", "to_dense", "sparsify"]


def seconds(run):
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def once(layout, sparsity, weight):
    """The four times, and what was kept."""
    masking, mask = seconds(lambda: layout.mask(weight.abs(), sparsity))
    storing, sparse = seconds(lambda: sten.from_dense(weight, layout, mask))
    expanding, dense = seconds(sparse.to_dense)
    if not torch.equal(dense, weight.masked_fill(~mask, 0)):
        raise SystemExit(f"{layout}: wrong")
    kept = float(dense.abs().sum(dtype=torch.float64) / weight.abs().sum(dtype=torch.float64))
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    whole, _ = seconds(lambda: sten.sparsify(layer, layout, sparsity=sparsity))
    return masking, storing, expanding, whole, kept


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help="names as in cpu_linear.py")
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 11008])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file to write the table to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    setting = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    setting |= {"instruction_set": cpp.features()["instruction_set"], "threads": arguments.threads}
    results = []
    print(", ".join(f"{name} {value}" for name, value in setting.items()) + "; seconds")
    weight = torch.randn(arguments.shape)
    print(f"| layout | {' | '.join(TIMES)} | kept |\n|---|---|---|---|---|---|")
    for name in arguments.layouts:
        rows = [once(*make_layout(name), weight) for _ in range(arguments.repeats)]
        fastest = [min(column) for column in zip(*rows, strict=True)]
        kept = statistics.median(row[4] for row in rows)
        results.append({"layout": name, **dict(zip(TIMES, fastest, strict=False)), "kept": kept})
        times = " | ".join(f"{results[-1][time]:.2f}" for time in TIMES)
        print(f"| {name} | {times} | {kept:.4f} |", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"setting": setting, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
