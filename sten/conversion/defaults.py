"""Which weights `sparsify` takes when it is not told: linear ones, without output layers and low-rank adapters."""

from __future__ import annotations

from torch import nn

ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
LORA = {"lora_a", "lora_b"}


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Conv1D: a linear layer whose weight is (in, out)."""
    names = [(cls.__name__, cls.__module__.partition(".")[0]) for cls in type(module).__mro__]
    return ("Conv1D", "transformers") in names


def is_linear(module: nn.Module, name: str) -> bool:
    """Whether a module computes a linear product with this weight."""
    if isinstance(module, nn.MultiheadAttention):
        return name in ATTENTION
    return name == "weight" and (isinstance(module, nn.Linear) or is_conv1d(module))


def kept_dense(model: nn.Module) -> dict[int, str]:
    """By id, the modules whose weights are linear, but not taken by default, and why."""
    return {**output_layers(model), **adapters(model)}


def output_layers(model: nn.Module) -> dict[int, str]:
    """The layers that compute a language model's logits: pruning them costs more accuracy than any others.

    They are what `get_output_embeddings()` of a module returns, as in Hugging Face's models. In others it is the last
    linear layer, where an Embedding of the model has the same shape (vocabulary, features), as a tied one would.
    """
    found: dict[int, str] = {}
    last, tables = None, set()
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        head = get() if callable(get) else None
        for layer in [head] if isinstance(head, nn.Module) else head or ():
            for part in layer.modules():
                found[id(part)] = "it is the output layer (get_output_embeddings)"
        if isinstance(module, nn.Embedding):
            tables.add((module.num_embeddings, module.embedding_dim))
        elif isinstance(module, nn.Linear):
            last = module
    if last is not None and (last.out_features, last.in_features) in tables:
        found.setdefault(id(last), "it is the output layer (the last one, with the shape of an Embedding)")
    return found


def adapters(model: nn.Module) -> dict[int, str]:
    """The small layers that are trained beside a weight: those that a layer of peft's names, or LoRA's A and B."""
    found: dict[int, str] = {}
    for module in model.modules():
        names = getattr(module, "adapter_layer_names", ())
        if not isinstance(names, (tuple, list)):
            names = ()
        pair = [name for name in module._modules if name.lower() in LORA]
        for name in {*names, *(pair if len(pair) == 2 else ())}:
            for part in module._modules[name].modules() if module._modules.get(name) is not None else ():
                found[id(part)] = "it belongs to a low-rank adapter"
    return found
