"""The host overhead of a call: a tiny linear layer with a sparse weight against dense F.linear.

    python benchmarks/overhead.py [--size 16] [--out overhead.json]
    python benchmarks/overhead.py --device cuda --size 4096 --tokens 1 16 2048
    python benchmarks/overhead.py --against ../before      # another checkout, in turn with this one

Every layout is checked against the masked dense product first. The two sides run alternately in one process, and each
round runs all cases, so that slow minutes of a machine affect all of them; the number is the median of the rounds'
differences, in microseconds above dense. `no_grad` is a finalized weight in inference, `forward` and `step` (forward
and backward) the same weight as a hand-made Parameter under autograd, `trainable` and `trainable_step` a module in
trainable form against a dense module. On a GPU (bfloat16) it is the time until the calls return, which is the host's.
With `--against`, two processes take turns cell by cell, each with its own sten, and the ratio is the median over the
rounds of the sparse time here over there.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings

import torch
import torch.nn.functional as F
import workers
from torch import nn

import sten

try:
    from sten.backends import cpp
except ModuleNotFoundError:  # a checkout before the folders were named so, with --against
    from sten import cpp

LAYOUTS = [sten.Masked(), sten.CSR(), sten.BSR((4, 4)), sten.NM(2, 4), sten.VectorNM(2, 4, 4), sten.GroupedNM(2, 4, 1)]
GPU_LAYOUTS = [sten.CSR(), sten.BSR((64, 64)), sten.NM(2, 4), sten.VectorNM(1, 4, 128), sten.GroupedNM(1, 4, 16)]


def once(call, repeats: int, recording: bool) -> float:
    """Microseconds a call, over one short loop; the work that a GPU has left is not waited for."""
    with torch.set_grad_enabled(recording):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        spent = time.perf_counter() - start
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return spent / repeats * 1e6


def cases(layout: sten.Layout, size: int, tokens: int, device: str) -> tuple[str, dict[str, tuple]]:
    """(the kernel, {name: (sparse call, dense call, calls a round, under autograd)}), results and gradients checked."""
    cuda = device == "cuda"
    made = {"device": device, "dtype": torch.bfloat16 if cuda else torch.float32}
    weight, x, bias = torch.randn(size, size, **made), torch.randn(tokens, size, **made), torch.randn(size, **made)
    mask = layout.mask(weight.abs(), None if layout.rate is not None else 0.9 if cuda else 0.5)
    near = {"atol": 0.5, "rtol": 0.05} if cuda else {"atol": 1e-5, "rtol": 1e-5}
    calls, passes = (50, 50) if cuda else (500, 100)
    sparse = nn.Parameter(sten.from_dense(weight, layout, mask))
    dense = nn.Parameter(weight.masked_fill(~mask, 0))

    def step(w):
        F.linear(x, w, bias).sum().backward()
        w.grad = None

    torch.testing.assert_close(F.linear(x, sparse, bias), F.linear(x, dense, bias), **near)
    above = torch.randn(tokens, size, **made)
    grads = [torch.autograd.grad(F.linear(x, w, bias), w, above)[0] for w in (sparse, dense)]
    torch.testing.assert_close(grads[0].to_dense(), grads[1] * mask, **near)
    layers = [nn.Linear(size, size, **made), nn.Linear(size, size, **made)]
    layers[0].weight.data = dense.data.clone()
    sten.trainable(sten.sparsify(layers[0], layout, None))
    products = (lambda: F.linear(x, sparse), lambda: F.linear(x, dense))
    calls = {
        "no_grad": (*products, calls, False),
        "forward": (*products, calls, True),
        "step": (lambda: step(sparse), lambda: step(dense), passes, True),
        "trainable": (*[lambda m=m: m(x) for m in layers], calls, True),
        "trainable_step": (*[lambda m=m: m(x).sum().backward() for m in layers], passes, True),
    }
    return str(sten.which("linear", x, sparse)), calls


def one_cell(calls: tuple) -> tuple[float, float]:
    """Microseconds of (sparse, dense)."""
    sparse, dense, repeats, recording = calls
    return once(sparse, repeats, recording), once(dense, repeats, recording)


def one_round(every: dict[str, dict[str, tuple]]) -> dict[str, dict[str, tuple[float, float]]]:
    return {case: {name: one_cell(calls) for name, calls in cells.items()} for case, cells in every.items()}


def medians(rounds: list[dict]) -> dict[str, dict]:
    """{case: {name: medians}} over rounds; the round before the first warmed up."""
    results: dict[str, dict] = {}
    for case, cells in rounds[0].items():
        for name in cells:
            spent = [each[case][name] for each in rounds[1:]]
            sides = {"sparse_us": [a for a, _ in spent], "dense_us": [b for _, b in spent]}
            sides["above_us"] = [a - b for a, b in spent]
            results.setdefault(case, {})[name] = {side: round(statistics.median(us), 2) for side, us in sides.items()}
    return results


def compare(args) -> dict:
    """The `medians` of this tree, with the other tree's sparse times and the ratio; prints them."""
    arguments = [f"--size={args.size}", "--tokens", *map(str, args.tokens), f"--device={args.device}"]
    pair = workers.pair(__file__, args.against, [*arguments, f"--threads={args.threads}"])
    cells = pair[0].call(None)
    rounds = [], []
    for number in range(args.rounds + 1):
        for times in rounds:
            times.append({case: {} for case in cells})
        for case in cells:
            for name in cells[case]:
                for times, spent in zip(rounds, workers.in_turn(pair, [case, name], number), strict=True):
                    times[-1][case][name] = spent
    for worker in pair:
        worker.close()
    results, there = map(medians, rounds)
    for case in cells:
        for name, cell in results[case].items():
            ratios = [a[case][name][0] / b[case][name][0] for a, b in zip(*rounds, strict=True)][1:]
            cell |= {"against_us": there[case][name]["sparse_us"], "ratio": round(statistics.median(ratios), 3)}
            times = f"{cell['sparse_us']:9.1f} us, {cell['against_us']:9.1f} there: {cell['ratio']:.2f}"
            print(f"{case:36}{name:16}{times}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write the JSON to this file")
    parser.add_argument("--against", metavar="PATH", help="another checkout, to measure in turn with this one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    cuda = args.device == "cuda"
    result = {
        "what": f"linear {args.size}x{args.size}, {'bfloat16' if cuda else 'float32'}, {args.threads} thread(s)",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpp.features(),
    }
    if args.against:
        result["layouts"] = compare(args)
    else:
        built = {
            f"{layout}, {tokens} tokens": cases(layout, args.size, tokens, args.device)
            for layout in (GPU_LAYOUTS if cuda else LAYOUTS)
            for tokens in args.tokens
        }
        every = {case: calls for case, (_, calls) in built.items()}
        if args.worker:
            names = {case: list(calls) for case, calls in every.items()}
            workers.serve(lambda cell: names if cell is None else one_cell(every[cell[0]][cell[1]]))
            return
        measured = medians([one_round(every) for _ in range(args.rounds + 1)])
        result["layouts"] = {case: {"kernel": kernel, **measured[case]} for case, (kernel, _) in built.items()}
        print(json.dumps(result, indent=2))
    if args.out:
        with open(args.out, "w") as file:
            file.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
