"""`F.linear` with every layout on a GPU against cuBLAS, cuSPARSELt through torch, torch's BSR and stk.

    python benchmarks/gpu_linear.py [--layouts BSR ...] [--tokens 1 16 ...] [--dtype D [--tf32]] [--output DIR] [--plot]

Layers of an 8B model, in bfloat16 unless said; each result is checked first; CUDA-graph timing over rotating weights. A
ratio over 1 means faster than dense. What is timed is `F.linear(x, w)` with a `sten.SparseTensor`, in a CUDA graph and,
up to 64 tokens, in eager mode, where the host's time counts; `launch_us` is the kernel called by itself, in a graph.
"chain" is such a launch that is feature-major in and out, as in an MLP after `sten.fuse`; all else is in the ordinary
order (tokens, features) and includes the transpose where the kernel needs one.
"""

import argparse
import importlib.util
import itertools
import time

import torch
from gpu_timing import check, copies, eager_time, geometric_mean, graph_time, write
from torch.nn.functional import linear

import sten
from sten.kernels import bsr, csr, grouped_nm, nm, vector_nm

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # out, in
TOKENS = [1, 16, 64, 1024, 4096, 16384]
EAGER = 64  # tokens up to which eager calls are timed, too
DTYPE, DEVICE = torch.bfloat16, "cuda"


def _generator(seed):
    return torch.Generator(device=DEVICE).manual_seed(seed)


def _values(*shape, seed):
    return torch.randn(*shape, generator=_generator(seed), device=DEVICE, dtype=DTYPE) / 64


