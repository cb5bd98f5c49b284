"""Time the CPU kernels as a user calls them against dense products, layout by layout, after checking their results.

    python benchmarks/cpu_linear.py                                   # every layout, forward, about ten minutes
    python benchmarks/cpu_linear.py --tokens 1024 --layouts csr90 1:10:8 v8:1:4 bsr90 --products linear grad_weight
    python benchmarks/cpu_linear.py --dtype bfloat16 --layouts nm16:32 nm2:4 v128:2:4 v128:1:4 v128:1:8 csr90
    python benchmarks/cpu_linear.py --products gelu relu              # products with their activation, as of sten.fuse
    python benchmarks/cpu_linear.py --json results.json
    python benchmarks/cpu_linear.py --against ../before               # another checkout, in turn with this one

Dense and sparse are called in turn, in one process, on the same number of threads; a ratio is the median dense time
over the median sparse time. "hot" calls the same weight again and again; "rotating" calls `--rotate` weights in turn,
as a model does, so that they come from further away. A wrong result stops the script; a script that was stopped has
reported nothing about the layout that was wrong.

On a machine that others use, two threads wait for whoever is not scheduled, and medians say little. `--cpu-time` then
measures processor time of one thread instead of elapsed time; the JSON has the load average and the fastest tenth too.
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F
import workers

import sten
from sten.backends import cpp
from sten.ops.fused import linear_activation

SHAPES = [(3072, 768), (768, 3072)]  # (out, in)
LAYOUTS = ["csr75", "csr90", "csr95", "1:10:8", "1:4:16", "2:4:8"]
LAYOUTS += ["v8:2:4", "v8:1:4", "v8:1:8", "v8:1:16", "bsr80", "bsr90", "bsr95", "fanin90", "nm16:32", "nm2:4"]
PRODUCTS = ["linear", "gelu", "relu", "grad_input", "grad_weight"]


def make_layout(name):
    """Return the layout and the sparsity (None where the layout has its own) that a name such as csr90 means."""
    for prefix, layout in (("csr", sten.CSR()), ("bsr", sten.BSR(block=(16, 16))), ("fanin", sten.FanIn())):
        if name.startswith(prefix):
            return layout, int(name.removeprefix(prefix)) / 100
    numbers = [int(number) for number in name.lstrip("nmv").split(":")]
    if name.startswith("nm"):
        return sten.NM(*numbers), None
    return (sten.VectorNM(*numbers[1:], v=numbers[0]) if name[0] == "v" else sten.GroupedNM(*numbers)), None


def make_weight(name, shape, dtype):
    """Return (dense weight with the pruned entries zero, the sparse one) for a random weight of `shape`."""
    layout, sparsity = make_layout(name)
    dense = (torch.randn(shape) / math.sqrt(shape[1])).to(dtype)
    if name.startswith("csr"):
        mask = torch.rand(shape) >= sparsity
    else:
        mask = layout.mask(dense.float(), sparsity) if sparsity is not None or name[0] in "nv" else None
    weight = sten.from_dense(dense, layout, mask)
    return weight.to_dense(), weight


# A product -> (the dense one, the sparse one), each a function of x, grad, a weight and the bias.
CALLS = {
    "linear": (lambda x, grad, w, bias: F.linear(x, w, bias),) * 2,
    "gelu": (lambda x, grad, w, bias: F.gelu(F.linear(x, w, bias)), lambda *operands: activated("gelu", *operands)),
    "relu": (lambda x, grad, w, bias: F.relu(F.linear(x, w, bias)), lambda *operands: activated("relu", *operands)),
    "grad_input": (lambda x, grad, w, bias: grad @ w,) * 2,
    "grad_weight": (lambda x, grad, w, bias: grad.t() @ x, lambda x, grad, w, bias: compute_grad_weight(grad, x, w)),
}


def activated(activation, x, grad, weight, bias):
    """What the forward of a fused module calls."""
    return linear_activation(x, weight, bias, activation, False)


def compute_grad_weight(grad, x, weight):
    """The gradient of the stored entries, by the Plan that a backward pass runs."""
    plan = sten.which("linear_grad_weight", grad, weight)
    return plan.run(grad, x, weight.parts)


def check(name, product, x, grad, weights, bias):
    """Stop unless every weight's result agrees with a float64 product."""
    dense_call, sparse_call = CALLS[product]
    for dense, sparse in weights:
        expected = dense_call(x.double(), grad.double(), dense.double(), bias.double())
        scale = dense_call(x.double().abs(), grad.double().abs(), dense.double().abs(), bias.double().abs())
        if product == "grad_weight":
            expected, scale = (sparse.sparse_layout.pack_like(a, sparse.parts) for a in (expected, scale))
        got = sparse_call(x, grad, sparse, bias).double()
        error = ((got - expected).abs() / scale.clamp_min(1e-30)).max().item()
        if not error < (2e-6 if x.dtype is torch.float32 else 2 * torch.finfo(x.dtype).eps):
            sys.exit(f"{name}, {product} is wrong by {error:.3g} of the sum of magnitudes; it is not timed")


def interleaved(calls, seconds, clock):
    """Call each of `calls` in turn for `seconds`; return the sorted times of each, in microseconds."""
    times = [[] for _ in calls]
    for call in calls * 2:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 9:
        for call, taken in zip(calls, times, strict=True):
            start = clock()
            call()
            taken.append((clock() - start) * 1e6)
    return [sorted(taken) for taken in times]


def in_turn(function, items):
    """Return a call that applies `function` to the next of `items` each time."""
    step = [-1]

    def call():
        step[0] = (step[0] + 1) % len(items)
        return function(items[step[0]])

    return call


