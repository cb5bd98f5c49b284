"""Kernels of linear and its gradients with a sparse input, on the CPU (C++) and on CUDA (Triton).

They read the rows of an input-major weight (`W.t()` is contiguous) that the input uses. Where the input uses so much of
it that a dense product, which reads each row once for all tokens, is faster, the Plan is dense.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .. import ops as ops  # declares the operators
from ..dispatch import Flags, Plan, kernel
from ..kernel_table import OPERATORS
from ..layouts import BSR, CSR, FanIn
from ..layouts.base import Layout, Parts
from . import cpp

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
# up to so many tokens, the share of the input from which on a dense product is faster: measured on a CPU, on a GPU
# estimated from one run of the kernels
OWN = {
    "cpu": {1: 0.9, 4: 0.4, 16: 0.2, None: 0.1},
    "cuda": {1: 0.9, 4: 0.2, 64: 0.05, None: 0.005},
}
SHARED = {"cpu": {16: 0.5, None: 0.25}, "cuda": {64: 0.5, None: 0.05}}  # the tokens of a block read a row together
OUTPUT_MAJOR = "the weight is output-major; `layer.weight.data = layer.weight.data.t().contiguous().t()` changes that"


def pattern(parts: Parts) -> tuple[Tensor, Tensor | None, Tensor]:
    """values, crow and index; crow is None for lists, one of equal length a token."""
    values = parts["values"].contiguous()
    return (values, None, parts["index"]) if "index" in parts else (values, parts["crow"], parts["col"])


def stored_tokens(parts: Parts, tokens: int) -> Tensor | None:
    """Which tokens the rows of the parts are, for a layout that leaves out empty ones; None if they are all."""
    row = parts.get("row")
    return None if row is None or len(row) == tokens else row.long()


def of_stored_tokens(grad: Tensor, parts: Parts, tokens: int) -> Tensor:
    """The rows of a gradient that belong to the rows of the parts, contiguous."""
    row = stored_tokens(parts, tokens)
    return grad.contiguous() if row is None else grad.index_select(0, row)


# The operators of a device: (values, crow, index, ...), as those of csrc/register_codes.cpp


def cpu_operators() -> tuple[Callable, Callable, Callable]:
    sten = torch.ops.sten
    return sten.codes_linear.default, sten.codes_grad_values.default, sten.codes_grad_weight.default


def singles(values: Tensor) -> Tensor:
    """The values of blocks of one entry without the dimensions of the block."""
    return values.flatten() if values.dim() == 3 else values


def singles_back(values: Tensor, blocks: bool) -> Tensor:
    return values[:, None, None] if blocks else values


def cuda_operators() -> tuple[Callable, Callable, Callable]:
    codes = kernels.codes
    linear, grad_values, grad_weight = codes.linear.direct, codes.grad_values.direct, codes.grad_weight.direct

    return (
        lambda *tensors_height, tokens: linear(*tensors_height[:-1], tokens),
        lambda grad, *pattern, height, blocks: singles_back(grad_values(grad, *pattern), blocks),
        lambda values, by_columns, grad: grad_weight(singles(values), *by_columns, grad),
    )


def by_columns(input: Parts, shape: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    """What the kernel of linear_grad_weight for CUDA derives from a pattern."""
    return kernels.codes.by_columns(input.get("crow"), input["index" if "index" in input else "col"], shape[1])


# `run` of the three products


def linear(operator: Callable, height: int, tokens: int, columns: int) -> Callable[..., Tensor]:
    def run(input: Parts, weight: Tensor, bias: Tensor | None) -> Tensor:
        row, matrix = stored_tokens(input, tokens), weight.t()
        bias = None if bias is None else bias.contiguous()
        y = operator(*pattern(input), matrix, bias, height, tokens=tokens if row is None else len(row))
        if row is None:
            return y
        empty = y.new_zeros(tokens, y.shape[1]) if bias is None else bias.repeat(tokens, 1)
        return empty.index_copy_(0, row, y)

    return run


def grad_values(operator: Callable, height: int, tokens: int, columns: int) -> Callable[..., Tensor]:
    def run(grad: Tensor, weight: Tensor, input: Parts) -> Tensor:
        values, crow, index = pattern(input)
        grad = of_stored_tokens(grad, input, tokens)
        return operator(grad, crow, index, weight.t(), height=height, blocks=values.dim() == 3)

    return run


def grad_weight(operator: Callable, height: int, tokens: int, columns: int) -> Callable[..., Tensor]:
    def run(grad: Tensor, input: Parts, weight: Tensor) -> Tensor:
        grad = of_stored_tokens(grad, input, tokens)
        return operator(*pattern(input), grad, height=height, columns=columns).t()

    return run


def grad_weight_by_columns(operator: Callable, tokens: int, columns: int) -> Callable[..., Any]:
    """The same on CUDA; with `sums` also those of the columns."""

    def run(grad: Tensor, input: Parts, weight: Tensor, derived: Any = None, sums: bool = False) -> Any:
        grad = of_stored_tokens(grad, input, tokens)
        derived = by_columns(input, (tokens, columns)) if derived is None else derived
        product, of_columns = operator(input["values"].contiguous(), derived, grad)
        return (product.t(), of_columns) if sums else product.t()

    return run


PRODUCTS = {"linear": linear, "linear_grad_sparse_input": grad_values, "linear_grad_weight": grad_weight}


def counted_on_gpu(layout: Layout, shape: tuple, flags: Flags) -> bool:
    """Whether a token has a slot for each column, some of them free: only the GPU knows how many it uses."""
    return flags.device.type == "cuda" and layout.free_slots and shape[0] == 1 and flags.entries == shape[1]


def why_dense(name: str, layout: Layout, shape: tuple, dtype: torch.dtype, flags: Flags) -> str | None:
    """Why a dense product runs; None: the kernel does."""
    (tokens, columns), (height, width), device = shape[0], layout.tile(shape[0]), flags.device.type
    if dtype not in DTYPES[device]:
        return f"expands the input to dense: the kernels are not for {str(dtype).removeprefix('torch.')}"
    if width > 1:
        return "expands the input to dense: the kernels are for blocks of width 1"
    if height > 1 and device == "cuda" and name != "linear":
        return "expands the input to dense: on CUDA the gradients have no kernel for tokens that share their entries"
    if name != "linear_grad_weight" and not flags.geometry["input_major"]:
        return f"expands the input to dense: {OUTPUT_MAJOR}"
    if name == "linear" and counted_on_gpu(layout, shape[0], flags):
        return None
    density = flags.entries / max(1, -(-tokens // height) * height * columns)  # a last block may not be full
    limits = (SHARED if height > 1 and tokens > 1 else OWN)[device]
    limit = next(limit for most, limit in limits.items() if most is None or tokens <= most)
    if density <= limit:
        return None
    use = f"{tokens} token(s) use {density:.2g} of the input{'' if tokens == 1 or height > 1 else ', each its own,'}"
    return f"expands the input to dense: {use} and above {limit:g} a dense product is faster"


def prepare_by(name: str, operator: Callable, device: str) -> Callable[..., Plan]:
    """The `prepare` of a product by the operator of a device."""
    reference, make = OPERATORS[name].reference, PRODUCTS[name]
    on_columns = device == "cuda" and name == "linear_grad_weight"

    def prepare(layout: tuple, shape: tuple, dtype: torch.dtype, flags: Flags) -> Plan:
        why = why_dense(name, layout[0], shape, dtype, flags)
        if why is not None:
            return Plan.of("dense", why, functools.partial(reference, layout=layout, shape=shape))
        height = layout[0].tile(shape[0])[0]  # the tokens that share their entries
        share = f"about {flags.entries / max(1, math.prod(shape[0])):.2g} of them"
        share = "the GPU counts them" if counted_on_gpu(layout[0], shape[0], flags) else share
        reason = f"reads only the rows of the input-major weight that the input uses: {share}"
        if on_columns:
            return Plan.of("codes", reason, grad_weight_by_columns(operator, *shape[0]), by_columns)
        return Plan.of("codes", reason, make(operator, height, *shape[0]))

    prepare.__name__ = f"sparse_input_{name}"
    return prepare


def register(device: str, operators: tuple[Callable, Callable, Callable], kernels_of: str) -> None:
    for name, operator in zip(PRODUCTS, operators, strict=True):
        for layout in (FanIn, CSR, BSR):
            kernel(name, input=layout, device=device, prepare=True)(prepare_by(name, operator, kernels_of))


if cpp.available():
    register("cpu", cpu_operators(), "cpu")
if kernels.available():
    register("cuda", cuda_operators(), "cuda")
