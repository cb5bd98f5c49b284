"""Whole Hugging Face models, dense against sparse, through the public API: prefill, decode, generate, a training step.

    python benchmarks/gpu_model.py --model llama-8b --parts prefill decode --batches 1 16 --output DIR
    python benchmarks/gpu_model.py --model llama-8b --parts train
    python benchmarks/gpu_model.py --table benchmarks/results/gpu_model_*.json     # print what was measured
    python benchmarks/gpu_model.py --tiny --device cpu                             # a smoke test: small models

The classes are transformers' own, made from a config with random weights, in bfloat16; a plan is one `sten.sparsify`
(and one `sten.fuse`, with --fused) of such a model. Before anything is timed, the logits of each plan are compared with
those of the same model after `sten.densify`, and layers with sparse inputs one by one. All plans stay in memory and
take turns in one process: in each round every plan runs a few calls, in an order that rotates. A ratio is the median
over the rounds of dense / plan of one round, over 1 where the plan is faster. Decode is one token a sequence, with a
static cache, in four ways: eager, compiled (torch.compile, fullgraph), graph (a CUDA graph of eager calls),
compiled+graph. `linears` are the linear layers alone, in a CUDA graph: what a plan can change at all. Parts are saved
as soon as they are measured.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import json
import pathlib
import time
import warnings

import torch
from gpu_plans import (
    CONFIGS,
    copy_of,
    linears,
    linears_alone,
    make,
    plans,
    prompt,
    sparsified,
    stored_bytes,
    worst_product,
)
from gpu_rivals import Float8, Int4, replace_linears
from gpu_timing import RESULTS, Clock, captured, describe, in_turns
from torch import nn

import sten

GENERATED, PROMPT = 32, 128


class Decode:
    """One token for each sequence, at a fixed place of a static cache that the plans share."""

    def __init__(self, model, batch: int, length: int, device: str):
        from transformers import StaticCache

        self.start, self.cache = length // 4, StaticCache(config=model.config, max_cache_len=length)
        self.ids = torch.randint(0, model.config.vocab_size, (batch, 1), device=device)
        new_name = "cache" in inspect.signature(type(model).forward).parameters
        self.keywords = {"cache" if new_name else "past_key_values": self.cache, "use_cache": True}
        model(self.ids, **self.keywords)  # makes the tensors of the cache
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.rewind()

    def rewind(self):
        """Go back to the place: every call, and every replay, advances by one token."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)

    def __call__(self, function):
        return function(self.ids, **self.keywords).logits


def run(model, inputs):
    out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def relative_error(got, expected) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def generated(model, batch: int, device: str, **keywords):
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=device)
    mask, same = torch.ones_like(ids), {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False}
    return lambda: model.generate(ids, attention_mask=mask, pad_token_id=0, **same, **keywords)