def measure(name, shape, tokens, product, arguments):
    """Check one layout, shape and number of tokens, and return its timings."""
    torch.manual_seed(0)
    (out, inp), dtype = shape, getattr(torch, arguments.dtype)
    weights = [make_weight(name, shape, dtype) for _ in range(min(arguments.rotate, 3))]
    # more weights than three are copies: they only need other addresses
    while len(weights) < arguments.rotate:
        weights.append(tuple(weight.clone() for weight in weights[len(weights) % 3]))
    x, grad, bias = (torch.randn(size).to(dtype) for size in ((tokens, inp), (tokens, out), (out,)))
    check(name, product, x, grad, weights[:3], bias)
    dense_call, sparse_call = CALLS[product]
    result = {"layout": name, "product": product, "in": inp, "out": out, "tokens": tokens}
    for mode, used in (("hot", weights[:1]), ("rotating", weights)):
        both = interleaved(
            [
                in_turn(lambda w: dense_call(x, grad, w[0], bias), used),
                in_turn(lambda w: sparse_call(x, grad, w[1], bias), used),
            ],
            arguments.seconds,
            time.thread_time if arguments.cpu_time else time.perf_counter,
        )
        dense, sparse = map(statistics.median, both)
        fast_dense, fast_sparse = (times[len(times) // 10] for times in both)
        result[mode] = {
            "dense_us": round(dense, 1),
            "sparse_us": round(sparse, 1),
            "ratio": round(dense / sparse, 2),
            "fastest_tenth": {"dense_us": round(fast_dense, 1), "sparse_us": round(fast_sparse, 1)},
            "calls": len(both[0]),
        }
    return result


def measure_both(pair, number, *request):
    """`measure` in both trees in turn; the result of this one, with the other's sparse times next to its own."""
    here, there = workers.in_turn(pair, request, number)
    for mode in ("hot", "rotating"):
        here[mode]["against_us"] = there[mode]["sparse_us"]
        here[mode]["time_ratio"] = round(here[mode]["sparse_us"] / there[mode]["sparse_us"], 3)
    return here


def setting(arguments):
    """Describe what was measured, on what."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            lines = dict(line.split(":", 1) for line in info.read().split("\n\n")[0].splitlines() if ":" in line)
        model = {k.strip(): v.strip() for k, v in lines.items()}.get("model name", model)
    except OSError:
        pass  # no /proc here: the platform's own name has to do
    return {
        "device": model,
        "threads": arguments.threads,
        "load_average": os.getloadavg(),
        "clock": "processor time" if arguments.cpu_time else "elapsed time",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instruction_set": cpp.features()["instruction_set"],
        "dense": "eager F.linear, same process, calls interleaved, medians",
    }


def main():
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=LAYOUTS,
        metavar="LAYOUT",
        help="csr90, 1:10:8 (n:m:g), v8:1:4, nm16:32, bsr90 or fanin90",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=PRODUCTS[:1], metavar="PRODUCT")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rotate", type=int, default=12, help="weights called in turn when rotating")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--against", metavar="PATH", help="another checkout, to measure in turn with this one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not cpp.available():
        sys.exit("the extension is not built; `python setup.py build_ext --inplace` builds it")
    if arguments.cpu_time:
        arguments.threads = 1
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        workers.serve(lambda request: measure(*request, arguments))
        return
    run = functools.partial(measure, arguments=arguments)
    if arguments.against:
        options = ["--cpu-time"] if arguments.cpu_time else [f"--threads={arguments.threads}"]
        options += [f"--dtype={arguments.dtype}", f"--rotate={arguments.rotate}", f"--seconds={arguments.seconds}"]
        pair = workers.pair(__file__, arguments.against, options)
        run = functools.partial(measure_both, pair, 0)
    results = report(run, arguments)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"setting": setting(arguments) | {"dtype": arguments.dtype}, "results": results}, file, indent=1)


def report(run, arguments):
    """Print one row for every layout, product and number of tokens; return their timings."""
    results, on = [], setting(arguments) | {"dtype": arguments.dtype}
    threads = f"{on['threads']} thread(s), {on['clock']}, torch {on['torch']}"
    print(f"{on['device']}, {on['instruction_set']}, {on['dtype']}, {threads}")
    print(
        f"{'layout':8} {'product':11}{'tokens':>7}  {'in -> out':13}{'dense us':>22}{'sparse us':>20}{'ratio':>14}"
        "   (hot / rotating)"
    )
    for product, tokens, name in itertools.product(arguments.products, arguments.tokens, arguments.layouts):
        both = [run(name, shape, tokens, product) for shape in SHAPES]
        label = f"{name:8} {product:11}{tokens:7}"
        for r in both:
            hot, turn = r["hot"], r["rotating"]
            print(
                f"{label}  {r['in']:>4} -> {r['out']:<5}{hot['dense_us']:11.0f} /{turn['dense_us']:9.0f}"
                f"{hot['sparse_us']:10.0f} /{turn['sparse_us']:8.0f}{hot['ratio']:8.2f} /{turn['ratio']:5.2f}"
                + (f"   x {hot['time_ratio']} / {turn['time_ratio']} of the other's" if arguments.against else ""),
                flush=True,
            )
        mean = {mode: round(math.prod(r[mode]["ratio"] for r in both) ** 0.5, 2) for mode in ("hot", "rotating")}
        print(f"{label}  {'geometric mean':>54}{mean['hot']:8.2f} /{mean['rotating']:5.2f}", flush=True)
        results += both
    return results


if __name__ == "__main__":
    with torch.no_grad():  # in inference mode a weight has no version, and its pattern would be checked at every call
        main()
