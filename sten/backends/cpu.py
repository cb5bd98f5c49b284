"""The C++ kernels of the CPU, for float32, if they are built."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops as ops  # declares the operators
from ..dispatch import Flags, Plan, kernel
from ..layouts import CSR, GroupedNM
from ..layouts.base import Layout, Parts
from . import cpp

Linear = Callable[[Tensor, Parts, Tensor | None], Tensor]
LAST = (torch.channels_last, torch.channels_last_3d)


# A kernel checks the bounds of a pattern once: not again while its parts and their versions are those of the last call.
# Tensors made in inference mode have no version, and intercepted calls no memory: these are checked at every call.


def csr_run(layout: CSR, outputs: int, intercepted: bool) -> Linear:
    """`run` of linear with CSR: row by row, gathering activations from a panel."""
    linear, last = torch.ops.sten.csr_linear.default, None

    def run(x: Tensor, weight: Parts, bias: Tensor | None) -> Tensor:
        nonlocal last
        crow, col, now = weight["crow"], weight["col"], None
        if not intercepted and not col.is_inference():
            now = crow.data_ptr(), crow._version, col.data_ptr(), col._version
        y = linear(x, weight["values"], crow, col, bias, outputs, trusted=now is not None and now == last)
        last = now  # only now: what failed its check is checked again
        return y

    return run


def grouped_nm_run(layout: GroupedNM, outputs: int, intercepted: bool) -> Linear:
    """`run` of linear with GroupedNM: accumulators stay in registers from one pattern to the next."""
    linear, n, m, g, last = torch.ops.sten.grouped_nm_linear.default, layout.n, layout.m, layout.g, None

    def run(x: Tensor, weight: Parts, bias: Tensor | None) -> Tensor:
        nonlocal last
        index, now = weight["index"], None
        if not intercepted and not index.is_inference():
            now = index.data_ptr(), index._version
        y = linear(x, weight["values"], index, bias, n, m, g, outputs, trusted=now is not None and now == last)
        last = now
        return y

    return run


def linear_by(run_of: Callable[[Layout, int, bool], Linear]) -> Callable[..., Plan]:
    """The `prepare` of linear by a C++ kernel, for float32."""

    def prepare(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
        if dtype is not torch.float32:
            why = f"expands to dense: the C++ kernel is for float32, not {str(dtype).removeprefix('torch.')}"
            return Plan.of("reference", why, None)
        run = run_of(layout, shape[0], flags.tokens is None)
        return Plan.of("float32", "C++ kernel: multiplies only the stored entries", run)

    prepare.__name__ = run_of.__name__.replace("run", "linear")
    return prepare


def conv_by(prepare_linear: Callable[..., Plan]) -> Callable[..., Plan]:
    """The `prepare` of a convolution by a kernel of linear.

    A convolution with kernel_size=1 is a product if the input is channels_last; for other formats the transpose takes
    longer than the product saves. Other convolutions have no sparse kernel.
    """

    def prepare(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
        wide, groups = any(size != 1 for size in shape[2:]), flags.geometry["groups"]
        if wide or groups != 1 or flags.memory_format not in LAST:
            which = "kernel_size=1" if wide else "groups=1" if groups != 1 else "channels_last input"
            why = f"expands to dense: only a convolution with {which} has a faster kernel here"
            return Plan.of("reference", why, None)
        plan = prepare_linear(layout, shape, dtype, flags)
        return plan if plan.run is None else Plan.of(plan.variant, plan.reason, functools.partial(pointwise, plan.run))

    prepare.__name__ = prepare_linear.__name__.replace("linear", "conv")
    return prepare


def pointwise(linear: Linear, x: Tensor, weight, bias, *, stride, padding, dilation, groups) -> Tensor:
    """The convolution with kernel_size=1, by a product with the channels of each pixel."""
    if any(padding):
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    pixels = x[(..., *(slice(None, None, s) for s in stride))].movedim(1, -1)
    return linear(pixels, weight, bias).movedim(-1, 1)


if cpp.available():
    for _layout, _run_of in ((CSR, csr_run), (GroupedNM, grouped_nm_run)):
        _linear = kernel("linear", weight=_layout, device="cpu", prepare=True)(linear_by(_run_of))
        kernel("conv2d", weight=_layout, device="cpu", prepare=True)(conv_by(_linear))
else:
    _why = f"they do not load here ({cpp.load_error()})" if cpp.load_error() else "they are not built"
    warnings.warn(
        f"sten: running without the C++ kernels: {_why}. Everything works, nothing is faster than dense on this CPU; "
        "`python setup.py build_ext --inplace`, or a reinstallation where g++ is present, builds them.",
        stacklevel=2,
    )
