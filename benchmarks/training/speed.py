"""The cost of a step of sparse training: hooks, mask updates, memory; and the MLP of a block against dense.

    python benchmarks/training/speed.py engine --device cpu --size 10m    # hooks, mask updates; CPU time on the CPU
    python benchmarks/training/speed.py mlp --device cuda --width 4096    # forward + backward + AdamW step

The second checks one step of every layout against the same layer on a masked dense weight before it times it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from gpt import SIZES, in_blocks, make
from torch import nn
from torch.nn import functional as F

import sten
from sten.training.engine import engines_of

METHODS = {
    "static (no engine)": (lambda: sten.Static(), lambda: sten.CSR()),
    "set": (lambda: sten.SET(10**6, every=8), lambda: sten.CSR()),
    "rigl": (lambda: sten.RigL(10**6, every=8), lambda: sten.CSR()),
    "srigl": (lambda: sten.SRigL(10**6, every=8), lambda: sten.FanIn()),
    "rigl on blocks": (lambda: sten.RigL(10**6, every=8), lambda: sten.BSR((32, 32))),
    "gradual": (lambda: sten.Gradual(1, 10**6, 8), lambda: sten.CSR()),
    "srste": (lambda: sten.SRSTE(), lambda: sten.NM(2, 4)),
}


def clock(device: str) -> float:
    """Processor time on the CPU: other users of the machine do not count."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, patterns, gradients and optimizer slots together."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def engine_cost(args) -> dict:
    """Per method: time of a step, share of hooks in it, time of a step with a mask update, bytes of state."""
    results, context = {}, SIZES[args.size][3]
    x = torch.randint(256, (args.batch, context), generator=torch.Generator().manual_seed(0)).to(args.device)
    for name, (method, layout) in METHODS.items():
        torch.manual_seed(0)
        model, layout = make(args.size, 1.0).to(args.device), layout()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        sten.sparsify(model, layout, method(), None if layout.rate else 0.9, weights=in_blocks, optimizer=optimizer)
        engine = next(iter(engines_of(model)), None)
        hooks, plain, updates = [], [], []
        for _ in range(args.steps):
            before = engine.updates if engine else 0
            start = clock(args.device)
            optimizer.zero_grad()
            F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
            inside = _timed_hooks(engine, optimizer, args.device) if engine else None
            optimizer.step()
            took = clock(args.device) - start
            (updates if engine and engine.updates > before else plain).append(took)
            if inside and engine.updates == before:
                hooks.append(inside[0] / took)
        results[name] = {
            "step": statistics.median(plain[2:]), "hooks_share": statistics.median(hooks) if hooks else 0.0,
            "update": statistics.median(updates) if updates else None, "state_bytes": state_bytes(model, optimizer),
        }  # fmt: skip
        step, update = results[name]["step"], results[name]["update"]
        text = f"a mask update {update / step:.2f} steps" if update else ""
        share, size = 100 * results[name]["hooks_share"], results[name]["state_bytes"] / 2**20
        print(
            f"{name:20} step {1000 * step:8.1f} ms   hooks {share:5.2f} %   {text:25} state {size:7.1f} MiB", flush=True
        )
    return results


def _timed_hooks(engine, optimizer, device: str) -> list[float]:
    """Wrap the engine's two hooks for the next step; the list gets the time that they take."""
    spent = [0.0]
    for table in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
        for key, hook in list(table.items()):
            hook = getattr(hook, "timed", hook)

            def timed(*arguments, hook=hook):
                start = clock(device)
                result = hook(*arguments)
                spent[0] += clock(device) - start
                return result

            timed.timed = hook
            table[key] = timed
    return spent


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def mlp_step(args) -> dict:
    """Per layout: time of forward + backward + step, peak memory, against the dense layer in the same process."""
    layouts = {"dense": None, "VectorNM(1, 4, 128)": (sten.VectorNM(1, 4, 128), None)}
    layouts |= {f"BSR 64, {s:.0%}": (sten.BSR((64, 64)), s) for s in (0.8, 0.9)}
    dtype, results = torch.bfloat16 if args.device == "cuda" else torch.float32, {}
    x = torch.randn(args.tokens, args.width, device=args.device, dtype=dtype)
    for name, how in layouts.items():
        torch.manual_seed(0)
        model = MLP(args.width).to(args.device, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if how is not None:
            sten.sparsify(model, how[0], sten.Static(), how[1], optimizer=optimizer)
            twin = nn.functional.linear(x[:8], model.up.weight.to_dense(), model.up.bias)
            if not torch.allclose(model.up(x[:8]), twin, rtol=2e-2, atol=2e-2):
                raise RuntimeError(f"{name} disagrees with its dense weight.")
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(args.steps):
            start = clock(args.device)
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(clock(args.device) - start)
        peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else state_bytes(model, optimizer)
        results[name] = {"step": statistics.median(times[3:]), "bytes": peak}
        ratio = results["dense"]["step"] / results[name]["step"]
        print(
            f"{name:20} {1000 * results[name]['step']:8.2f} ms a step, {ratio:.2f} x dense; {peak / 2**20:.0f} MiB",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["engine", "mlp"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.device == "cpu":
        torch.set_num_threads(1)
    results = engine_cost(args) if args.what == "engine" else mlp_step(args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    if args.out is not None:
        args.out.write_text(
            json.dumps(
                {"device": device, "torch": torch.__version__, "args": vars(args) | {"out": None}, "results": results},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
