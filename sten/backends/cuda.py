"""The Triton kernels of CUDA, if triton can be imported: one table of the tensors and numbers that each of them takes.

The Plan of a known number of tokens prepares its launches from the tensors of its first call, and stores them; the Plan
of an intercepted call runs torch.library operators, which choose a variant when they run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from .. import kernels
from .. import ops as ops  # declares the operators
from ..dispatch import Flags, Plan, kernel
from ..layouts import BSR, CSR, NM, GroupedNM, VectorNM
from ..layouts.base import Layout
from . import rivals

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRODUCTS = {"linear": "linear", "linear_grad_input": "linear_grad_input", "linear_grad_weight": "linear_grad_values"}
ENDS = {"activation": "none", "save_memory": False, "feature_major": False}


@dataclass(frozen=True)
class Row:
    """The arguments of the kernels of a layout.

    Attributes:
        module: of `sten.kernels`.
        parts: those that linear takes, and its two gradients.
        facts: `facts(layout, entries)`: the keywords of `choose`.
        numbers: `numbers(layout)`: the integers that the operators take besides shapes.
        table: `table(layout, device)`: one more tensor, after the parts.
        reference: `reference(name, layout, dtype)`: why an operator's reference implementation is better, or None.
        bits: `bits(layout)`: of an index that the kernels read for each value.
    """

    module: str
    parts: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    facts: Callable[[Layout, int], dict[str, int]]
    numbers: Callable[[Layout], dict[str, int]]
    table: Callable[[Layout, torch.device], Tensor] | None = None
    reference: Callable[[str, Layout, torch.dtype], str | None] = lambda name, layout, dtype: None
    bits: Callable[[Layout], float] = lambda layout: 0


def rate(layout: Layout) -> dict[str, int]:
    return {name: getattr(layout, name) for name in ("n", "m", "v") if hasattr(layout, name)}


def rate_facts(layout: Layout, entries: int) -> dict[str, int]:
    return rate(layout)


def block(layout: BSR) -> dict[str, int]:
    bh, bw = layout.block
    return {"bh": bh, "bw": bw}


def block_facts(layout: BSR, entries: int) -> dict[str, int]:
    bh, bw = layout.block
    return {"bh": bh, "bw": bw, "blocks": entries // (bh * bw)}


def small_blocks(name: str, layout: BSR, dtype: torch.dtype) -> str | None:
    if name == "linear" or min(layout.block) >= 16:
        return None
    size = "x".join(map(str, layout.block))  # the kernels take them too, but more slowly
    return f"blocks of {size} are below the 16 of tensor cores and each reads x again: expansion to dense is faster"


def dense_gradient(name: str, layout: VectorNM, dtype: torch.dtype) -> str | None:
    if name != "linear_grad_weight":
        return None
    n, m, v = layout.n, layout.m, layout.v
    if not kernels.precision.exact(dtype) or n / m <= 0.3 * (min(v, 128) / 128) ** 0.5:
        return None
    return f"{n}:{m} with v={v} in fp32 without tf32: the dense gradient, gathered, is faster"


def patterns(layout: GroupedNM, device: torch.device) -> Tensor:
    """GroupedNM's patterns (P, n) int32 on the device."""
    return kernels.pattern_cache.constant((layout,), device, lambda: layout.rows(device).int())


def position_bits(layout: NM) -> float:
    width = kernels.nm_gradient.bits(layout.n, layout.m)
    return layout.m / layout.n if width == 1 else width


PAIR, TRIPLE = ("values", "index"), ("values", "crow", "col")
TRANSPOSED = ("t_crow", "t_row", "t_block")
TABLE = {
    VectorNM: Row(
        "vector_nm", (PAIR, PAIR, ("index",)), rate_facts, rate, reference=dense_gradient, bits=lambda w: 32 / w.v
    ),
    BSR: Row(
        "bsr", (TRIPLE, TRIPLE + TRANSPOSED, ("col", *TRANSPOSED[1:])), block_facts, block, reference=small_blocks
    ),
    NM: Row("nm", (PAIR, PAIR, ("index",)), rate_facts, rate, bits=position_bits),
    CSR: Row(
        "csr",
        (TRIPLE, TRIPLE, ("crow", "col")),
        lambda _, entries: {"entries": entries},
        lambda _: {},
        bits=lambda _: 8,
    ),
    GroupedNM: Row("grouped_nm", (PAIR, PAIR, ("index",)), rate_facts, rate, patterns, bits=lambda w: 16 / w.n),
}


