"""explain: `sten.explain` of a file of `sten.save`, or of a model of transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conversion import sparsify
from ..conversion.sensitivity import Candidate
from ..explanation import explain
from ..io import read_state
from ..tensor import SparseTensor


class Product(nn.Module):
    """What a file says of a layer: a product with its weight."""

    def __init__(self, weight: SparseTensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.transposed = weight.transposed

    def input(self, tokens: int) -> Tensor:
        w = self.weight
        return torch.randn(tokens, w.shape[0 if self.transposed else 1], device=w.device, dtype=w.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.transposed else F.linear(x, self.weight)


class Products(nn.Module):
    """The sparse matrices of a file, under the names of their modules; forward multiplies each with random inputs."""

    def __init__(self, weights: dict[str, SparseTensor]) -> None:
        super().__init__()
        self.layers: list[Product] = []
        for name, weight in weights.items():
            *path, last = name.removesuffix(".weight").split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module._modules[part] = nn.Module()
                module = module._modules[part]
            module._modules[last] = Product(weight)
            vars(self)["layers"].append(module._modules[last])

    def forward(self, tokens: int) -> None:
        for layer in vars(self)["layers"]:
            layer(layer.input(tokens))


def run(
    what: str,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype | None,
    layout: Candidate | None,
    seconds: float,
    html: Path | None,
    json_path: Path | None,
) -> None:
    """Print the explanation; ValueError, OSError or FormatError say what cannot be read."""
    if os.path.isfile(what):
        model, inputs = _of_file(what, tokens, device, dtype), {"tokens": tokens}
    else:
        model = _of_transformers(what, dtype).to(device)
        inputs = {name: value.to(device) for name, value in _inputs(model, tokens).items()}
    if layout is not None:
        made, sparsity = layout
        sparsify(model, made, sparsity=sparsity)
    found = explain(model, seconds=seconds, **inputs)
    print(found)
    if html is not None:
        found.save(html)
    if json_path is not None:
        json_path.write_text(json.dumps(found.records(), indent=1) + "\n", encoding="utf-8")


def _of_file(path: str, tokens: int, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    state, *_ = read_state(path)
    weights = {name: w for name, w in state.items() if isinstance(w, SparseTensor) and w.dim() == 2}
    if not weights:
        raise ValueError(f"Expected a file of sten.save with sparse matrices, got none in {path}.")
    print(f"{path}: its {len(weights)} sparse matrices, multiplied with {tokens} random inputs each")
    return Products({name: w.to(device, dtype) for name, w in weights.items()})


def _of_transformers(what: str, dtype: torch.dtype | None) -> nn.Module:
    if not os.path.isdir(what) and (what.startswith((".", "/", "~")) or what.endswith((".safetensors", ".pt", ".bin"))):
        raise FileNotFoundError(
            f"Expected a file of sten.save, a folder or the name of a model, got no such file: {what}."
        )
    try:
        import transformers
    except ImportError:
        raise ValueError(f"Expected transformers to load {what!r}, got none; `pip install transformers`.") from None
    from ..integrations import transformers as _integration  # noqa: F401 - registers how folders of sparse weights load

    config = transformers.AutoConfig.from_pretrained(what)
    names = config.architectures or []
    cls = next((found for name in names if (found := getattr(transformers, name, None)) is not None), None)
    if cls is None:
        cls = transformers.AutoModel
    return cls.from_pretrained(what, dtype=dtype or "auto").eval()


def _inputs(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    """Random inputs: tokens for a model of texts, an image for one of images."""
    config: Any = model.config
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        dtype = next(model.parameters()).dtype
        return {name: torch.randn(1, getattr(config, "num_channels", 3), *sides, dtype=dtype)}
    if name != "input_ids":
        raise ValueError(f"Expected a model of texts or images, got one that takes {name}; call sten.explain yourself.")
    ids = torch.randint(config.get_text_config().vocab_size, (1, tokens))
    return {name: ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {name: ids}
