"""What a user would reach for instead of sparsity, as layers of plain torch: 4-bit weights and fp8 products.

Both take the place of linear layers of a model. `Int4` multiplies by tinygemm, with groups of 128 inputs; `Float8` by
`torch._scaled_mm`, one scale a tensor, its activations quantized at each call.
"""

import torch
from torch import nn

GROUP, INNER_TILES, FLOAT8 = 128, 8, torch.float8_e4m3fn


def weight_and_bias(linear):
    """The weight as (out, in), of nn.Linear or of Hugging Face's Conv1D."""
    weight = linear.weight.detach()
    return weight if isinstance(linear, nn.Linear) else weight.t().contiguous(), linear.bias


class Int4(nn.Module):
    """Weight-only: 4 bits, a scale and a zero for each group of inputs (bfloat16)."""

    def __init__(self, linear):
        super().__init__()
        weight, self.bias = weight_and_bias(linear)
        groups = weight.float().view(len(weight), -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-6).to(weight.dtype).float()
        zero = (low + 8 * scale).to(weight.dtype).float()
        code = ((groups - zero) / scale + 8).round().clamp(0, 15).int()
        self.out_features, self.decoded = len(weight), ((code - 8) * scale + zero).view_as(weight).to(weight.dtype)
        code = code.view_as(weight)
        packed = (code[:, ::2] << 4 | code[:, 1::2]).to(torch.uint8)
        self.packed = torch._convert_weight_to_int4pack(packed, INNER_TILES)
        self.scales = torch.cat([scale, zero], -1).to(weight.dtype).transpose(0, 1).contiguous()

    @staticmethod
    def takes(weight):
        return weight.shape[0] % 8 == 0 and weight.shape[1] % (INNER_TILES * 16) == 0

    def forward(self, x):
        y = torch.ops.aten._weight_int4pack_mm(x.reshape(-1, x.shape[-1]).contiguous(), self.packed, GROUP, self.scales)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def stored_bytes(self):
        return self.packed.nbytes + self.scales.nbytes


class Float8(nn.Module):
    """Dynamic fp8: the weight is quantized once, x at each call."""

    def __init__(self, linear):
        super().__init__()
        weight, self.bias = weight_and_bias(linear)
        self.scale = weight.abs().amax().float() / torch.finfo(FLOAT8).max
        self.quantized, self.out_features = (weight / self.scale).to(FLOAT8), len(weight)
        self.decoded = (self.quantized.float() * self.scale).to(weight.dtype)

    @staticmethod
    def takes(weight):
        return weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        scale = flat.abs().amax().float().clamp(min=1e-12) / torch.finfo(FLOAT8).max
        quantized = (flat / scale).clamp(-448, 448).to(FLOAT8)
        y = torch._scaled_mm(
            quantized, self.quantized.t(), scale, self.scale, bias=self.bias, out_dtype=x.dtype, use_fast_accum=True
        )
        return y.view(*x.shape[:-1], self.out_features)

    def stored_bytes(self):
        return self.quantized.nbytes + self.scale.nbytes


def replace_linears(model, names, kind) -> None:
    """Replace the layers of these names by `kind`, in place, and check each kind of shape against its own weight."""
    checked = set()
    for name in names:
        linear = model.get_submodule(name)
        weight, bias = weight_and_bias(linear)
        if not kind.takes(weight):
            continue
        layer = kind(linear)
        if weight.shape not in checked:
            checked.add(weight.shape)
            x = torch.randn(32, weight.shape[1], device=weight.device, dtype=weight.dtype)
            expected = nn.functional.linear(x, layer.decoded, bias)
            error = ((layer(x) - expected).float().norm() / expected.float().norm()).item()
            if not error < (5e-2 if kind is Float8 else 2e-2):
                raise SystemExit(f"{kind.__name__} of {name}: relative error {error:.3g} against its own weight")
        del layer.decoded
        model.set_submodule(name, layer)
