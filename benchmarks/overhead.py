"""What a call costs beside the arithmetic: a tiny linear layer with a sparse weight against dense F.linear.

    python benchmarks/overhead.py [--size 16] [--out overhead.json]

Every layout is checked against the masked dense product first. The two sides run alternately in one process; the
number is the difference of the medians, in microseconds above dense. `no_grad` is a finalized weight in inference,
`forward` and `step` (forward and backward) the same weight as a hand-made Parameter under autograd, `trainable` and
`trainable_step` a module in trainable form against a dense module.
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
from torch import nn

import sten
import sten.cpp
import sten.native

LAYOUTS = [sten.Masked(), sten.CSR(), sten.BSR((4, 4)), sten.NM(2, 4), sten.VectorNM(2, 4, 4), sten.GroupedNM(2, 4, 1)]


def once(call, repeats: int) -> float:
    """Microseconds a call, over one short loop."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats * 1e6


def side_by_side(sparse, dense, repeats: int, rounds: int) -> dict[str, float]:
    """Median microseconds of both calls, measured alternately."""
    for call in (sparse, dense):
        once(call, repeats)
    pairs = [(once(sparse, repeats), once(dense, repeats)) for _ in range(rounds)]
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"sparse_us": round(mine, 2), "dense_us": round(theirs, 2), "above_us": round(mine - theirs, 2)}


def measure(layout: sten.Layout, size: int, rounds: int) -> dict:
    """Overheads of one layout, after a check of the result and the gradients."""
    weight, x, bias = torch.randn(size, size), torch.randn(1, size), torch.randn(size)
    mask = layout.mask(weight.abs(), None if layout.rate is not None else 0.5)
    sparse = nn.Parameter(sten.from_dense(weight, layout, mask))
    dense = nn.Parameter(weight.masked_fill(~mask, 0))

    def step(w):
        F.linear(x, w, bias).sum().backward()
        w.grad = None

    torch.testing.assert_close(F.linear(x, sparse, bias), F.linear(x, dense, bias), atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(F.linear(x, w, bias).sin().sum(), w)[0] for w in (sparse, dense)]
    torch.testing.assert_close(grads[0].to_dense(), grads[1] * mask, atol=1e-5, rtol=1e-5)
    found = {"kernel": str(sten.ops.route.which("linear", x, sparse))}
    with torch.no_grad():
        found["no_grad"] = side_by_side(lambda: F.linear(x, sparse), lambda: F.linear(x, dense), 500, rounds)
    found["forward"] = side_by_side(lambda: F.linear(x, sparse), lambda: F.linear(x, dense), 300, rounds)
    found["step"] = side_by_side(lambda: step(sparse), lambda: step(dense), 100, rounds)
    layers = [nn.Linear(size, size), nn.Linear(size, size)]
    layers[0].weight.data = dense.data.clone()
    sten.trainable(sten.sparsify(layers[0], layout, None))
    found["trainable"] = side_by_side(lambda: layers[0](x), lambda: layers[1](x), 300, rounds)
    passes = [lambda m=m: m(x).sum().backward() for m in layers]
    found["trainable_step"] = side_by_side(*passes, 100, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write the JSON to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    result = {
        "what": f"linear {args.size}x{args.size}, 1 token, float32, {args.threads} thread(s)",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": sten.cpp.features(),
        "layouts": {str(layout): measure(layout, args.size, args.rounds) for layout in LAYOUTS},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        with open(args.out, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