class Benchmark:
    def __init__(self, arguments):
        self.arguments, self.device, self.tiny = arguments, arguments.device, arguments.tiny
        self.clock, self.dtype = Clock(self.device), torch.float32 if self.device == "cpu" else torch.bfloat16
        self.result = {"model": arguments.model, "layers": arguments.layers, "plans": {}, "columns": {}}
        self.models: dict[str, nn.Module] = {}

    def save(self):
        path = pathlib.Path(self.arguments.output or RESULTS) / f"{self.arguments.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**describe(), **self.result}, indent=1))

    def column(self, name: str, calls: dict, repeats: int, before=None):
        if self.tiny:
            repeats = 1
        self.result["columns"][name] = measured = in_turns(calls, self.clock, self.arguments.rounds, repeats, before)
        print(
            f"{name:40}" + "  ".join(f"{plan} {row['us']:.0f} us {row['ratio']:.2f}" for plan, row in measured.items())
        )
        self.save()

    @torch.no_grad()
    def build(self):
        arguments = self.arguments
        dense, inner = make(arguments.model, arguments.layers, self.device, self.dtype, self.tiny)
        dense.requires_grad_(False)
        chosen = linears(dense, inner)
        widths = {name: dense.get_submodule(name).weight.shape for name in chosen}
        self.chosen, self.models["dense"] = chosen, dense
        dense.dense_widths = {
            name: shape[1] if isinstance(dense.get_submodule(name), nn.Linear) else shape[0]
            for name, shape in widths.items()
        }
        probes = [prompt(dense, 1, tokens, self.device) for tokens in ((1, 17) if self.tiny else (1, 64, 512))]
        self.result["plans"]["dense"] = {"MB": stored_bytes(dense) / 1e6}
        for name, plan in plans(self.tiny).items():
            if arguments.plans and name not in arguments.plans:
                continue
            model = sparsified(copy_of(dense, chosen), plan, chosen)
            if isinstance(plan, sten.TopK):
                self.accept_error(name, model, max(worst_product(model, chosen, probe) for probe in probes))
                continue
            twin = sten.densify(copy_of(model, chosen))
            expected = [run(twin, probe) for probe in probes]
            del twin
            self.accept(name, model, probes, expected)
            if arguments.fused:
                fused = copy_of(model, set())
                report = sten.fuse(fused)
                print(report)
                self.accept(name + " fused", fused, probes, expected)
        expected = [run(dense, probe) for probe in probes]
        for kind in () if arguments.no_rivals else (Int4, Float8):
            model = copy_of(dense, chosen)
            replace_linears(model, chosen, kind)
            self.accept(kind.__name__.lower(), model, probes, expected, limit=float("inf"))  # each layer was checked
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def accept(self, name, model, probes, expected, limit=5e-2):
        errors = [relative_error(run(model, probe), right) for probe, right in zip(probes, expected, strict=True)]
        self.accept_error(name, model, max(errors), limit)

    def accept_error(self, name, model, error, limit=5e-2):
        if not error < limit:
            self.fail(name, f"relative error {error:.3g}; a wrong result is not timed")
            return
        self.models[name] = model
        self.result["plans"][name] = {"MB": stored_bytes(model) / 1e6, "error": error}
        print(f"{name}: {self.result['plans'][name]}", flush=True)

    def fail(self, name, why):
        self.result.setdefault("failed", {})[name] = why
        print(f"{name} FAILED: {why}", flush=True)
        self.save()

    @torch.no_grad()
    def prefill(self):
        model = self.models["dense"]
        sizes = [(1, 512), (1, 4096)] if hasattr(model, "generate") else [(1, 512), (16, 512)]
        for batch, tokens in [(1, 64)] if self.tiny else sizes:
            inputs = prompt(model, batch, tokens, self.device)
            calls = {name: functools.partial(run, m, inputs) for name, m in self.models.items()}
            self.column(f"prefill {batch}x{tokens} eager", calls, 2)
            if self.device == "cuda":
                for name, m in self.models.items():
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    run(m, inputs)
                    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
                    self.result["plans"][name][f"peak MB over weights, {batch}x{tokens}"] = peak
            if "graph" in self.arguments.ways:
                self.linears_column(batch * tokens)

    def linears_column(self, tokens):
        if self.device != "cuda":
            return
        plain = {n: m for n, m in self.models.items() if not n.endswith(" fused")}
        calls = {n: captured(linears_alone(m, self.chosen, tokens)) for n, m in plain.items()}
        self.column(f"linears {tokens} tokens graph", calls, 5)

    def graphs_column(self, name, calls, before):
        """The same calls in CUDA graphs, whose memory is freed with them."""
        self.column(name, {plan: captured(call, before) for plan, call in calls.items()}, 20, before)

    @torch.no_grad()
    def decode(self):
        model, ways = self.models["dense"], self.arguments.ways
        if not hasattr(model, "generate"):
            return
        for batch in self.arguments.batches:
            step = Decode(model, batch, 64 if self.tiny else self.arguments.cache, self.device)
            calls = {name: functools.partial(step, m) for name, m in self.models.items()}
            before, after = step.rewind, f"decode {batch}"
            if "eager" in ways:
                self.column(f"{after} eager", calls, 10, before)
            if "graph" in ways and self.device == "cuda":
                self.graphs_column(f"{after} graph", calls, before)
                self.linears_column(batch)
            if any(way.startswith("compiled") for way in ways):
                torch._dynamo.reset()
                torch._dynamo.config.recompile_limit = 4 * len(self.models)  # all are instances of one class
                options = {"cpp_wrapper": True} if self.arguments.cpp else None
                compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, options=options)
                functions = {name: compiled(m) for name, m in self.models.items()}
                calls = {name: functools.partial(step, f) for name, f in functions.items()}
                for name in list(calls):
                    if not self.compiles(name, calls[name], step, batch):
                        del calls[name]
                if "compiled" in ways:
                    self.column(f"{after} compiled", calls, 10, before)
                    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                        self.column(f"{after} compiled, no guards", calls, 10, before)
                if "compiled+graph" in ways and self.device == "cuda":
                    self.graphs_column(f"{after} compiled+graph", calls, before)

    def compiles(self, name, call, step, batch) -> bool:
        """Whether the compiled model gives what the eager one does; a compiler's failure is noted, and not timed."""
        begun = time.monotonic()
        step.rewind()
        expected = step(self.models[name])
        step.rewind()
        try:
            error = relative_error(call(), expected)
        except Exception as problem:  # a compiler's failure is a result, too
            self.fail(f"{name} compiled {batch}", str(problem)[-500:])
            return False
        if not error < (0.5 if name.startswith(("int4", "float8", "inputs")) else 5e-2):  # decided by x's last bits
            self.fail(f"{name} compiled {batch}", f"relative error {error:.3g}; a wrong result is not timed")
            return False
        self.result["plans"][name][f"error compiled {batch}"] = error
        print(f"{name} compiled in {time.monotonic() - begun:.0f} s", flush=True)
        return True

    @torch.no_grad()
    def generate(self):
        if not hasattr(self.models["dense"], "generate"):
            return
        ways = {"dynamic cache": {}, "static cache": {"cache_implementation": "static", "disable_compile": True}}
        for batch in self.arguments.batches:
            for way, keywords in ways.items():
                calls = {n: generated(m, batch, self.device, **keywords) for n, m in self.models.items()}
                self.column(f"generate {GENERATED}, batch {batch}, {way}", calls, 1)

    def train(self):
        """A training step of a model of one block: forward, backward, AdamW; then its MLP alone."""
        self.models = {}
        tokens, blocks = 32 if self.tiny else 4096, self.arguments.train_layers
        changes = {} if self.arguments.model in ("bert-large", "vit-large") else {"vocab_size": 1024}
        dense, inner = make(self.arguments.model, blocks, self.device, self.dtype, self.tiny, **changes)
        chosen, calls, parts = linears(dense, inner), {}, {}
        inputs = prompt(dense, 1 if hasattr(dense, "generate") else 8, tokens if changes else 512, self.device)
        inputs.pop("logits_to_keep", None)
        wanted = {"dense": None} | {name: plan for name, plan in plans(self.tiny).items() if isinstance(plan, tuple)}
        for name, plan in wanted.items():
            if plan is not None and self.arguments.plans and name not in self.arguments.plans:
                continue
            model = copy.deepcopy(dense).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
            if plan is not None:
                sparsified(model, plan, chosen, optimizer=optimizer)

            def step(model=model, optimizer=optimizer):
                run(model, inputs).float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

            calls[name], self.models[name] = step, model
        self.column(f"train step, {blocks} block", calls, 1)
        for name, model in self.models.items():  # after the steps, which change the weights that these save
            parts |= self.mlp_parts(name, model, tokens)
        for what in dict.fromkeys(what for _, what in parts):
            self.column(f"MLP {what}", {name: call for (name, w), call in parts.items() if w == what}, 2)

    def mlp_parts(self, name, model, tokens) -> dict:
        """Forward, gradient of the input and gradients of the weights of the first MLP, each alone."""
        mlp = next((m for n, m in model.named_modules() if n.rpartition(".")[2] == "mlp"), None)
        if mlp is None:
            return {}
        width = getattr(model.config, "hidden_size", None) or model.config.n_embd
        x = torch.randn(1, tokens, width, device=self.device, dtype=self.dtype, requires_grad=True)
        y = mlp(x)
        g, weights = torch.randn_like(y), list(mlp.parameters())
        return {
            (name, "forward"): torch.no_grad()(lambda: mlp(x)),
            (name, "input gradient"): lambda: torch.autograd.grad(y, x, g, retain_graph=True),
            (name, "all gradients"): lambda: torch.autograd.grad(y, [x, *weights], g, retain_graph=True),
        }


