"""The C++ kernels of the CPU, which compute in float32, if they are built."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops as ops  # declares the operators
from ..dispatch import Flags, Plan, kernel
from ..layouts import BSR, CSR, NM, FanIn, GroupedNM, VectorNM
from ..layouts.base import Layout, Parts
from ..layouts.padding import reduction_width
from ..ops.epilogue import NUMBERS, activate
from ..ops.linear import dense_grad_weight
from . import cpp

Run = Callable[..., Tensor]
PAIR_ROWS = 4  # kPairRows in csrc/kernels.h: the largest n of GroupedNM that bfloat16 is multiplied with


def ended(product: Callable[..., Tensor], activation: str = "none") -> Callable[..., Tensor]:
    """The operator of a product that ends with an activation, for each block of the output when it is computed."""
    return product if activation == "none" else functools.partial(product, activation=NUMBERS[activation])


def end_of(flags: Flags) -> dict[str, str]:
    """The keyword of `ended` for linear_activation; empty for other operators."""
    return {name: value for name, value in (flags.geometry or {}).items() if name == "activation"}


def csr_linear(layout: CSR, shape: tuple[int, ...], intercepted: bool, activation: str = "none") -> Run:
    """`run` of linear with CSR: row by row, gathering activations from a panel."""
    linear, outputs = ended(cpp.operator("csr_linear", intercepted), activation), shape[0]

    def run(x: Tensor, weight: Parts, bias: Tensor | None) -> Tensor:
        return linear(x, weight["values"], weight["crow"], weight["col"], bias, outputs)

    return run


def grouped_nm_linear(layout: GroupedNM, shape: tuple[int, ...], intercepted: bool, activation: str = "none") -> Run:
    """`run` of linear with GroupedNM: accumulators stay in registers from one pattern to the next."""
    linear = ended(cpp.operator("grouped_nm_linear", intercepted), activation)
    n, m, g, outputs = layout.n, layout.m, layout.g, shape[0]

    def run(x: Tensor, weight: Parts, bias: Tensor | None) -> Tensor:
        return linear(x, weight["values"], weight["index"], bias, n, m, g, outputs)

    return run


def grouped_nm_grad_input(layout: GroupedNM, shape: tuple[int, ...], intercepted: bool) -> Run:
    """`run` of linear_grad_input: the gradients of a pattern's outputs stay in registers."""
    product, inputs = cpp.operator("grouped_nm_grad_input", intercepted), math.prod(shape[1:])
    sizes = layout.n, layout.m, layout.g

    def run(grad: Tensor, weight: Parts) -> Tensor:
        return product(grad, weight["values"], weight["index"], *sizes, inputs)

    return run


def grouped_nm_grad_weight(layout: GroupedNM, shape: tuple[int, ...], intercepted: bool) -> Run:
    """`run` of linear_grad_weight: a dot product over the tokens for every stored entry."""
    product, sizes = cpp.operator("grouped_nm_grad_values", intercepted), (layout.n, layout.m, layout.g)

    def run(grad: Tensor, x: Tensor, weight: Parts) -> Tensor:
        return product(grad, x, weight["index"], *sizes)

    return run


# The operators of rows that share their columns take (crow or None, col) and the numbers (height, columns).


@dataclass(frozen=True)
class Band:
    """How a layout's pattern is given to these operators.

    Attributes:
        pattern: `pattern(parts)`: crow, which is None for a list of single columns, and col.
        sizes: `sizes(layout, shape)`: the rows that share columns, the width of an entry (0: values have one
            dimension), the columns with padding.
        lists: whether crow is None.
    """

    pattern: Callable[[Parts], tuple[Tensor | None, Tensor]]
    sizes: Callable[[Layout, tuple[int, ...]], tuple[int, int, int]]
    lists: bool = False


def block_sizes(layout: BSR, shape: tuple[int, ...]) -> tuple[int, int, int]:
    return *layout.block, layout.grid(shape)[1] * layout.block[1]


BANDS = {
    VectorNM: Band(
        lambda parts: (None, parts["index"]),
        lambda layout, shape: (layout.v, 1, reduction_width(shape, layout.m)),
        True,
    ),
    BSR: Band(lambda parts: (parts["crow"], parts["col"]), block_sizes),
    CSR: Band(lambda parts: (parts["crow"], parts["col"]), lambda layout, shape: (1, 0, math.prod(shape[1:]))),
    FanIn: Band(lambda parts: (None, parts["index"]), lambda layout, shape: (1, 1, math.prod(shape[1:])), True),
}


