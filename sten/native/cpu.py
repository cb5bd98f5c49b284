"""The C++ kernels of the CPU, where they are built; they know float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import cpp
from ..dispatch import OPERATORS, kernel
from ..layout import Layout
from ..layouts import CSR, GroupedNM
from . import expand as expand  # registered first, so that these replace it


def choose_linear(shape: tuple[int, ...], dtype: torch.dtype, spec: Layout) -> tuple[str, str]:
    """The C++ kernels know float32."""
    if dtype is torch.float32:
        return "float32", "C++ kernel: multiplies the stored entries alone"
    return "reference", f"expands to dense: the C++ kernel is for float32, not {str(dtype).removeprefix('torch.')}"


def choose_conv(shape: tuple[int, ...], dtype: torch.dtype, spec: Layout) -> tuple[str, str]:
    """A window of one pixel is a product; torch's convolution has no sparse form otherwise."""
    if any(size != 1 for size in shape[3:]):
        return "reference", "expands to dense: only a convolution with a window of 1 has a faster kernel here"
    variant, reason = choose_linear(shape, dtype, spec)
    where = " where channels lie last (channels_last) and groups=1, and expands to dense elsewhere"
    return variant, reason if variant == "reference" else reason + where


def csr_linear(x: Tensor, weight: dict[str, Tensor], bias: Tensor | None, *, spec, shape, variant) -> Tensor:
    """C++: a row of the weight at a time, its entries gathered from a panel of activations."""
    return CSR_LINEAR(x, weight["values"], weight["crow"], weight["col"], bias, shape[0])


def grouped_nm_linear(x: Tensor, weight: dict[str, Tensor], bias: Tensor | None, *, spec, shape, variant) -> Tensor:
    """C++: accumulators stay in registers from one pattern to the next."""
    return GROUPED_LINEAR(x, weight["values"], weight["index"], bias, spec.n, spec.m, spec.g, shape[0])


def pointwise_conv(linear: Callable) -> Callable:
    """The convolution with a window of one pixel that a kernel of linear gives, for images whose channels lie last.

    Turning others around takes longer than the product saves, so they go to the reference.
    """

    def conv(x, weight, bias, *, spec, shape, variant, stride, padding, dilation, groups):
        if groups != 1 or not x.movedim(1, -1).is_contiguous():
            geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
            return OPERATORS["conv2d"].reference(x, weight, bias, spec=spec, shape=shape, **geometry)
        x = torch.nn.functional.pad(x, [p for p in reversed(padding) for _ in range(2)]) if any(padding) else x
        pixels = x[(..., *(slice(None, None, s) for s in stride))].movedim(1, -1)
        return linear(pixels, weight, bias, spec=spec, shape=shape[:2], variant=variant).movedim(-1, 1)

    conv.__name__ = linear.__name__.replace("linear", "conv")
    return conv


if cpp.available():
    CSR_LINEAR, GROUPED_LINEAR = torch.ops.sten.csr_linear.default, torch.ops.sten.grouped_nm_linear.default
    for _layout, _linear in ((CSR, csr_linear), (GroupedNM, grouped_nm_linear)):
        kernel("linear", weight=_layout, device="cpu", choose=choose_linear)(_linear)
        kernel("conv2d", weight=_layout, device="cpu", choose=choose_conv)(pointwise_conv(_linear))
else:
    _why = f"they do not load here ({cpp.load_error()})" if cpp.load_error() else "they are not built"
    warnings.warn(
        f"sten: running without the C++ kernels: {_why}. Everything works, nothing is faster than dense on this CPU; "
        "`python setup.py build_ext --inplace`, or a reinstallation where g++ is present, builds them.",
        stacklevel=2,
    )
