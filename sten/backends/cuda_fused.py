"""The Triton kernels of products in one launch or few (`sten.ops.fused`), for the layouts of `sten.backends.cuda`."""

from __future__ import annotations

import functools

from .. import kernels
from ..dispatch import Flags, Plan, kernel
from ..layouts import NM, VectorNM
from ..ops import fused as fused  # declares the operators
from .cuda import TABLE, Launches, launches_of, numbers_of, other_dtype, rate, stored

STACKED = {NM: "nm_several", VectorNM: "vector_nm_several"}


def prepare_activation(layout, shape, dtype, flags: Flags) -> Plan | None:
    """The activation at the end of the layout's linear kernel."""
    if (refused := other_dtype(dtype)) is not None:
        return refused
    row = TABLE[type(layout)]
    product = getattr(kernels, row.module).linear
    numbers = numbers_of(product, row, layout, shape, activation=flags.geometry["activation"])
    choice = functools.partial(product.choose, flags.tokens, *shape, dtype, **row.facts(layout, flags.entries or 0))
    launch, variant, reason = launches_of(product, numbers, flags, choice)
    tensors = stored(row.parts[0], layout, row)
    absent = product.absent if flags.tokens is not None else ()

    def run(x, weight, bias, activation):
        return launch(x, *tensors(weight), bias, *absent)

    return Plan.of(variant, reason, run)


def prepare_gated(layout, shape, dtype, flags: Flags) -> Plan | None:
    """Both products in one launch where the layout has such a kernel; else in two, the second of which multiplies."""
    if (refused := other_dtype(dtype)) is not None:
        return refused
    (layout, _), (shape, _) = layout, shape
    row = TABLE[type(layout)]
    product = getattr(kernels, row.module).linear
    numbers = numbers_of(product, row, layout, shape, activation=flags.geometry["activation"])
    choice = functools.partial(product.choose, flags.tokens, *shape, dtype, **row.facts(layout, flags.entries or 0))
    tensors = stored(row.parts[0], layout, row)
    launch, variant, reason = launches_of(product, numbers, flags, choice)
    if product.dual:

        def run(x, gate, gate_bias, up, up_bias, activation):
            gate, up = (*tensors(gate), gate_bias), (*tensors(up), up_bias)
            if flags.tokens is None:
                return product.gated(x, up, gate, **numbers)
            return launch(x, *gate, None, *up)

        return Plan.of(variant, f"gate and up together: {reason}", run)
    plain, _, _ = launches_of(product, {**numbers, "activation": "none"}, flags, choice)
    absent = product.absent if flags.tokens is not None else ()

    def run_two(x, gate, gate_bias, up, up_bias, activation):
        other = plain(x, *tensors(up), up_bias, *absent)
        if flags.tokens is None:
            return launch(x, *tensors(gate), gate_bias, gate=other)
        return launch(x, *tensors(gate), gate_bias, other)

    return Plan.of(variant, f"up, then gate with the activation and the multiplication: {reason}", run_two)


def prepare_mlp(layout, shape, dtype, flags: Flags) -> Plan | None:
    """VectorNM: gate and up in one launch; over 64 tokens feature-major between the products."""
    if (refused := other_dtype(dtype)) is not None:
        return refused
    product, (first, _, last) = kernels.vector_nm_mlp.gated_mlp, layout
    (inner, inputs), _, (outputs, _) = shape
    down = {"down_" + name: number for name, number in rate(last).items()}
    numbers = {**rate(first), **down, "inner": inner, "out_features": outputs, **flags.geometry}
    sizes = (flags.tokens, outputs, inner, inputs, dtype, rate(first), rate(last))
    launch, variant, reason = launches_of(product, numbers, flags, lambda: product.choose(*sizes))
    tensors = stored(("values", "index"), first, TABLE[VectorNM])

    def run(x, gate, gate_bias, up, up_bias, down, down_bias, activation):
        return launch(x, *tensors(gate), gate_bias, *tensors(up), up_bias, *tensors(down), down_bias)

    return Plan.of(variant, reason, run)


def prepare_several(layout, shape, dtype, flags: Flags) -> Plan | None:
    """One launch where the weights lie one behind the other in memory, else one for each."""
    if (refused := other_dtype(dtype)) is not None:
        return refused
    layout, row = layout[0], TABLE[type(layout[0])]
    together = (sum(rows for rows, _ in shape), shape[0][1])
    product = getattr(kernels, row.module).linear
    numbers = numbers_of(product, row, layout, together)
    operator = getattr(kernels.several, STACKED[type(layout)])
    tensors, absent = stored(row.parts[0], layout, row), (None,) * (product.count + 1) * (3 - len(shape))
    facts = row.facts(layout, (flags.entries or 0) * len(shape))
    choice = functools.partial(product.choose, flags.tokens, *together, dtype, **facts)
    launch, variant, reason = launches_of(operator, numbers, flags, choice)
    if flags.tokens is not None:
        launch = Launches(operator, None, numbers)

    def run(x, *operands):
        weights = [a for w, bias in zip(operands[::2], operands[1::2], strict=True) for a in (*tensors(w), bias)]
        return launch(x, *weights, *absent)

    return Plan.of(variant, f"{len(shape)} weights in one launch if they lie together in memory: {reason}", run)


if kernels.available():
    for _layout in TABLE:
        kernel("linear_activation", weight=_layout, device="cuda", prepare=True)(prepare_activation)
        kernel("gated_linear", gate=_layout, up=_layout, device="cuda", prepare=True)(prepare_gated)
    kernel("gated_mlp", gate=VectorNM, up=VectorNM, down=VectorNM, device="cuda", prepare=True)(prepare_mlp)
    for _layout in STACKED:
        for _more in ({}, {"third": _layout}):
            kernel("linears", first=_layout, second=_layout, device="cuda", prepare=True, **_more)(prepare_several)
