"""What torch.utils.flop_counter.FlopCounterMode counts: two operations for each stored entry and token or pixel."""

from __future__ import annotations

import math

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..tensor import OPS, SparseTensor
from .conv import positions
from .padding import used_slots


def stored_entries(w: SparseTensor) -> int:
    """How many entries are stored, without padding."""
    used = used_slots(w)
    return w.parts["values"].numel() if used is None else int(used.sum())


@register_flop_formula([OPS.sparse_linear, OPS.sparse_matmul], get_raw=True)
def product_flops(x: Tensor, w: SparseTensor, *args, **kwargs) -> int:
    return 2 * math.prod(x.shape[:-1]) * stored_entries(w)


@register_flop_formula(OPS.sparse_grad_weight, get_raw=True)
def grad_weight_flops(grad: Tensor, x: Tensor, w: SparseTensor, *args, **kwargs) -> int:
    return 2 * math.prod(x.shape[:-1]) * stored_entries(w)


@register_flop_formula(OPS.sparse_conv, get_raw=True)
def conv_flops(x: Tensor, w: SparseTensor, *args, out_val: Tensor, **kwargs) -> int:
    return 2 * positions(out_val.shape) * stored_entries(w)


@register_flop_formula(OPS.sparse_conv_grad_input, get_raw=True)
def conv_grad_input_flops(grad: Tensor, w: SparseTensor, *args, **kwargs) -> int:
    return 2 * positions(grad.shape) * stored_entries(w)


@register_flop_formula(OPS.sparse_conv_grad_weight, get_raw=True)
def conv_grad_weight_flops(grad: Tensor, x: Tensor, w: SparseTensor, *args, **kwargs) -> int:
    return 2 * positions(grad.shape) * stored_entries(w)
