"""Whole models on a CPU, dense against sparse, through the public API: encoders, decoding of one token, image networks.

    python benchmarks/cpu_model.py --json benchmarks/results/cpu_model.json      # everything, about ten minutes
    python benchmarks/cpu_model.py --models resnet18-cifar mobilenet --batches 1 --rounds 5
    python benchmarks/cpu_model.py --models conv-64x32 conv-128x16 conv-256x8 conv-512x7 --rounds 300
    python benchmarks/cpu_model.py --models bert --plans 1:10:8 --cpu-time       # processor time of one thread

The models have random weights: those of transformers are made from a config, the image networks are plain torch modules
of the published shapes. A plan is one `sten.sparsify` of a copy. Before anything is timed, its output is compared with
that of the same model after `sten.densify`; a wrong plan stops the script. Plans and rivals take turns in one process,
in another order each round; a ratio is the median over the rounds of dense / plan of one round, over 1 where the plan
is faster.

Rivals of the eager dense model: channels_last (image networks), compiled (torch.compile, which freezes the weights and
so prepacks them; --compiled), dynamic int8 (its linear layers).
"""

import argparse
import copy
import functools
import json
import os
import random
import statistics
import sys
import time
import warnings

import torch
from cpu_linear import make_layout, setting
from cpu_networks import mobilenet, resnet18
from torch import nn

import sten


def encoder(**sizes):
    """A BERT of transformers with these sizes, without its pooler."""
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**sizes), add_pooling_layer=False)


def bert():
    """BERT-base's encoder."""
    return encoder()


