"""Q-Sparse on the byte-level GPT of gpt.py: every linear layer of the blocks reads the k largest of its inputs.

    python benchmarks/training/q_sparse.py --device cuda --size 25m --seconds 80 --out q_sparse.json
    python benchmarks/training/q_sparse.py --device cpu --size tiny --steps 200     # a minute

Each model, with 0, 50 and 70 % of the inputs zero, is trained by the same number of steps on the same batches, the
gradient straight through (Wang et al., https://arxiv.org/abs/2407.10969): as many as --seconds allow for all, or
--steps. Then one token is decoded behind a full context: inputs in FanIn, weights input-major, in bfloat16 on a GPU,
eagerly and in a CUDA graph; on the CPU in float32. Decoding that does not give the logits of the whole model stops the
script. The last lines are the table for docs/activations.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import torch
from gpt import GPT, SIZES, corpus, draw, validate
from torch import Tensor, nn
from torch.nn import functional as F

import sten


def in_blocks(name: str, module: nn.Module) -> bool:
    """The linear layers of the blocks."""
    return name.startswith("blocks.") and isinstance(module, nn.Linear)


def sparsified(model: GPT, sparsity: float, layout: sten.Layout | None = None) -> GPT:
    if sparsity:
        method = sten.TopK(1 - sparsity, straight_through=True)
        sten.sparsify(model, layout, method, site="input", modules=in_blocks)
    return model


class Training:
    """One model, from its first step on."""

    def __init__(self, sparsity: float, args, data: Tensor) -> None:
        torch.manual_seed(args.seed)
        self.sparsity, self.args, self.data, self.losses = sparsity, args, data, []
        self.model = sparsified(GPT(*SIZES[args.size]), sparsity).to(args.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=args.device == "cuda"
        )
        self.generator = torch.Generator().manual_seed(args.seed)

    def step(self, number: int, steps: int) -> None:
        warm = max(steps // 20, 1)
        for group in self.optimizer.param_groups:
            cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(number / steps, 1)))
            group["lr"] = self.args.lr * min((number + 1) / warm, cosine)
        x, y = draw(self.data, self.args.batch, SIZES[self.args.size][3], self.generator, self.args.device)
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.device == "cuda"):
            loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def run(self, steps: int) -> float:
        """Seconds of all steps."""
        began = time.perf_counter()
        for number in range(steps):
            self.step(number, steps)
        float(self.losses[-1])  # waits for the device
        return time.perf_counter() - began


class Decoder:
    """One token behind a full context, whose keys and values are there: `step()` gives its logits."""

    def __init__(self, model: GPT, context: Tensor) -> None:
        self.model, self.caches, self.token = model, [], context[:, -1:]
        x = model.token(context) + model.position.weight[: context.shape[1]]
        for block in model.blocks:
            parts = block.qkv(block.norm1(x)).chunk(3, -1)
            self.caches.append([t.unflatten(-1, (block.heads, -1)).transpose(1, 2).contiguous() for t in parts[1:]])
            x = block(x)
        self.expected = model.head(model.norm(x[:, -1:]))

    def step(self) -> Tensor:
        model, last = self.model, len(self.model.position.weight) - 1
        x = model.token(self.token) + model.position.weight[last]
        for block, (keys, values) in zip(model.blocks, self.caches, strict=True):
            parts = block.qkv(block.norm1(x)).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (block.heads, -1)).transpose(1, 2) for t in parts)
            keys[:, :, -1:], values[:, :, -1:] = k, v
            x = x + block.out(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2))
            x = x + block.down(F.gelu(block.up(block.norm2(x))))
        return model.head(model.norm(x))


def decoder_of(trained: GPT, sparsity: float, context: Tensor) -> Decoder:
    """With inputs in FanIn and input-major weights, where they are sparse."""
    model = sten.densify(copy.deepcopy(trained)).eval().requires_grad_(False)
    model = model.to(torch.bfloat16) if context.is_cuda else model
    if sparsity:
        for name, module in model.named_modules():
            if in_blocks(name, module):
                module.weight.data = module.weight.data.t().contiguous().t()
        sparsified(model, sparsity, sten.FanIn())
    decoder = Decoder(model, context)
    error = float((decoder.step() - decoder.expected).float().norm() / decoder.expected.float().norm())
    if not error < (0.2 if context.is_cuda else 1e-3):  # in bfloat16 near ties go either way
        raise SystemExit(f"{sparsity:.0%} zero: decoding differs from the whole model by {error:.3g}; it is not timed.")
    return decoder


def microseconds(calls: list, seconds: float, cuda: bool, clock) -> list[float]:
    """The median of each call, called in turn."""
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(taken[0]) < 5:
        for call, times in zip(calls, taken, strict=True):
            began = clock()
            call()
            if cuda:
                torch.cuda.synchronize()
            times.append(1e6 * (clock() - began))
    return [statistics.median(times) for times in taken]


def in_graph(decoder: Decoder):
    """The step in a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            decoder.step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        decoder.step()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.5, 0.7])
    parser.add_argument("--seconds", type=float, default=80.0, help="of training, for all models together")
    parser.add_argument("--steps", type=int, default=0, help="of each model, instead of --seconds")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=20, help="of validation")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decode-seconds", type=float, default=1.0, help="for each model, in each way to call it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/training/results/q_sparse.json"))
    parser.add_argument("--cpu-time", action="store_true", help="decode on one thread, by its processor time")
    args = parser.parse_args()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1 if args.cpu_time else torch.get_num_threads())
    warnings.simplefilter("ignore")
    cuda, context, (train, held) = args.device == "cuda", SIZES[args.size][3], corpus()
    steps = args.steps
    if not steps:
        for sparsity in args.sparsity:  # compiles what is compiled
            Training(sparsity, args, train).run(3)
        speed = sum(Training(sparsity, args, train).run(10) / 10 for sparsity in args.sparsity)
        steps = max(int(args.seconds / speed), 10)
    rows, decoders = [], []
    device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    about = {"device": device, "torch": torch.__version__, "size": args.size, "steps": steps, "batch": args.batch}

    def write() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")

    for sparsity in args.sparsity:
        training = Training(sparsity, args, train)
        seconds = training.run(steps)
        loss = validate(training.model.eval(), held, args, context)
        row = {"sparsity": sparsity, "loss": loss, "perplexity": math.exp(loss), "steps": steps}
        rows.append(row | {"train_loss": float(training.losses[-1]), "milliseconds": 1000 * seconds / steps})
        print({key: round(value, 4) for key, value in rows[-1].items()}, flush=True)
        write()
        with torch.no_grad():
            ids = draw(held, 1, context, torch.Generator().manual_seed(1), args.device)[0]
            decoders.append(decoder_of(training.model, sparsity, ids))
    with torch.no_grad():
        ways = {"eager": lambda decoder: decoder.step} | ({"graph": in_graph} if cuda else {})
        for way, call_of in ways.items():
            calls = [call_of(decoder) for decoder in decoders]
            for row, taken in zip(rows, microseconds(calls, args.decode_seconds, cuda, clock), strict=True):
                row[f"decode_{way}"] = taken
            write()
    print(f"\n{about}\n\n| inputs that are zero | loss, nats a byte | training, ms a step |", end="")
    print("".join(f" a token, {way}, us |" for way in ways) + "\n|---|---|---|" + "---|" * len(ways))
    for row in rows:
        cells = [f"{row['sparsity']:.0%}", f"{row['loss']:.3f}", f"{row['milliseconds']:.1f}"]
        print(f"| {' | '.join(cells + [format(row[f'decode_{way}'], '.0f') for way in ways])} |")


if __name__ == "__main__":
    main()