def stored_rows(parts: Parts, outputs: int) -> Tensor | None:
    """Which outputs the rows of the parts are, for a layout that leaves out empty ones; None if they are all."""
    row = parts.get("row")
    return None if row is None or len(row) == outputs else row.long()


def with_empty_rows(some: Tensor, row: Tensor, outputs: int, bias: Tensor | None, activation: str) -> Tensor:
    """All outputs, from those of the stored rows: the others are what becomes of the bias."""
    y = some.new_zeros(*some.shape[:-1], outputs)
    return (y if bias is None else y.copy_(activate(bias, activation))).index_copy_(-1, row, some)


def band_linear(layout: Layout, shape: tuple[int, ...], intercepted: bool, activation: str = "none") -> Run:
    """`run` of linear: one row of a panel of activations for all outputs that share the column."""
    linear = ended(cpp.operator("band_linear", intercepted), activation)
    band = BANDS[type(layout)]
    (height, _, columns), outputs = band.sizes(layout, shape), shape[0]

    def run(x: Tensor, weight: Parts, bias: Tensor | None) -> Tensor:
        (crow, col), row = band.pattern(weight), stored_rows(weight, outputs)
        if row is None:
            return linear(x, weight["values"].contiguous(), crow, col, bias, height, columns, outputs)
        own = None if bias is None else bias[row]  # added in float32, before the sum is rounded
        some = linear(x, weight["values"].contiguous(), crow, col, own, height, columns, len(row))
        return with_empty_rows(some, row, outputs, bias, activation)

    return run


def band_grad_input(layout: Layout, shape: tuple[int, ...], intercepted: bool) -> Run:
    """`run` of linear_grad_input: the gradients of a band's outputs stay in registers from column to column."""
    product, band = cpp.operator("band_grad_input", intercepted), BANDS[type(layout)]
    (height, _, columns), outputs, inputs = band.sizes(layout, shape), shape[0], math.prod(shape[1:])

    def run(grad: Tensor, weight: Parts) -> Tensor:
        (crow, col), row = band.pattern(weight), stored_rows(weight, outputs)
        grad = grad if row is None else grad.index_select(-1, row)
        return product(grad, weight["values"].contiguous(), crow, col, height, columns, inputs)

    return run


def band_grad_weight(layout: Layout, shape: tuple[int, ...], intercepted: bool) -> Run:
    """`run` of linear_grad_weight: a dot product over the tokens for every stored entry."""
    product, band = cpp.operator("band_grad_values", intercepted), BANDS[type(layout)]
    sizes, outputs = band.sizes(layout, shape), shape[0]

    def run(grad: Tensor, x: Tensor, weight: Parts) -> Tensor:
        (crow, col), row = band.pattern(weight), stored_rows(weight, outputs)
        grad = grad if row is None else grad.index_select(-1, row)
        return product(grad, x, crow, col, *sizes)

    return run


def converted(run: Run, dtype: torch.dtype) -> Run:
    """`run` on float32 copies of its dense tensors and of the values; the result is rounded once, to the dtype."""

    def single(operand):
        if isinstance(operand, Tensor):
            return operand.float()
        return operand and {**operand, "values": operand["values"].float()}

    return lambda *operands, **geometry: run(*map(single, operands), **geometry).to(dtype)


def multiplies_bfloat16(run_of: Callable[..., Run], layout: Layout, tokens: int | None) -> Callable[..., Run] | None:
    """The kernel that multiplies bfloat16 as it is, for the one that computes in float32; None if there is none."""
    if not cpp.features()["bfloat16"] or run_of not in (csr_linear, band_linear, grouped_nm_linear):
        return None
    if run_of is grouped_nm_linear:
        return run_of if layout.n <= PAIR_ROWS and tokens != 1 else None
    return band_linear


