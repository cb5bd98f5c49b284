"""The C++ kernels of the CPU, where they are built; they know float32."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cpp
from ..dispatch import Flags, Plan, kernel
from ..layout import Layout
from ..layouts import CSR, GroupedNM

Linear = Callable[[Tensor, dict[str, Tensor], Tensor | None], Tensor]
LAST = (torch.channels_last, torch.channels_last_3d)


def csr_run(layout: CSR, outputs: int) -> Linear:
    """A row of the weight at a time, its entries gathered from a panel of activations."""
    linear = torch.ops.sten.csr_linear.default
    return lambda x, weight, bias: linear(x, weight["values"], weight["crow"], weight["col"], bias, outputs)


def grouped_nm_run(layout: GroupedNM, outputs: int) -> Linear:
    """Accumulators stay in registers from one pattern to the next."""
    linear, n, m, g = torch.ops.sten.grouped_nm_linear.default, layout.n, layout.m, layout.g
    return lambda x, weight, bias: linear(x, weight["values"], weight["index"], bias, n, m, g, outputs)


def prepare_linear(make: Callable[[Layout, int], Linear], layout: Layout, shape, dtype, flags: Flags) -> Plan:
    """float32 has a C++ kernel; other dtypes expand."""
    if dtype is not torch.float32:
        why = f"expands to dense: the C++ kernel is for float32, not {str(dtype).removeprefix('torch.')}"
        return Plan.of("reference", why, None)
    run, kernel = make(layout, shape[0]), make.__name__.replace("run", "linear")
    return Plan.of("float32", "C++ kernel: multiplies the stored entries alone", run, kernel)


def prepare_conv(make: Callable[[Layout, int], Linear], layout: Layout, shape, dtype, flags: Flags) -> Plan:
    """A window of one pixel is a product of images whose channels lie last; turning others around takes longer than it
    saves, and torch's convolution has no sparse form otherwise."""
    wide, groups = any(size != 1 for size in shape[2:]), flags.geometry["groups"]
    if wide or groups != 1 or flags.memory_format not in LAST:
        why = "a window of 1" if wide else "groups=1" if groups != 1 else "channels that lie last (channels_last)"
        return Plan.of("reference", f"expands to dense: only a convolution with {why} has a faster kernel here", None)
    plan = prepare_linear(make, layout, shape, dtype, flags)
    if plan.run is None:
        return plan
    run = functools.partial(pointwise, plan.run)
    return Plan.of(plan.variant, plan.reason, run, make.__name__.replace("run", "conv"))


def pointwise(linear: Linear, x: Tensor, weight, bias, *, stride, padding, dilation, groups) -> Tensor:
    """The convolution with a window of one pixel, by a product with each pixel's channels."""
    if any(padding):
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    pixels = x[(..., *(slice(None, None, s) for s in stride))].movedim(1, -1)
    return linear(pixels, weight, bias).movedim(-1, 1)


if cpp.available():
    for _layout, _make in ((CSR, csr_run), (GroupedNM, grouped_nm_run)):
        for _name, _prepare in (("linear", prepare_linear), ("conv2d", prepare_conv)):
            kernel(_name, weight=_layout, device="cpu", prepare=True)(functools.partial(_prepare, _make))
else:
    _why = f"they do not load here ({cpp.load_error()})" if cpp.load_error() else "they are not built"
    warnings.warn(
        f"sten: running without the C++ kernels: {_why}. Everything works, nothing is faster than dense on this CPU; "
        "`python setup.py build_ext --inplace`, or a reinstallation where g++ is present, builds them.",
        stacklevel=2,
    )
