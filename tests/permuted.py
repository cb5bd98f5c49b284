"""Models with channels that can change places. A helper of the tests, not a test."""

from __future__ import annotations

import torch
from torch import nn

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50, "num_hidden_layers": 2}
IDS = torch.arange(14).view(2, 7)


def hugging_face(kind: str, **more) -> tuple[nn.Module, dict]:
    """A small model with random weights, biases included, and an example; `more` is for its configuration."""
    from transformers import AutoConfig, AutoModel

    sizes = {**SIZES, "num_key_value_heads": 2}
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 50}
    if kind == "vit":
        sizes = {**SIZES, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **{**sizes, **more})).eval()
    uneven(model)
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)} if kind == "vit" else {"input_ids": IDS}


def uneven(model: nn.Module) -> nn.Module:
    """Weights whose rows and columns differ in size, and biases and norms whose entries all differ."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=random) * 0.05)
            if p.dim() > 1:
                p.mul_(torch.randn(p.shape[0], *[1] * (p.dim() - 1), generator=random).exp())
                p.mul_(torch.randn(1, p.shape[1], *[1] * (p.dim() - 2), generator=random).exp())
        for b in model.buffers():
            if b.is_floating_point() and b.dim() == 1:
                b.add_(torch.rand(b.shape, generator=random))
    return model


def mlp() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = nn.Linear(12, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 24, bias=False), nn.Tanh(), nn.Linear(24, 4)
    return uneven(nn.Sequential(*layers)).eval(), torch.randn(5, 12)


class Residual(nn.Module):
    """A convolution, a residual block as in a ResNet, and a classifier on pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True),
            nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Hardswish(), nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.last, self.head = nn.Conv2d(16, 20, 1), nn.Linear(20 * 4, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.block(x)).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(self.last(x).relu(), 2).flatten(1))


def resnet() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return uneven(Residual()).eval(), torch.randn(2, 3, 8, 8)
