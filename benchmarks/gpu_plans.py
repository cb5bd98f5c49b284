"""The models of `gpu_model.py`, of transformers' own classes, and the plans that make them sparse."""

import copy

import torch
from gpu_rivals import Float8, Int4
from torch.nn import functional as F

import sten

CONFIGS = {  # name: (model type, arguments, layers, tokens or images of a prefill)
    "llama-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                           "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}, 8),
    "qwen-8b": ("qwen3", {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
                          "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}, 8),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_head": 25, "n_inner": 6400, "n_positions": 8192}, 16),
    "bert-large": ("bert", {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}, 24),
    "vit-large": ("vit", {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}, 24),
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "n_embd": 64, "n_head": 4, "n_inner": 256, "head_dim": 16, "image_size": 32, "patch_size": 8,
}  # fmt: skip


def plans(tiny: bool) -> dict[str, tuple | sten.extend.ActivationMethod]:
    """{name: (layout of the MLP, layout of the other linear layers, sparsity), or what the inputs of the MLP keep}."""
    vector = sten.VectorNM(1, 4, 16 if tiny else 128)
    blocks = sten.BSR(block=(16, 16) if tiny else (128, 128))
    return {
        "vector-mlp": (vector, None, None),
        "2:4": (sten.NM(2, 4), sten.NM(2, 4), None),
        "16:32": (sten.NM(16, 32), sten.NM(16, 32), None),
        "vector-mlp+2:4": (vector, sten.NM(2, 4), None),
        "bsr80-mlp": (blocks, None, 0.8),
        "inputs50-mlp": sten.TopK(0.5),
        "inputs70-mlp": sten.TopK(0.3),
        "thresholds50-mlp": sten.Threshold(sparsity=0.5),
        "thresholds70-mlp": sten.Threshold(sparsity=0.7),
    }


def make(name: str, layers: int | None, device: str, dtype, tiny: bool, **changes):
    """A model with random weights: (model, number of inner features)."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    kind, given, usual = CONFIGS[name]
    arguments = dict(given)
    if tiny:
        arguments = {key: TINY.get(key, value) for key, value in (*given.items(), ("vocab_size", 128))}
        arguments |= {"image_size": 32, "patch_size": 8} if kind == "vit" else {}
    count = layers or (2 if tiny else usual)
    arguments |= {"n_layer" if kind == "gpt2" else "num_hidden_layers": count, **changes}
    config = AutoConfig.for_model(kind, **arguments)
    auto = AutoModel if kind in ("bert", "vit") else AutoModelForCausalLM
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype)
    return model.eval(), arguments.get("n_inner") or arguments["intermediate_size"]


def linears(model, inner: int) -> dict[str, bool]:
    """{name of a linear layer of the blocks: whether it belongs to an MLP}."""
    rows = sten.plan(model, sten.Masked(), sparsity=0.5).rows
    names = [row.name.removesuffix(".weight") for row in rows if row.layout != "dense"]
    return {name: inner in model.get_submodule(name).weight.shape for name in names}


def copy_of(model, shared: set[str]):
    """A copy whose weights outside of the linear layers in `shared` are the model's own."""
    own = {id(model.get_submodule(name).weight) for name in shared}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def sparsified(model, plan, chosen: dict[str, bool], **keywords):
    if isinstance(plan, sten.extend.ActivationMethod):
        return sparse_inputs(model, plan, chosen)
    mlp, other, sparsity = plan
    layouts = {model.get_submodule(name): mlp if in_mlp else other for name, in_mlp in chosen.items()}
    return sten.sparsify(model, layouts, sparsity=sparsity, **keywords)


def sparse_inputs(model, method: sten.extend.ActivationMethod, chosen: dict[str, bool]):
    names = [name for name, in_mlp in chosen.items() if in_mlp]
    for name in names:  # input-major: what an entry of the input reads is contiguous
        weight = model.get_submodule(name).weight
        weight.data = weight.data.t().contiguous().t()
    if isinstance(method, sten.TopK):
        return sten.sparsify(model, sten.FanIn(), method, site="input", modules=names)
    tokens = [prompt(model, 1, 512, weight.device)]
    return sten.sparsify(model, sten.CSR(), method, site="input", modules=names, calibration=tokens)


def worst_product(model, chosen: dict[str, bool], inputs: dict) -> tuple[float, float]:
    """The largest relative error of a layer with a sparse input, on the input that it gets, and the part of these
    inputs that is zero: which entries are kept is decided by the last bits of the layers before, so that whole models
    cannot be compared."""
    errors, zeros = [], []

    def compare(layer, arguments, y):
        x = arguments[0].to_dense().flatten(0, -2)
        right = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
        errors.append(((y.flatten(0, -2).double() - right).norm() / right.norm()).item())
        zeros.append((x == 0).double().mean().item())

    layers = [model.get_submodule(name) for name, in_mlp in chosen.items() if in_mlp]
    hooks = [layer.register_forward_hook(compare) for layer in layers]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return max(errors), sum(zeros) / len(zeros)


def stored_bytes(model) -> int:
    total = 0
    for p in model.parameters():
        total += sum(part.nbytes for part in p.parts.values()) if hasattr(p, "sparse_layout") else p.nbytes
    return total + sum(m.stored_bytes() for m in model.modules() if isinstance(m, (Int4, Float8)))


def prompt(model, batch: int, tokens: int, device) -> dict:
    """The inputs of a prefill: text, or images for a vision model."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, device=device, dtype=model.dtype)}
    text = {"input_ids": torch.randint(0, config.vocab_size, (batch, tokens), device=device)}
    return text | ({"use_cache": False, "logits_to_keep": 1} if hasattr(model, "generate") else {})


def linears_alone(model, names, tokens: int):
    """A call that runs every linear layer once, on one input a width."""
    layers = [model.get_submodule(name) for name in names]
    widths = {name: model.dense_widths[name] for name in names}
    device, dtype = next(model.parameters()).device, model.dtype
    x = {width: torch.randn(1, tokens, width, device=device, dtype=dtype) for width in set(widths.values())}
    inputs = [x[widths[name]] for name in names]

    def call():
        for layer, each in zip(layers, inputs, strict=True):
            layer(each)

    return call
