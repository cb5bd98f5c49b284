"""Convolutions by the C++ kernels of the CPU: directly, or as the product that a convolution with kernel_size=1 is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Flags, Plan, kernel, memory_format
from ..layouts import BSR, CSR, NM, FanIn, GroupedNM, VectorNM
from ..layouts.base import Layout, Parts
from . import cpp
from .cpu import (
    BANDS,
    Run,
    band_linear,
    csr_linear,
    float32_by,
    grouped_nm_linear,
    nm_linear,
    stored_rows,
)

LAST = (torch.channels_last, torch.channels_last_3d)
FEW_PIXELS = 256  # of all images: expanding takes longer than multiplying too many entries
# layouts with a direct convolution -> (whether the channels come last in a row of the weight; up to which density it is
# faster than a dense convolution of many images)
DIRECT: dict[type[Layout], tuple[bool, float]] = {
    CSR: (False, 0.5),
    FanIn: (False, 0.5),
    VectorNM: (True, 0.8),
    BSR: (False, 0.7),
    GroupedNM: (False, 0.6),
}


def two_sizes(flat: bool, sizes: tuple[int, ...], usual: int) -> tuple[int, ...]:
    """Sizes of conv2d: of conv1d (flat), whose images have one row, or as given, where one stands for both."""
    return (usual, *sizes) if flat else tuple(sizes) * (2 // len(sizes))


def direct_conv(layout: Layout, shape: tuple[int, ...], intercepted: bool, geometry: dict) -> Run:
    """`run` of conv1d and conv2d: each stored entry multiplies the pixels of a tile, which are side by side."""
    flat, outputs = len(shape) == 3, shape[0]
    sizes = zip((shape[2:], *(geometry[name] for name in ("stride", "padding", "dilation"))), (1, 1, 0, 1), strict=True)
    numbers = [*(size for each, usual in sizes for size in two_sizes(flat, each, usual)), geometry["groups"]]
    conv = (band_conv if type(layout) in BANDS else grouped_nm_conv)(layout, shape, intercepted, numbers, outputs)

    def run(x: Tensor, weight: Parts, bias: Tensor | None, **geometry) -> Tensor:
        if flat:
            return conv(x.unsqueeze(2), weight, bias).squeeze(2)
        y = conv(x, weight, bias)
        return y if x.is_contiguous() or memory_format(x) not in LAST else y.contiguous(memory_format=LAST[0])

    return run


def band_conv(layout: Layout, shape: tuple[int, ...], intercepted: bool, geometry: list[int], outputs: int) -> Run:
    """The convolution (x, parts, bias) of a layout whose rows are in bands."""
    conv, band = cpp.operator("band_conv2d", intercepted), BANDS[type(layout)]
    (height, _, columns), inputs_last = band.sizes(layout, shape), DIRECT[type(layout)][0]

    def run(x: Tensor, weight: Parts, bias: Tensor | None) -> Tensor:
        (crow, col), row = band.pattern(weight), stored_rows(weight, outputs)
        values = weight["values"].contiguous()
        if row is None:
            return conv(x, values, crow, col, bias, height, columns, inputs_last, geometry, outputs)
        some = conv(x, values, crow, col, None, height, columns, inputs_last, geometry, len(row))
        y = some.new_zeros(len(some), outputs, *some.shape[2:]).index_copy_(1, row, some)
        return y if bias is None else y.add_(bias.view(-1, 1, 1))

    return run


def grouped_nm_conv(
    layout: GroupedNM, shape: tuple[int, ...], intercepted: bool, geometry: list[int], outputs: int
) -> Run:
    """The same for GroupedNM."""
    conv, sizes = cpp.operator("grouped_nm_conv2d", intercepted), (layout.n, layout.m, layout.g)

    def run(x: Tensor, weight: Parts, bias: Tensor | None) -> Tensor:
        return conv(x, weight["values"].contiguous(), weight["index"], bias, *sizes, geometry, outputs)

    return run


def why_not_direct(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> str | None:
    """Why a dense convolution is faster than a direct sparse one, or None."""
    groups = flags.geometry["groups"]
    if type(layout) not in DIRECT:
        fast = "kernel_size=1, groups=1 and channels_last input"
        return f"for {type(layout).__name__} only a convolution with {fast} has a faster kernel here"
    if len(shape) == 5:
        return "in three dimensions only kernel_size=1 with channels_last input has a faster kernel here"
    if groups > 1 and shape[1] == 1:
        return "a dense depthwise convolution is faster"
    if groups > 1 and layout.omits_empty_rows:
        return f"{layout} has a faster kernel for groups=1 only"
    density = None if flags.entries is None else flags.entries / max(1, math.prod(shape))
    most = DIRECT[type(layout)][1] * (1 if dtype is torch.float32 else 0.5)
    if density is not None and density > most and (flags.tokens is None or flags.tokens > FEW_PIXELS):
        return f"with {density:.0%} of the entries stored a dense convolution is faster, up to {most:.0%} this kernel"
    return None


def conv_by(prepare_product: Callable[..., Plan]) -> Callable[..., Plan]:
    """The `prepare` of a convolution: by that of linear where it is a product, else directly."""

    def prepare(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
        one = all(size == 1 for size in shape[2:]) and flags.geometry["groups"] == 1
        if one and flags.memory_format in LAST:
            plan = prepare_product(layout, shape, dtype, flags)
            run = plan.run and functools.partial(pointwise, plan.run)
            return Plan.of(plan.variant, plan.reason, run)
        why = why_not_direct(layout, shape, dtype, flags)
        if why:
            return Plan.of("reference", f"expands to dense: {why}", None)

        def direct(layout: Layout, shape: tuple[int, ...], intercepted: bool) -> Run:
            return direct_conv(layout, shape, intercepted, flags.geometry)

        return float32_by(direct)(layout, shape, dtype, flags)

    prepare.__name__ = prepare_product.__name__.replace("linear", "conv")
    return prepare


def pointwise(linear: Run, x: Tensor, weight, bias, *, stride, padding, dilation, groups) -> Tensor:
    """The convolution with kernel_size=1, by a product with the channels of each pixel."""
    if any(padding):
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    pixels = x[(..., *(slice(None, None, s) for s in stride))].movedim(1, -1)
    return linear(pixels, weight, bias).movedim(-1, 1)


if cpp.available():
    for _layout, _prepare in (
        (CSR, float32_by(csr_linear)),
        (GroupedNM, float32_by(grouped_nm_linear)),
        (NM, nm_linear),
        *((layout, float32_by(band_linear)) for layout in (VectorNM, BSR, FanIn)),
    ):
        kernel("conv2d", weight=_layout, device="cpu", prepare=True)(conv_by(_prepare))
