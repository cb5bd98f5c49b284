"""The kernels that sten brings: C++ on the CPU where they are built, and an honest expansion to dense everywhere else.

They come in through `sten.kernel`, the door that is open to everybody. A layout without a faster kernel for an operator
gets one that unpacks it: correct, it saves memory and not time, and `sten.which` says so.
"""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor

from . import cpp, ops
from .dispatch import OPERATORS, kernel
from .layout import Layout
from .layouts import BSR, CSR, NM, GroupedNM, Masked, VectorNM

LAYOUTS = (Masked, CSR, BSR, NM, GroupedNM, VectorNM)
DEVICES = ("cpu", "cuda")

EXPANDS = "expands to dense: no faster kernel for this layout here; saves memory, not time"
REASONS = {
    "linear_grad_weight": "makes the dense gradient and gathers it at the pattern: no faster kernel for this layout here",
    "conv2d_grad_weight": "makes the dense gradient and gathers it at the pattern: no faster kernel for this layout here",
    "embedding": "unpacks the rows that are looked up, and no others",
    "embedding_grad_weight": "makes the dense gradient and gathers it at the pattern: no faster kernel for this layout here",
}


def expand(name: str, layout: type[Layout], device: str) -> None:
    """Register the reference implementation of an operator as the kernel of a layout, with the reason it is no faster."""
    reference = OPERATORS[name].reference

    def kernel_of(*args, **kwargs):
        return reference(*args, **kwargs)

    kernel_of.__name__ = f"{name}_expand"
    kernel_of.__doc__ = REASONS.get(name, EXPANDS)
    if layout is Masked and name not in REASONS:
        kernel_of.__doc__ = "multiplies the dense values under the mask; saves neither memory nor time"
    kernel(name, weight=layout, device=device)(kernel_of)


for _name, _layout, _device in itertools.product(OPERATORS, LAYOUTS, DEVICES):
    if "weight" in OPERATORS[_name].sparse:
        expand(_name, _layout, _device)


def choose_linear(shape: tuple[int, ...], dtype: torch.dtype, spec: Layout) -> tuple[str, str]:
    """The C++ kernels know float32."""
    if dtype is torch.float32:
        return "float32", "C++ kernel: multiplies the stored entries alone"
    return "reference", f"expands to dense: the C++ kernel is for float32, not {str(dtype).removeprefix('torch.')}"


def csr_linear(x: Tensor, weight: dict[str, Tensor], bias: Tensor | None, *, spec, shape, variant) -> Tensor:
    """C++: a row of the weight at a time, its entries gathered from a panel of activations."""
    return torch.ops.sten.csr_linear.default(x, weight["values"], weight["crow"], weight["col"], bias, shape[0])


def grouped_nm_linear(x: Tensor, weight: dict[str, Tensor], bias: Tensor | None, *, spec, shape, variant) -> Tensor:
    """C++: accumulators stay in registers from one pattern to the next."""
    operands = (x, weight["values"], weight["index"], bias)
    return torch.ops.sten.grouped_nm_linear.default(*operands, spec.n, spec.m, spec.g, shape[0])


if cpp.available():
    kernel("linear", weight=CSR, device="cpu", choose=choose_linear)(csr_linear)
    kernel("linear", weight=GroupedNM, device="cpu", choose=choose_linear)(grouped_nm_linear)
else:
    _why = f"they do not load here ({cpp.load_error()})" if cpp.load_error() else "they are not built"
    warnings.warn(
        f"sten: running without the C++ kernels: {_why}. Everything works, nothing is faster than dense on this CPU; "
        "`python setup.py build_ext --inplace`, or a reinstallation where g++ is present, builds them.",
        stacklevel=2,
    )

__all__ = ["EXPANDS", "choose_linear", "expand", "ops"]
