"""How fast the layouts of cells.py run, through the public API: prefill and decode of SmolLM2, batches of MiniLM.

    python benchmarks/pruning/speed.py --device cuda
    python benchmarks/pruning/speed.py --device cpu --threads 2 --patterns 'CSR*' dense-bfloat16 'int*'

Every pattern takes turns with the dense model, and the ratio is the median over rounds of dense / pattern, over 1 where
the pattern is faster. On a GPU models are in bfloat16 and calls are CUDA graphs; on a CPU float32, eager. Magnitude
chooses the entries, since speed does not depend on which they are. With --fused every pattern is measured after
`sten.fuse`, too. The references int8 and int4 are measured in the same way, and their quality as in one_shot.py; on a
CPU there is dense bfloat16, too. The JSON is written after every pattern, and patterns that it has are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import functools
import json
import sys
import warnings
from pathlib import Path

import torch
from cells import bytes_of, cells, chosen_weights, evaluated
from models import FOLDER, PAD, Pack
from one_shot import Bench, save
from references import Int4, Int8, quantized
from tiny import Tiny
from torch import nn

import sten

sys.path.append(str(Path(__file__).parents[1]))
from gpu_model import Clock, Decode, captured, in_turns, run
from gpu_timing import describe

RESULTS = Path(__file__).parents[1] / "results"
REFERENCES = {"int8": Int8, "int4": Int4}
FASTER = [("CSR()", 0.8), ("CSR()", 0.9), ("BSR((64, 64))", 0.8), ("VectorNM(1, 4, 64)", None), ("NM(1, 4)", None)]


def patterns() -> dict[str, tuple[str, float | None]]:
    """{name: (layout, sparsity)} of the grid, and some that are sparser: how fast they would be."""
    found = {cell.pattern: (cell.layout, cell.sparsity) for cell in cells(1) if not isinstance(cell.sparsity, str)}
    return found | {f"{layout} {at:.0%}" if at else layout: (layout, at) for layout, at in FASTER}


def made(name: str, dense: nn.Module) -> nn.Module:
    """A copy of the dense model in a pattern or in the form of a reference."""
    model = copy.deepcopy(dense)
    if name == "dense-bfloat16":
        return model.bfloat16()
    if name in REFERENCES:
        return quantized(model, REFERENCES[name])
    layout, sparsity = patterns()[name.removesuffix(" fused")]
    sten.sparsify(model, evaluated(layout), sparsity=sparsity)
    if name.endswith(" fused"):
        sten.fuse(model)
    return model


@torch.no_grad()
def times(models: dict[str, nn.Module], kind: str, arguments) -> dict[str, dict]:
    """{what: {"us", "dense_us", "ratio", "quartiles"}} of the one model that is not dense."""
    device, cuda, result = arguments.device, arguments.device == "cuda", {}
    clock, repeats = Clock(device), 20 if cuda else arguments.repeats

    def measure(what: str, calls: dict, repeats: int, before=None) -> None:
        ways = dict.fromkeys(calls, "eager")
        for name, call in calls.items() if cuda else ():
            with contextlib.suppress(RuntimeError):  # what waits for the device cannot be captured, and stays eager
                calls[name], ways[name] = captured(call, before), "graph"
        rows = in_turns(calls, clock, arguments.rounds, repeats, before)
        dense = rows.pop("dense")
        name, row = next(iter(rows.items()))
        result[what] = {**row, "dense_us": dense["us"], "way": ways[name]}

    dense = models["dense"]
    for batch, tokens in arguments.shapes[kind]:
        ids = torch.randint(PAD + 1, dense.config.vocab_size, (batch, tokens), device=device)
        inputs = {"input_ids": ids} | ({"logits_to_keep": 1} if kind == "smollm2" else {})
        calls = {name: functools.partial(run, model, inputs) for name, model in models.items()}
        measure(f"{'prefill' if kind == 'smollm2' else 'forward'} {batch}x{tokens}", calls, max(repeats // 4, 1))
    for batch in arguments.batches if kind == "smollm2" else ():
        steps = {name: Decode(model, batch, arguments.cache, device) for name, model in models.items()}
        calls = {name: functools.partial(step, models[name]) for name, step in steps.items()}
        measure(f"decode {batch}", calls, repeats, lambda steps=steps: [step.rewind() for step in steps.values()])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=FOLDER)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="*", default=["smollm2", "minilm"])
    parser.add_argument("--patterns", nargs="*", default=["*"], help="globs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=4, help="decode steps a round, on a CPU")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16], help="sequences of a decode step")
    parser.add_argument("--cache", type=int, default=1024, help="tokens of the static cache, a quarter of them used")
    parser.add_argument("--windows", type=int, default=0, help="of the references' quality; all if not given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="sten:")
    torch.set_num_threads(arguments.threads)
    cuda, tiny = arguments.device == "cuda", arguments.tiny
    arguments.shapes = {"smollm2": [(1, 1024), (8, 1024)] if cuda else [(1, 512)], "minilm": [(32, 128)]}
    if tiny:
        arguments.shapes, arguments.cache = {"smollm2": [(1, 16)], "minilm": [(2, 16)]}, 32
    out = arguments.out or RESULTS / f"one_shot_speed_{arguments.device}.json"
    content = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    content["about"] = {**describe(), "dtype": "bfloat16" if cuda else "float32", "threads": arguments.threads}
    bench = Bench(Tiny() if tiny else Pack(arguments.pack), arguments)
    names = [*(["dense-bfloat16"] if not cuda else []), *REFERENCES, *patterns()]
    names += [f"{name} fused" for name in patterns()] if arguments.fused else []
    for kind in arguments.models:
        dense = bench.model(kind).to(torch.bfloat16 if cuda else torch.float32)
        for name in names:
            key = f"{kind} | {name}"
            if key in content["rows"] or not any(fnmatch.fnmatchcase(name, p) for p in arguments.patterns):
                continue
            try:
                model = made(name, dense)
                row = times({"dense": dense, name: model}, kind, arguments)
            except (ValueError, TypeError, RuntimeError) as problem:  # a result, too
                row = {"error": f"{type(problem).__name__}: {problem}"}
            else:
                if name in REFERENCES or name == "dense-bfloat16":
                    row["quality"] = bench.quality(kind, model)
                elif not name.endswith(" fused"):
                    row["bytes"], row["dense_bytes"] = bytes_of(model, chosen_weights(dense))
            content["rows"][key] = row
            out.parent.mkdir(parents=True, exist_ok=True)
            save(out, content)
            shown = [
                f"{what} {r['us']:.0f} us ({r['ratio']:.2f})"
                for what, r in row.items()
                if hasattr(r, "keys") and "us" in r
            ]
            print(key, *shown or [row.get("error", "")], row.get("quality", ""), sep="  ", flush=True)


if __name__ == "__main__":
    main()