class VectorNM:
    def __init__(self, n, m, v, chain):
        self.n, self.m, self.v, self.chain = n, m, v, chain
        self.name, self.label = "VectorNM", f"{n}:{m} v={v}" + (" chain" if chain else "")
        self.density, self.layout = n / m, sten.VectorNM(n, m, v)

    def tensor(self, weight, out, inputs):
        return sten.SparseTensor(self.layout, {"values": weight[0], "index": weight[1]}, (out, inputs))

    def make(self, out, inputs, seed):
        bands, groups = -(-out // self.v), inputs // self.m
        order = torch.rand(bands, groups, self.m, generator=_generator(seed), device=DEVICE).argsort(-1)
        index = order[..., : self.n].sort(-1).values + torch.arange(groups, device=DEVICE)[:, None] * self.m
        return _values(out, groups * self.n, seed=seed), index.reshape(bands, -1).int().contiguous()

    def dense(self, weight, out, inputs):
        columns = weight[1].long().repeat_interleave(self.v, 0)[:out]
        return torch.zeros(out, inputs, device=DEVICE, dtype=DTYPE).scatter_(1, columns, weight[0])

    def prepare(self, x):
        return x.T.contiguous() if self.chain else x

    def call(self, x, weight, out):
        rate = {"n": self.n, "m": self.m, "v": self.v}
        if self.chain:
            return vector_nm.linear_feature_major(x, *weight, **rate)
        return vector_nm.linear(x, *weight, out_features=out, **rate)

    def ordinary(self, y):
        return y.T if self.chain else y


class Ordinary:
    """What the layouts without a feature-major form share."""

    chain = False

    def prepare(self, x):
        return x

    def ordinary(self, y):
        return y

    def tensor(self, weight, out, inputs):
        return sten.SparseTensor(self.layout, {"values": weight[0], "index": weight[1]}, (out, inputs))


class BSR(Ordinary):
    def __init__(self, block, density):
        self.block, self.density, self.name = block, density, "BSR"
        self.label, self.layout = f"block {block}, {1 - density:.0%} sparse", sten.BSR((block, block))

    def tensor(self, weight, out, inputs):
        values, crow, col, row = weight
        order = torch.argsort(col, stable=True)
        counts = torch.bincount(col, minlength=inputs // self.block)
        parts = {"values": values, "crow": crow, "col": col, "t_row": row[order].int(), "t_block": order.int()}
        parts["t_crow"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        return sten.SparseTensor(self.layout, parts, (out, inputs))

    def make(self, out, inputs, seed):
        block_rows, columns = out // self.block, inputs // self.block
        count = max(1, round(block_rows * columns * self.density))
        keep = torch.zeros(block_rows * columns, dtype=torch.bool, device=DEVICE)
        keep[torch.randperm(block_rows * columns, generator=_generator(seed), device=DEVICE)[:count]] = True
        row, col = keep.view(block_rows, columns).nonzero(as_tuple=True)
        crow = torch.nn.functional.pad(keep.view(block_rows, columns).sum(1).cumsum(0), (1, 0)).int()
        return _values(count, self.block, self.block, seed=seed), crow, col.int(), row

    def dense(self, weight, out, inputs):
        b = self.block
        dense = torch.zeros(out // b, inputs // b, b, b, device=DEVICE, dtype=DTYPE)
        dense[weight[3], weight[2].long()] = weight[0]
        return dense.transpose(1, 2).reshape(out, inputs)

    def call(self, x, weight, out):
        return bsr.linear(x, *weight[:3], out_features=out)

    def peers(self, x, dense):
        """{name: (call, weights)} of other libraries on the same pattern; ``dense`` are the dense weights."""
        calls = {}
        weights = [w.to_sparse_bsr((self.block, self.block)) for w in dense[:2]]
        calls["torch BSR"] = (lambda w: linear(x, w), weights)
        if self.block == 128 and importlib.util.find_spec("stk"):
            import stk

            weights = [stk.ops.to_sparse(w.half(), self.block) for w in dense[:2]]
            half = x.half()
            calls["stk"] = (lambda w: stk.ops.dds(half, w.t()), weights)
        return calls


class NM(Ordinary):
    def __init__(self, n, m):
        self.n, self.m, self.name, self.label, self.density = n, m, "NM", f"{n}:{m}", n / m
        self.layout = sten.NM(n, m)

    def make(self, out, inputs, seed):
        dense = _values(out, inputs, seed=seed)
        parts = self.layout.pack(dense, self.layout.mask(dense.abs()))
        return parts["values"], parts["index"]

    def dense(self, weight, out, inputs):
        return self.layout.unpack({"values": weight[0], "index": weight[1]}, (out, inputs))

    def call(self, x, weight, out):
        return nm.linear(x, *weight, n=self.n, m=self.m, out_features=out)

    def peers(self, x, dense):
        if self.m != 4:
            return {}
        weights = [torch._cslt_compress(w) for w in dense[:2]]
        padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16))
        return {"torch cuSPARSELt": (lambda w: torch._cslt_sparse_mm(w, padded.T, transpose_result=True), weights)}


class CSR(Ordinary):
    def __init__(self, density):
        self.name, self.label, self.density, self.layout = "CSR", f"{1 - density:.0%} sparse", density, sten.CSR()

    def tensor(self, weight, out, inputs):
        return sten.SparseTensor(self.layout, dict(zip(("values", "crow", "col"), weight, strict=False)), (out, inputs))

    def make(self, out, inputs, seed):
        keep = torch.rand(out, inputs, generator=_generator(seed), device=DEVICE) < self.density
        row, col = keep.nonzero(as_tuple=True)
        return (
            _values(len(row), seed=seed),
            torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int(),
            col.int(),
            row,
        )

    def dense(self, weight, out, inputs):
        dense = torch.zeros(out, inputs, device=DEVICE, dtype=DTYPE)
        dense[weight[3], weight[2].long()] = weight[0]
        return dense

    def call(self, x, weight, out):
        return csr.linear(x, *weight[:3], out_features=out)


class GroupedNM(Ordinary):
    def __init__(self, n, m, g):
        self.n, self.m, self.g, self.name, self.label, self.density = n, m, g, "GroupedNM", f"{n}:{m}:{g}", n / m
        self.layout = sten.GroupedNM(n, m, g)
        self.pattern = self.layout.rows(torch.device(DEVICE)).int()

    def make(self, out, inputs, seed):
        slots = len(self.pattern) * self.g
        chunks, strips = -(-inputs // slots), -(-out // self.m)
        order = torch.rand(chunks, strips, slots, generator=_generator(seed), device=DEVICE).argsort(-1)
        return _values(chunks, strips, len(self.pattern), self.g, self.n, seed=seed), order.short().view(
            chunks, strips, -1, self.g
        )

    def dense(self, weight, out, inputs):
        return grouped_nm.expand(*weight, self.pattern, m=self.m, out_features=out, in_features=inputs)

    def call(self, x, weight, out):
        return grouped_nm.linear(x, *weight, self.pattern, m=self.m, out_features=out)


def cases():
    for chain in (True, False):
        for n, m in ((2, 4), (1, 4), (1, 8), (1, 16)):
            yield VectorNM(n, m, 128, chain)
        for v in (64, 32):
            for m in (4, 8):
                yield VectorNM(1, m, v, chain)
    for block in (128, 64):
        for density in (0.2, 0.1, 0.05):
            yield BSR(block, density)
    yield from (NM(2, 4), NM(16, 32), NM(8, 16), NM(12, 32), NM(10, 32), NM(6, 32))
    for density in (0.5, 0.25, 0.1, 0.05):
        yield CSR(density)
    yield from (GroupedNM(2, 4, 8), GroupedNM(1, 4, 16), GroupedNM(1, 10, 8))


def dense_times(tokens):
    """(graph, eager) microseconds of the dense product, by shape and tokens; eager ones up to EAGER tokens."""
    times = {}
    for (out, inputs), t in itertools.product(SHAPES, tokens):
        x = torch.randn(t, inputs, device=DEVICE, dtype=DTYPE)
        weights = [_values(out, inputs, seed=i) for i in range(copies(out * inputs * DTYPE.itemsize))]
        graph = graph_time(lambda w, x=x: linear(x, w), weights, calls=12)
        times[out, inputs, t] = graph, eager_time(lambda w, x=x: linear(x, w), weights) if t <= EAGER else None
    return times


@torch.no_grad()
def measure(case, out, inputs, tokens, dense_time, peers):
    """One row per token count, for one case and shape."""
    weights = [case.make(out, inputs, seed) for seed in range(copies(out * inputs * DTYPE.itemsize * case.density))]
    tensors = [case.tensor(w, out, inputs) for w in weights]
    dense = [case.dense(w, out, inputs) for w in weights[:2]]
    for t in tokens:
        x = torch.randn(t, inputs, device=DEVICE, dtype=DTYPE)
        prepared, calls, name = case.prepare(x), 12 if t > 64 else 24, f"{case.name} {case.label} {out}x{inputs}"
        expected = x.float() @ dense[0].float().T
        check(case.ordinary(case.call(prepared, weights[0], out)), expected, f"launch, {name} tokens {t}")
        check(linear(x, tensors[0]), expected, f"{name} tokens {t}")
        del expected
        launch = graph_time(lambda w, x=prepared: case.call(x, w, out), weights, calls=calls)
        dense_us, dense_eager = dense_time[out, inputs, t]
        row = {"layout": case.name, "case": case.label, "out": out, "in": inputs, "tokens": t, "launch_us": launch}
        row |= {"variant": sten.which("linear", x, tensors[0]).variant, "dense_us": dense_us, "us": launch}
        if not case.chain:
            row["us"] = graph_time(lambda w, x=x: linear(x, w), tensors, calls=calls)
            if t <= EAGER:
                row["eager_us"], row["dense_eager_us"] = eager_time(lambda w, x=x: linear(x, w), tensors), dense_eager
        row["ratio"] = dense_us / row["us"]
        if peers and t >= 16 and hasattr(case, "peers"):
            row["peers"] = peer_times(case, x, dense, dense_us)
        yield row


def peer_times(case, x, dense, dense_us):
    ratios = {}
    for name, (call, weights) in case.peers(x, dense).items():
        try:
            ratios[name] = dense_us / graph_time(call, weights, calls=8, replays=3)
        except (RuntimeError, AssertionError) as problem:  # a library that refuses this shape is no peer for it
            ratios[name] = str(problem).splitlines()[0][:80]
            torch.cuda.synchronize()
    return ratios


def training_rows(tokens):
    """Forward and both gradients of VectorNM 1:4, v=128, which saves its feature-major activations, against dense."""
    case = VectorNM(1, 4, 128, False)
    rate = {"n": 1, "m": 4, "v": 128}
    for (out, inputs), t in itertools.product(SHAPES, tokens):
        values, index = case.make(out, inputs, 0)
        dense = case.dense((values, index), out, inputs)
        x, grad = torch.randn(t, inputs, device=DEVICE, dtype=DTYPE), torch.randn(t, out, device=DEVICE, dtype=DTYPE)

        def sparse_step(_, x=x, grad=grad, values=values, index=index, t=t, inputs=inputs):
            turned = vector_nm.feature_major(x)
            y = vector_nm.linear_feature_major(turned, values, index, tokens=t, row_major=True, **rate)
            grad_x = vector_nm.linear_grad_input(grad, values, index, in_features=inputs, **rate)
            return y, grad_x, vector_nm.linear_grad_values(grad, turned, index, feature_major=True, **rate)

        def dense_step(_, x=x, grad=grad, dense=dense):
            return torch.nn.functional.linear(x, dense), grad @ dense, grad.T @ x

        got, expected = sparse_step(None), dense_step(None)
        columns = index.long().repeat_interleave(128, 0)
        for name, a, b in zip(("y", "x", "values"), got, (*expected[:2], expected[2].gather(1, columns)), strict=False):
            check(a, b, f"training {name} {out}x{inputs} tokens {t}")
        del got, expected
        spent, dense_us = graph_time(sparse_step, [None], calls=4), graph_time(dense_step, [None], calls=4)
        row = {"layout": "VectorNM", "case": "1:4 v=128, forward and both gradients", "out": out, "in": inputs}
        row |= {"tokens": t, "us": spent, "variant": "gather, expand, gather", "dense_us": dense_us}
        yield row | {"ratio": dense_us / spent}


def table(rows, tokens):
    print(f"{'geometric mean over shapes, dense = 1':40}" + "".join(f"{t:>9}" for t in tokens))
    for key in dict.fromkeys((r["layout"], r["case"]) for r in rows):
        text = f"{key[0] + ' ' + key[1]:40}"
        for t in tokens:
            ratios = [r["ratio"] for r in rows if (r["layout"], r["case"], r["tokens"]) == (*key, t)]
            text += f"{geometric_mean(ratios):9.2f}" if ratios else " " * 9
        print(text)
        for title, mine, other in (
            ("launch by itself", "launch_us", "dense_us"),
            ("eager", "eager_us", "dense_eager_us"),
        ):
            text = f"    {title:36}"
            for t in tokens:
                chosen = [r for r in rows if (r["layout"], r["case"], r["tokens"]) == (*key, t) and mine in r]
                text += f"{geometric_mean(r[other] / r[mine] for r in chosen):9.2f}" if chosen else " " * 9
            print(text)
        for name in dict.fromkeys(name for r in rows if (r["layout"], r["case"]) == key for name in r.get("peers", {})):
            text = f"    {name:36}"
            for t in tokens:
                mine = [
                    r["peers"].get(name)
                    for r in rows
                    if (r["layout"], r["case"], r["tokens"]) == (*key, t) and "peers" in r
                ]
                mine = [ratio for ratio in mine if isinstance(ratio, float)]
                text += f"{geometric_mean(mine):9.2f}" if mine else " " * 9
            print(text)


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def panel(row):
        if row["layout"] == "VectorNM":
            return "VectorNM, chain" if "chain" in row["case"] else "VectorNM"
        return "BSR" if row["layout"] == "BSR" else "NM, CSR, GroupedNM"

    names = list(dict.fromkeys(map(panel, rows)))
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for name, axes in zip(names, grid.flat, strict=False):
        here = [r for r in rows if panel(r) == name]
        for key in dict.fromkeys((r["layout"], r["case"]) for r in here):
            mine = [r for r in here if (r["layout"], r["case"]) == key]
            tokens = sorted({r["tokens"] for r in mine})
            means = [geometric_mean(r["ratio"] for r in mine if r["tokens"] == t) for t in tokens]
            axes.plot(tokens, means, marker="o", label=" ".join(key).removesuffix(" chain"))
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="speed, dense cuBLAS = 1", title=name)
        axes.legend(fontsize=7, ncol=2)
    figure.savefig(path, dpi=110)


def main():
    global DTYPE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", help="only these")
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--output", help="directory of the JSON; benchmarks/results by default")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, with what there is")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--tf32", action="store_true", help="float32 may round to tf32, on both sides")
    arguments = parser.parse_args()
    DTYPE = getattr(torch, arguments.dtype)
    torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    torch.manual_seed(0)
    begun, rows, dense_time = time.monotonic(), [], dense_times(arguments.tokens)
    for case in cases():
        if arguments.layouts and case.name not in arguments.layouts:
            continue
        for out, inputs in SHAPES:
            if time.monotonic() - begun < arguments.seconds:
                rows += measure(case, out, inputs, arguments.tokens, dense_time, not arguments.no_peers)
    if not arguments.layouts or "VectorNM" in arguments.layouts:
        rows += training_rows([t for t in arguments.tokens if t >= 1024])
    table(rows, arguments.tokens)
    dtype = "tf32" if arguments.tf32 else arguments.dtype
    name = "gpu_linear" if arguments.dtype == "bfloat16" else f"gpu_linear_{dtype}"
    write(name, {"rows": rows}, arguments.output)
    if arguments.plot:
        plot(rows, (arguments.output or "benchmarks/results") + "/gpu_linear.png")


if __name__ == "__main__":
    main()
