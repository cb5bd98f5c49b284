"""Sparse inputs without training (TEAL): one fraction in all layers of an MLP, or more where dropping costs less.

    python examples/teal.py                    # a small random model; at 50 %
    python benchmarks/activations.py teal      # SmolLM2-135M

A layer keeps the inputs with |x| above a threshold of its own, a quantile of what it reads. `uniform` drops the same
fraction everywhere; `greedy` chooses it for each layer, so that each block's weights meet the same sparsity on average.
Source: Liu et al., Training-Free Activation Sparsity in Large Language Models, https://arxiv.org/abs/2408.14690.
"""

import contextlib

import torch
from torch.nn import functional as F

import sten

LAYERS = ("gate_proj", "up_proj", "down_proj")


@contextlib.contextmanager
def before_calls(model, names, function):
    """Call function(name, args, kwargs) before each of these modules; what it returns are their new arguments."""
    with contextlib.ExitStack() as stack:
        for name in names:
            hook = lambda module, args, kwargs, name=name: function(name, args, kwargs)  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@torch.no_grad()
def greedy(block, layers, calls, sparsity, step=1 / 30):
    """By layer, the threshold of its input, for a mean sparsity of the block's weights: TEAL's greedy choice.

    In each step that layer drops more of its input for which the block's output moves least from the dense one. `calls`
    are (args, kwargs) of the block; a step is that part of all its weights.
    """
    size = {name: block.get_submodule(name).weight.numel() for name in layers}
    size = {name: numel / sum(size.values()) for name, numel in size.items()}
    seen, edges, dropped = {name: [] for name in layers}, dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def drop(name, args, kwargs):
        if len(seen[name]) < len(calls):  # the first calls, of the dense block
            seen[name].append(args[0].abs().flatten())
        return (args[0] * (args[0].abs() > edges[name]), *args[1:]), kwargs

    def error(name, edge):
        before, edges[name] = edges[name], edge
        moved = [(block(*args, **kwargs) - y).square().sum() for (args, kwargs), y in zip(calls, dense, strict=True)]
        edges[name] = before
        return float(sum(moved))

    with before_calls(block, layers, drop):
        dense = [block(*args, **kwargs) for args, kwargs in calls]
        ordered = {name: torch.cat(found).sort().values for name, found in seen.items()}
        while (left := sparsity - sum(dropped[name] * size[name] for name in layers)) > 1e-6:
            more = {name: dropped[name] + min(step, left) / size[name] for name in layers}
            open_ = [name for name in layers if more[name] <= 1 + 1e-6]
            edge = {name: float(ordered[name][round(more[name] * len(ordered[name])) - 1]) for name in open_}
            best = min(open_, key=lambda name: error(name, edge[name]))
            dropped[best], edges[best] = more[best], edge[best]
    return edges


def uniform_model(model, blocks, batches, sparsity, layout=None):
    """Put the thresholds at the quantile of each layer's inputs; `batches` are tensors of token ids."""
    modules = [f"{block}.{layer}" for block in blocks for layer in LAYERS]
    method, calibration = sten.Threshold(sparsity=sparsity), [{"input_ids": ids} for ids in batches]
    return sten.sparsify(model, layout, method, site="input", modules=modules, calibration=calibration)


def greedy_model(model, blocks, batches, sparsity, layout=None):
    """Put the thresholds where `greedy` finds them, by the inputs that a block has in the dense model."""
    calls = {name: [] for name in blocks}
    with torch.no_grad(), before_calls(model, blocks, lambda name, *call: calls[name].append(call)):
        for ids in batches:
            model(input_ids=ids)
    found = {name: greedy(model.get_submodule(name), LAYERS, calls.pop(name), sparsity) for name in blocks}
    for name, edges in found.items():
        for layer, edge in edges.items():
            sten.sparsify(model, layout, sten.Threshold(edge), site="input", modules=f"{name}.{layer}")
    return model


@torch.no_grad()
def zero_fractions(model, ids):
    """By module with a site at its input, which part of that input is zero."""
    found, names = {}, [site.name for site in sten.summary(model).sites]
    with before_calls(model, names, lambda name, args, kwargs: found.update({name: (args[0] == 0).float().mean()})):
        model(input_ids=ids)
    return {name: round(float(part), 3) for name, part in found.items()}


def main():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2)
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(64, (4, 64))
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        for make in (uniform_model, greedy_model):
            make(model, ["model.layers.0.mlp", "model.layers.1.mlp"], [ids], 0.5)
            print(f"{make.__name__}: error {float(F.mse_loss(model(input_ids=ids).logits, dense) / dense.var()):.4f}")
            print(zero_fractions(model, ids))
            sten.densify(model)


if __name__ == "__main__":
    main()