def float32_by(run_of: Callable[..., Run]) -> Callable[..., Plan]:
    """The `prepare` of an operator by a C++ kernel, which computes in float32."""

    def prepare(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
        name, end = str(dtype).removeprefix("torch."), end_of(flags)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Plan.of("reference", f"expands to dense: the C++ kernel computes in float32, not {name}", None)
        bfloat16_by = multiplies_bfloat16(run_of, layout, flags.tokens) if dtype is torch.bfloat16 else None
        if bfloat16_by:
            run = bfloat16_by(layout, shape, flags.tokens is None, **end)
            return Plan.of(name, "C++ kernel: multiplies only the stored entries, sums in float32", run)
        run = run_of(layout, shape, flags.tokens is None, **end)
        if dtype is torch.float32:
            return Plan.of(name, "C++ kernel: multiplies only the stored entries", run)
        why = f"C++ kernel: multiplies only the stored entries, in float32: {name} is converted at every call"
        itself = dtype is torch.bfloat16 and run_of in (band_linear, grouped_nm_linear)  # these operators convert it
        return Plan.of("converted", why, run if itself else converted(run, dtype))

    prepare.__name__ = run_of.__name__
    return prepare


# NM reads its stored format for a few tokens; a processor's vector units do not skip zeros, so that more of them are
# multiplied, like gradients, by a dense copy, which takes a small part of the time.

FEW_TOKENS = 128
NM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def nm_plan(layout: NM, dtype: torch.dtype, tokens: int | None, run: Run, few: str, dense: str) -> Plan:
    """A Plan of NM, with the reason for few tokens or for a dense copy."""
    name = str(dtype).removeprefix("torch.")
    if dtype not in NM_DTYPES:
        return Plan.of(
            "reference", f"expands to dense: the C++ kernel is for float32 and 16-bit types, not {name}", None
        )
    if tokens is None:
        return Plan.of(
            "operator", f"C++ operator: reads the stored weight up to {FEW_TOKENS} tokens, else expands it", run
        )
    if tokens > FEW_TOKENS:
        return Plan.of("expand", dense, run)
    if dtype is torch.float32 or (dtype is torch.bfloat16 and cpp.features()["bfloat16"]):
        return Plan.of("bitmap", few, run)
    return Plan.of("converted", f"{few}, in float32: {name} is converted at every call", run)


def nm_linear(layout: NM, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
    """linear with NM: values are expanded in registers, or all of them once for many tokens."""
    linear = ended(cpp.operator("nm_linear", flags.tokens is None), **end_of(flags))
    n, m, outputs = layout.n, layout.m, shape[0]

    def run(x: Tensor, weight: Parts, bias: Tensor | None) -> Tensor:
        return linear(x, weight["values"].contiguous(), weight["index"], bias, n, m, FEW_TOKENS, outputs)

    few = "C++ kernel: reads only the stored entries, and expands them in registers"
    dense = f"expands to dense by a C++ kernel: with more than {FEW_TOKENS} tokens a dense product is as fast"
    return nm_plan(layout, dtype, flags.tokens, run, few, dense)


def nm_grad_input(layout: NM, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
    """linear_grad_input with NM."""
    expand, n, m, inputs = torch.ops.sten.nm_expand.default, layout.n, layout.m, math.prod(shape[1:])

    def run(grad: Tensor, weight: Parts) -> Tensor:
        return grad @ expand(weight["values"].contiguous(), weight["index"], n, m, inputs)

    dense = "expands to dense by a C++ kernel: the transpose of the pattern is not n of m"
    return nm_plan(layout, dtype, math.inf, run, dense, dense)


def nm_grad_weight(layout: NM, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
    """linear_grad_weight with NM."""
    collect, n, m = torch.ops.sten.nm_collect.default, layout.n, layout.m

    def run(grad: Tensor, x: Tensor, weight: Parts) -> Tensor:
        return collect(dense_grad_weight(grad, x, shape), weight["index"], n, m)

    dense = "computes the dense gradient and collects it at the pattern by a C++ kernel"
    return nm_plan(layout, dtype, math.inf, run, dense, dense)


LINEAR = {  # but CSR and FanIn, which cpu_tables has
    GroupedNM: float32_by(grouped_nm_linear),
    VectorNM: float32_by(band_linear),
    BSR: float32_by(band_linear),
    NM: nm_linear,
}

if cpp.available():
    for _layout, _prepare in LINEAR.items():
        kernel("linear", weight=_layout, device="cpu", prepare=True)(_prepare)
    for _name, _prepare in (("linear_grad_input", nm_grad_input), ("linear_grad_weight", nm_grad_weight)):
        kernel(_name, weight=NM, device="cpu", prepare=True)(_prepare)
    for _layout, _grad_input, _grad_weight in (
        *((layout, band_grad_input, band_grad_weight) for layout in BANDS),
        (GroupedNM, grouped_nm_grad_input, grouped_nm_grad_weight),
    ):
        kernel("linear_grad_input", weight=_layout, device="cpu", prepare=True)(float32_by(_grad_input))
        kernel("linear_grad_weight", weight=_layout, device="cpu", prepare=True)(float32_by(_grad_weight))
else:
    _why = f"they do not load here ({cpp.load_error()})" if cpp.load_error() else "they are not built"
    warnings.warn(
        f"sten: running without the C++ kernels: {_why}. Everything works, nothing is faster than dense on this CPU; "
        "`python setup.py build_ext --inplace`, or a reinstallation where g++ is present, builds them.",
        stacklevel=2,
    )