class Launches:
    """The launches of one signature. The first call prepares them for its tensors, and times the candidates. In a
    capture of a CUDA graph, where nothing can be timed, each call prepares its own, which are not stored."""

    def __init__(self, product, variant: str, numbers: dict):
        self.product, self.variant, self.numbers, self.launch = product, variant, numbers, None
        self.backend = kernels.backend.backend
        self.several, self.current = self.backend.several, self.backend.device

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        launch = self.launch
        if launch is None or (self.several and tensors[0].get_device() != self.current()):
            return self._elsewhere(tensors)
        return launch(*tensors)

    def _elsewhere(self, tensors):
        """Launch, after preparing if needed, with the device of the tensors current."""
        with self.backend.on(tensors[0]):
            launch = self.launch
            if launch is None:
                launch = self.product.prepare(*tensors, variant=self.variant, **self.numbers)
                if not self.backend.capturing(tensors[0]):
                    self.launch = launch
            return launch(*tensors)


def stored(names: tuple[str, ...], layout: Layout, row: Row) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
    """A function from parts to the tensors that an operator takes: contiguous parts, then the layout's table."""
    read = itemgetter(*names) if len(names) > 1 else lambda weight: (weight[names[0]],)
    table = None

    def tensors(weight):
        parts = read(weight)
        if not parts[0].is_contiguous():  # such as values expanded by autograd
            parts = (parts[0].contiguous(), *parts[1:])
        return parts

    def tensors_and_table(weight):
        nonlocal table
        parts = tensors(weight)
        if table is not None:
            return *parts, table
        device = parts[0].device
        made = row.table(layout, device)
        if kernels.pattern_cache.cacheable(device):
            table = made
        return *parts, made

    return tensors if row.table is None else tensors_and_table


def other_dtype(dtype: torch.dtype) -> Plan | None:
    """The Plan of a dtype that the kernels are not for; None of the others."""
    if dtype in DTYPES:
        return None
    known = "float16, bfloat16 and float32"
    return Plan.of("reference", f"expands to dense: the Triton kernels are for {known}, not {dtype}", None)


def numbers_of(product, row: Row, layout: Layout, shape: tuple[int, ...], **ends: str) -> dict:
    """The integers and strings that a product takes for a weight of this shape."""
    known = {**row.numbers(layout), "out_features": shape[0], "in_features": shape[1], **ENDS, **ends}
    return {number: known[number] for number in product.numbers}


def launches_of(product, numbers: dict, flags: Flags, choose: Callable[[], tuple[str, str]]) -> tuple:
    """(what runs the product, the variant, the reason); `choose` is called where the number of tokens is known."""
    if flags.tokens is None:
        reason = "a torch.library operator, visible to the compiler, chooses when it runs"
        return functools.partial(product, **numbers), "operator", reason
    variant, reason = choose()
    return Launches(product, variant, numbers), variant, reason


def prepare_by(name: str, row: Row) -> Callable[..., Plan]:
    """The `prepare` of an operator by the kernels of a layout."""
    names = row.parts[list(PRODUCTS).index(name)]

    def prepare(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
        if (refused := other_dtype(dtype)) is not None:
            return refused
        why = row.reference(name, layout, dtype)
        if why is not None:
            return Plan.of("reference", why, None)
        product = getattr(getattr(kernels, row.module), PRODUCTS[name])
        facts, numbers = row.facts(layout, flags.entries or 0), numbers_of(product, row, layout, shape)
        choose = functools.partial(product.choose, flags.tokens, *shape, dtype, **facts)
        launches, variant, reason = launches_of(product, numbers, flags, choose)
        absent = () if flags.tokens is None else getattr(product, "absent", ())
        if name == "linear" and flags.tokens is not None and dtype.itemsize == 2:
            share = (flags.entries or 0) * (1 + row.bits(layout) / 16) / max(1, math.prod(shape))
            reason += rivals.faster(flags.tokens, share, variant == "expand")
        return Plan.of(variant, reason, RUNS[name](launches, stored(names, layout, row), absent))

    prepare.__name__ = f"{row.module}_{name}"
    return prepare


# operator -> the `run` of its Plan, from its launches, the tensors of a weight, and the arguments that are None
RUNS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "linear": lambda launch, tensors, absent: lambda x, w, bias: launch(x, *tensors(w), bias, *absent),
    "linear_grad_input": lambda launch, tensors, _: lambda grad, w: launch(grad, *tensors(w)),
    "linear_grad_weight": lambda launch, tensors, _: lambda grad, x, w: launch(grad, x, *tensors(w)),
}

if kernels.available():
    for _layout, _row in TABLE.items():
        for _name in PRODUCTS:
            kernel(_name, weight=_layout, device="cuda", prepare=True)(prepare_by(_name, _row))