def table(paths) -> None:
    """Print what the files hold: a row a plan, the ratio to dense; of dense the milliseconds."""
    for path in paths:
        content = json.loads(pathlib.Path(path).read_text())
        layers = f"{content['layers'] or 'usual'} layers"
        print(f"\n{content['model']}, {layers}, {content['device']}, torch {content['torch']}")
        for column, row in content["columns"].items():
            dense = row["dense"]["us"] / 1e3
            text = "  ".join(f"{plan} {each['ratio']:.2f}" for plan, each in row.items() if plan != "dense")
            print(f"{column:40}{dense:9.2f} ms  {text}")
        for plan, facts in content["plans"].items():
            print(f"    {plan:26}" + "  ".join(f"{key} {value:.3g}" for key, value in facts.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts, ways = ["prefill", "decode", "generate", "train"], ["eager", "compiled", "graph", "compiled+graph"]
    parser.add_argument("--model", default="llama-8b", choices=CONFIGS)
    parser.add_argument("--layers", type=int, help="8, 16 or 24 if not given")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways, help="of decode")
    parser.add_argument("--plans", nargs="*", help="only these; dense is always measured")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--cache", type=int, default=4096, help="tokens of the static cache")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--train-layers", type=int, default=1)
    parser.add_argument("--fused", action="store_true", help="every sparse plan after sten.fuse, too; in inference")
    parser.add_argument("--cpp", action="store_true", help="compiled by Inductor's C++ wrapper")
    parser.add_argument("--no-rivals", action="store_true", help="without int4 and fp8")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a smoke test with small models")
    parser.add_argument("--name", default="gpu_model", help="of the JSON file")
    parser.add_argument("--output", help="directory of the JSON; benchmarks/results by default")
    parser.add_argument("--table", nargs="+", help="print these files, measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.table)
        return
    if arguments.device == "cpu":
        arguments.no_rivals = True
    if arguments.tiny:
        arguments.rounds = 3
    warnings.filterwarnings("ignore", message="sten:")
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    benchmark = Benchmark(arguments)
    with contextlib.suppress(KeyboardInterrupt):  # what was measured is saved
        if set(arguments.parts) & {"prefill", "decode", "generate"}:
            benchmark.build()
        for part in arguments.parts:
            getattr(benchmark, part)()
    print(f"wrote {arguments.name}.json")


if __name__ == "__main__":
    main()
