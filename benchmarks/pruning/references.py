"""What a user would reach for instead of sparsity: 8-bit and 4-bit weights, in plain torch, rounded to nearest."""

from __future__ import annotations

import torch
from cells import chosen_weights
from torch import Tensor, nn

GROUP, INNER_TILES, FEWEST_ROWS = 64, 4, 32


class Int8(nn.Module):
    """Dynamic: 8-bit weights with a scale an output, inputs rounded to 8 bits with a scale a token at each call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = weight.abs().amax(1) / 127
        self.quantized = (weight / self.scale.unsqueeze(1)).round().to(torch.int8).t()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127
        codes = (rows / scale).round().to(torch.int8)
        if x.is_cuda and len(codes) < FEWEST_ROWS:  # torch._int_mm takes more than 16
            codes = nn.functional.pad(codes, (0, 0, 0, FEWEST_ROWS - len(codes)))
        y = (torch._int_mm(codes, self.quantized)[: len(rows)] * scale * self.scale).to(x.dtype)
        return y.view(*x.shape[:-1], -1) if self.bias is None else y.view(*x.shape[:-1], -1) + self.bias

    def stored_bytes(self) -> int:
        return self.quantized.nbytes + self.scale.nbytes // 2


class Int4(nn.Module):
    """Weights only: 4 bits, a scale and a zero for 64 inputs; torch's own product, in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        groups = weight.view(len(weight), -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-6).bfloat16().float()
        zero = (low + 8 * scale).bfloat16().float()
        codes = ((groups - zero) / scale + 8).round().clamp(0, 15).int().view_as(weight)
        self.scales = torch.cat([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()
        if weight.is_cuda:
            packed = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            self.packed = torch._convert_weight_to_int4pack(packed, INNER_TILES)
            self.product = torch.ops.aten._weight_int4pack_mm
        else:
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.product = torch.ops.aten._weight_int4pack_mm_for_cpu
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = self.product(rows, self.packed, GROUP, self.scales).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def stored_bytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes


def quantized(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The model with the layers that sten.sparsify would choose by default in that form, in place."""
    for name in [weight.removesuffix(".weight") for weight in chosen_weights(model)]:
        model.set_submodule(name, kind(model.get_submodule(name)))
    return model
