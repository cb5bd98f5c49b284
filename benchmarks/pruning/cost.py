"""What pruning itself takes: seconds and memory.

    python benchmarks/pruning/cost.py layer --device cuda       # SparseGPT of a 4096x4096 layer, against Algorithm 1
    python benchmarks/pruning/cost.py blocks --device cuda      # a model of 7B shapes, block by block: the peak
    python benchmarks/pruning/cost.py models --threads 2        # MiniLM, 128 passages; SmolLM2, 16k tokens

`layer` writes SparseGPT's Algorithm 1 (https://arxiv.org/abs/2301.00774) out in plain torch, with its lazy updates of
128 columns, takes turns with `sten.SparseGPT`, and compares their errors. `models` reads what pack.py wrote.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path

import torch
from models import FOLDER, Pack, masked
from tiny import Tiny
from torch import Tensor

import sten

sys.path.append(str(Path(__file__).parents[1]))
from gpu_timing import Clock

BLOCK = 128
PATTERNS = {"2:4": (sten.NM(2, 4), None), "50 %": (sten.CSR(), 0.5)}


def algorithm_1(weight: Tensor, gram: Tensor, grouped: bool) -> Tensor:
    """The weights left by Algorithm 1: 2:4 in groups of four columns, or half of every block of 128 columns."""
    w, columns = weight.clone(), weight.shape[1]
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(columns, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        block, inner = w[:, first:last].clone(), factor[first:last, first:last]
        errors = torch.zeros_like(block)
        if not grouped:
            cost = (block / inner.diagonal()).square()
            dropped = cost <= cost.flatten().kthvalue(cost.numel() // 2).values
        for j in range(last - first):
            if grouped and j % 4 == 0:
                cost = (block[:, j : j + 4] / inner.diagonal()[j : j + 4]).square()
                pruned = torch.zeros_like(cost, dtype=torch.bool).scatter_(1, cost.topk(2, largest=False).indices, True)
            column = block[:, j].clone()
            block[:, j] = column.masked_fill(pruned[:, j % 4] if grouped else dropped[:, j], 0)
            errors[:, j] = (column - block[:, j]) / inner[j, j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * inner[j, j + 1 :]
        w[:, first:last] = block
        w[:, last:] -= errors @ factor[first:last, last:]
    return w


def layer(arguments) -> dict:
    """SparseGPT of one layer, against Algorithm 1 in plain torch, in turn."""
    size, device = 256 if arguments.tiny else 4096, arguments.device
    torch.manual_seed(0)
    weight = torch.randn(size, size, device=device)
    x = torch.randn(2 * size, size, device=device) @ torch.randn(size, size, device=device) / size**0.5
    gram, result = x.T @ x / len(x), {}
    stats = {"x_gram": gram, "tokens": torch.tensor(len(x))}
    for name, (layout, sparsity) in PATTERNS.items():
        view = sten.extend.View("weight", weight, layout, sparsity, stats=stats)
        ways = {
            "sten.SparseGPT": lambda view=view: sten.SparseGPT().update(view).value,
            "Algorithm 1": lambda name=name: algorithm_1(weight, gram, name == "2:4"),
        }
        errors, times = {}, {way: [] for way in ways}
        for way, call in ways.items():
            d = weight - call()  # and it is warm
            errors[way] = float(((d @ gram) * d).sum() / ((weight @ gram) * weight).sum())
        for _ in range(arguments.rounds):
            for way, call in ways.items():
                times[way].append(Clock(device)(call, 1) / 1e6)
        assert errors["sten.SparseGPT"] < 1.05 * errors["Algorithm 1"], errors
        middle = {way: statistics.median(spent) for way, spent in times.items()}
        result[name] = {"seconds": middle, "relative error": errors}
        print(
            f"{name}: " + ", ".join(f"{way} {middle[way]:.3f} s, error {errors[way]:.3f}" for way in ways), flush=True
        )
    return result


def blocks(arguments) -> dict:
    """A Llama of 7B shapes with random weights, on the CPU, pruned block by block on the device: seconds and peak."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 128}
    sizes = small if arguments.tiny else {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=arguments.layers, use_cache=False)).bfloat16()
    model = model.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # to_empty lost its buffers
    tokens = 64 if arguments.tiny else 2048
    ids = torch.randint(sizes["vocab_size"], (16, tokens))
    given = {"calibration": [{"input_ids": part} for part in ids.split(1)]}
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        given["calibration"] = sten.Calibration(given["calibration"], device="cuda", commit="block", offload="cpu")
    prune = functools.partial(sten.sparsify, model, sten.NM(2, 4), sten.SparseGPT(), **given)
    spent = Clock(arguments.device)(prune, 1) / 1e6
    peak = torch.cuda.max_memory_allocated() / 2**30 if arguments.device == "cuda" else 0.0
    print(f"{arguments.layers} blocks, {ids.numel()} tokens: {spent:.0f} s, peak {peak:.1f} GiB", flush=True)
    return {"blocks": arguments.layers, "tokens": ids.numel(), "seconds": spent, "peak GiB": peak}


def models(arguments) -> dict:
    """The two models of the evidence, by SparseGPT in 2:4."""
    pack, result = Tiny() if arguments.tiny else Pack(arguments.pack), {}
    passages, windows = pack.passages("python", 128), pack.windows("python", 16)
    batches = {
        "minilm": [masked(part) for part in passages[(passages != 0).sum(1).argsort(stable=True)].split(32)],
        "smollm2": [{"input_ids": part} for part in windows.split(2)],
    }
    for name, given in batches.items():
        model, device = pack.model(name).to(arguments.device), arguments.device
        given = [{key: t.to(device) for key, t in batch.items()} for batch in given]
        prune = functools.partial(sten.sparsify, model, sten.NM(2, 4), sten.SparseGPT(), calibration=given)
        spent = Clock(device)(prune, 1) / 1e6
        result[name] = {"seconds": spent, "tokens": sum(b["input_ids"].numel() for b in given)}
        print(f"{name}: {result[name]['tokens']} tokens, {spent:.0f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["layer", "blocks", "models"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="of `layer`")
    parser.add_argument("--layers", type=int, default=3, help="blocks of the model of `blocks`")
    parser.add_argument("--pack", type=Path, default=FOLDER)
    parser.add_argument("--tiny", action="store_true", help="a smoke test with small sizes")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = {"layer": layer, "blocks": blocks, "models": models}[arguments.part](arguments)
    if arguments.json:
        where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} threads"
        about = {"device": where, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"about": about, arguments.part: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