def minilm():
    """MiniLM-L6-H384."""
    return encoder(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def smollm2():
    """SmolLM2-135M."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **sizes))


def encode(model, batch):
    """Return a call: `batch` sequences of 128 tokens."""
    tokens = torch.randint(1000, 20000, (batch, 128))
    return lambda: model(tokens).last_hidden_state


def decode(model, batch):
    """Return a call: the token after a prompt of 128, with the keys and values of the prompt stored."""
    tokens = torch.randint(1000, 20000, (batch, 129))
    cache = model(tokens[:, :128], use_cache=True).past_key_values

    def call():
        logits = model(tokens[:, 128:], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return call


def images(size, channels=3):
    """Return a function of (model, batch) that returns a call on images of this size."""

    def inputs(model, batch):
        x = torch.randn(batch, channels, size, size)
        return lambda: model(x)

    return inputs


CONVS = "all convolutions but the first and the depthwise ones, and the classifier"
# name -> (make, inputs, batches, plans, what is pruned)
MODELS = {
    "bert": (bert, encode, [8], ["1:10:8", "csr90", "v8:1:8"], "all linear layers"),
    "minilm": (minilm, encode, [1, 8], ["1:10:8", "csr90"], "all linear layers"),
    "smollm2-decode": (smollm2, decode, [1], ["1:10:8", "csr90", "v8:1:8"], "all linear layers but the last"),
    "resnet18-cifar": (lambda: resnet18(10), images(32), [1, 16], ["csr90", "csr95", "fanin90", "v4:1:8"], CONVS),
    "resnet18-imagenet": (lambda: resnet18(), images(224), [1, 16], ["csr90", "csr95", "fanin90", "v4:1:8"], CONVS),
    "mobilenet": (mobilenet, images(224), [1, 16], ["csr90", "v4:1:8"], CONVS),
}

# one layer of (channels, size of the image), for itself
LAYERS = {f"conv-{channels}x{size}": (channels, size) for channels, size in ((64, 32), (128, 16), (256, 8), (512, 7))}


def layer(channels):
    """A convolution with kernel_size=3 alone."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))


for _name, (_channels, _size) in LAYERS.items():
    _plans = ["csr90", "csr95", "fanin90", "bsr90", "1:10:8", "v4:1:8", "v4:1:10", "v4:1:16", "v4:1:20"]
    MODELS[_name] = (functools.partial(layer, _channels), images(_size, _channels), [1, 16], _plans, "the layer")


def is_pruned(name, module, attribute):
    """The weights of image networks that a plan makes sparse."""
    return isinstance(module, (nn.Conv2d, nn.Linear)) and attribute == "weight" and module.weight.shape[1] > 3


def is_image_network(model):
    """Whether it has convolutions."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def sparsified(model, plan):
    """Return a copy of the model with the layout that `plan` names."""
    layout, sparsity = make_layout(plan)
    weights = is_pruned if is_image_network(model) else None
    return sten.sparsify(copy.deepcopy(model), layout, sparsity=sparsity, weights=weights).eval()


def check(plan, model, inputs, batch):
    """Stop unless the sparse model's output agrees with that of the same model with dense weights."""
    dense = sten.densify(copy.deepcopy(model))
    torch.manual_seed(1)
    got = inputs(model, batch)()
    torch.manual_seed(1)
    expected = inputs(dense, batch)()
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < 1e-4:
        sys.exit(f"{plan} is wrong by {error:.3g} of the norm of the output; it is not timed")
    return error


def quantized(model):
    """Return a copy whose linear layers are dynamic int8, of torch itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's own function is the one without further packages
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)


def rivals(model, arguments):
    """Return {name: model} of the other ways to run the dense model."""
    found = {}
    if is_image_network(model):
        found["channels_last"] = copy.deepcopy(model).to(memory_format=torch.channels_last)
    else:
        found["dynamic int8"] = quantized(model)
    if arguments.compiled:
        found["compiled"] = torch.compile(copy.deepcopy(model), options={"freezing": True})
    return found


def measure(name, batch, plans, arguments):
    """Check and time the plans of one model at one batch size."""
    make, inputs, _, _, pruned = MODELS[name]
    torch.manual_seed(0)
    dense = make().eval()
    models = {"dense": dense, **rivals(dense, arguments)}
    errors, densities = {}, {}
    for plan in plans:
        models[plan] = sparsified(dense, plan)
        errors[plan] = check(plan, models[plan], inputs, batch)
        entries = [p for p in models[plan].parameters() if isinstance(p, sten.SparseTensor)]
        densities[plan] = sum(p.density * p.numel() for p in entries) / sum(p.numel() for p in entries)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    calls = {key: inputs(model, batch) for key, model in models.items()}
    times = {key: [] for key in calls}
    for call in calls.values():
        call(), call()
    for number in range(arguments.rounds):
        keys = list(calls)
        random.Random(number).shuffle(keys)  # what the call before leaves in caches is a fifth of a short call
        for key in keys:
            start = clock()
            calls[key]()
            times[key].append((clock() - start) * 1e3)
    rows = []
    for key, taken in times.items():
        ratios = [a / b for a, b in zip(times["dense"], taken, strict=True)]
        rows.append(
            {
                "model": name,
                "batch": batch,
                "plan": key,
                "pruned": pruned if key in plans else None,
                "milliseconds": round(statistics.median(taken), 2),
                "ratio": round(statistics.median(ratios), 2),
                "quartiles": [round(q, 2) for q in statistics.quantiles(ratios, n=4)[::2]],
                "density": round(densities[key], 4) if key in plans else None,
                "relative_error": errors.get(key),
            }
        )
        row = rows[-1]
        print(
            f"{name:18} {batch:5}  {key:14} {row['milliseconds']:10.2f} ms {row['ratio']:7.2f}  {row['quartiles']}",
            flush=True,
        )
    return rows


def main():
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [name for name in MODELS if name not in LAYERS]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=names, metavar="MODEL")
    parser.add_argument(
        "--plans", nargs="+", metavar="PLAN", help="csr90, fanin90, 1:10:8, v4:1:8; default: the model's"
    )
    parser.add_argument("--batches", nargs="+", type=int, help="default: the model's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true", help="torch.compile as a rival (some minutes more)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    parser.add_argument("--json", help="write the results here")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        arguments.threads = 1
    torch.set_num_threads(arguments.threads)
    on = setting(arguments) | {"dense": "the eager model, same process, calls interleaved, median of ratios"}
    print(f"{on['device']}, {on['instruction_set']}, {on['threads']} thread(s), {on['clock']}, torch {on['torch']}")
    print(f"{'model':18} {'batch':>5}  {'plan':14} {'median':>13} {'ratio':>7}  quartiles", flush=True)
    results = []
    for name in arguments.models:
        _, _, batches, plans, _ = MODELS[name]
        for batch in arguments.batches or batches:
            results += measure(name, batch, arguments.plans or plans, arguments)
            if arguments.json:  # at once, so that a run that is stopped keeps what it has
                with open(arguments.json, "w") as file:
                    json.dump({"setting": on, "load_after": os.getloadavg(), "results": results}, file, indent=1)


if __name__ == "__main__":
    with torch.no_grad():
        main()
