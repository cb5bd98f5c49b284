"""Products that do more than one product in few launches: for inference, without autograd.

    linear_activation   activation(x @ W.T + b)
    gated_linear        activation(x @ gate.T + b) * (x @ up.T + b)
    gated_mlp           gated_linear, then @ down.T + b
    linears             x @ W.T + b for two or three weights

Each runs a kernel that was registered for it; without one, the operators that it is made of, on their kernels. Where
the weights are those of Hugging Face's Conv1D (`transposed`), the products are x @ W. `sten.fuse` makes models call
these; a model that needs a gradient runs its own forward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import dispatch_modes, is_compiling, is_intercepted, no_function
from ..dispatch import Plan, operator, planned_together
from ..tensor import ATEN, LIBRARY, OPS, SparseTensor
from .epilogue import ACTIVATIONS, activate
from .linear import _expect, compute_linear, compute_matmul

FUSED = {"linear_activation": (1,), "gated_linear": (2,), "gated_mlp": (3,), "linears": (2, 3)}  # numbers of weights


# the operators of the kernel table


def _check_together(weights: Sequence[SparseTensor], x: Tensor, biases: Sequence[Tensor | None]) -> None:
    for w, bias in zip(weights, biases, strict=True):
        _expect(w, x, w.stored_shape[1], bias)


def _check_mlp(weights: Sequence[SparseTensor], x: Tensor, biases: Sequence[Tensor | None]) -> None:
    _check_together(weights[:2], x, biases[:2])


@operator("linear_activation", check=_check_together)
def linear_activation_reference(x, weight, bias, *, layout, shape, activation):
    return activate(F.linear(x, layout.unpack(weight, shape), bias), activation)


@operator("gated_linear", sparse=("gate", "up"), required=("gate", "up"), check=_check_together)
def gated_linear_reference(x, gate, gate_bias, up, up_bias, *, layout, shape, activation):
    first, second = (each.unpack(w, size) for each, w, size in zip(layout, (gate, up), shape, strict=True))
    return activate(F.linear(x, first, gate_bias), activation) * F.linear(x, second, up_bias)


@operator("gated_mlp", sparse=("gate", "up", "down"), required=("gate", "up", "down"), check=_check_mlp)
def gated_mlp_reference(x, gate, gate_bias, up, up_bias, down, down_bias, *, layout, shape, activation):
    y = gated_linear_reference(
        x, gate, gate_bias, up, up_bias, layout=layout[:2], shape=shape[:2], activation=activation
    )
    return F.linear(y, layout[2].unpack(down, shape[2]), down_bias)


@operator("linears", sparse=("first", "second", "third"), required=("first", "second"), check=_check_together)
def linears_reference(x, *weights_and_biases, layout, shape):
    pairs = zip(weights_and_biases[::2], weights_and_biases[1::2], strict=True)
    together = zip(pairs, layout, shape, strict=False)
    return torch.cat([F.linear(x, each.unpack(w, size), bias) for (w, bias), each, size in together], -1)


# without autograd; `intercepted`: whether the call is


def _product(x, w, bias, transposed: bool, intercepted: bool) -> Tensor:
    return (compute_matmul if transposed else compute_linear)(x, w, bias, intercepted)


def _stored(transposed: bool, weights: Sequence[SparseTensor]) -> bool:
    """Whether each weight is stored as (out, in)."""
    return all(w.transposed is transposed for w in weights)


def _alike(transposed: bool, weights: Sequence[SparseTensor]) -> bool:
    """Whether gate and up are of one layout, too."""
    return weights[0].sparse_layout == weights[1].sparse_layout and _stored(transposed, weights)


def _stack(transposed: bool, weights: Sequence[SparseTensor]) -> bool:
    """Whether all are of one layout, and their parts may lie one behind the other."""
    layout = weights[0].sparse_layout
    alike = all(w.sparse_layout == layout for w in weights[1:]) and _stored(transposed, weights)
    return alike and layout.stacks([w.stored_shape[0] for w in weights])


SERVES = {  # what kernels take, by the numbers of weights that the operators have: (of x @ W.T, of x @ W)
    name: (functools.partial(rule, False), functools.partial(rule, True))
    for name, rule in (
        ("linear_activation", _stored), ("gated_linear", _alike), ("gated_mlp", _alike), ("linears", _stack)
    )
}  # fmt: skip


def compute_linear_activation(x, w, bias, activation: str, transposed: bool, intercepted: bool) -> Tensor:
    geometry, serves = {"activation": activation}, SERVES["linear_activation"][transposed]
    plan = planned_together("linear_activation", (w,), x, (bias,), geometry, serves, intercepted)
    if plan.run is None:
        return activate(_product(x, w, bias, transposed, intercepted), activation)
    return plan.run(x, w.parts, bias, **geometry)


def compute_gated_linear(x, gate, gate_bias, up, up_bias, activation, transposed: bool, intercepted: bool) -> Tensor:
    geometry, serves = {"activation": activation}, SERVES["gated_linear"][transposed]
    plan = planned_together("gated_linear", (gate, up), x, (gate_bias, up_bias), geometry, serves, intercepted)
    if plan.run is None:
        y = compute_linear_activation(x, gate, gate_bias, activation, transposed, intercepted)
        return y * _product(x, up, up_bias, transposed, intercepted)
    return plan.run(x, gate.parts, gate_bias, up.parts, up_bias, **geometry)


def compute_gated_mlp(
    x, gate, gate_bias, up, up_bias, down, down_bias, activation: str, transposed: bool, intercepted: bool
) -> Tensor:
    geometry, serves, biases = (
        {"activation": activation},
        SERVES["gated_mlp"][transposed],
        (gate_bias, up_bias, down_bias),
    )
    plan = planned_together("gated_mlp", (gate, up, down), x, biases, geometry, serves, intercepted)
    if plan.run is None:
        y = compute_gated_linear(x, gate, gate_bias, up, up_bias, activation, transposed, intercepted)
        return _product(y, down, down_bias, transposed, intercepted)
    return plan.run(x, gate.parts, gate_bias, up.parts, up_bias, down.parts, down_bias, **geometry)


def compute_linears(x, weights, biases, transposed: bool, intercepted: bool) -> Sequence[Tensor]:
    serves = SERVES["linears"][transposed]
    plan = planned_together("linears", tuple(weights), x, tuple(biases), {}, serves, intercepted)
    if plan.run is None:
        return [_product(x, w, bias, transposed, intercepted) for w, bias in zip(weights, biases, strict=True)]
    y = plan.run(x, *[a for w, bias in zip(weights, biases, strict=True) for a in (w.parts, bias)])
    return torch.split_with_sizes(y, [w.stored_shape[0] for w in weights], -1)


def plan_of(name: str, x, weights: Sequence[SparseTensor], biases: Sequence[Tensor | None], geometry: dict) -> Plan:
    """The Plan of one of these operators."""
    plan = planned_together(name, tuple(weights), x, tuple(biases), geometry, SERVES[name][False], intercepted=False)
    if plan.run is not None:
        return plan
    layouts, device = tuple(str(w.sparse_layout) for w in weights), weights[0].parts["values"].device.type
    return dataclasses.replace(plan, operator=name, layouts=layouts, device=device, kernel="none")


# what a fused forward calls. Compilers and dispatch modes see one operator, as of `sten.ops.traceable`


def _opaque(schema: str, compute):
    """A function of the operator's arguments, the first of them dense, the second a weight or a list of weights."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    overload = getattr(OPS, name).default

    def call(x, weights, *rest):
        with no_function():
            if is_compiling() or dispatch_modes():
                return overload(x, weights, *rest)
            return compute(x, weights, *rest, is_intercepted())

    ATEN[overload] = lambda _, *args: compute(*args, is_intercepted())
    return call


linear_activation = _opaque(
    "sparse_linear_activation(Tensor input, Tensor weight, Tensor? bias, str activation, bool transposed) -> Tensor",
    compute_linear_activation,
)
gated_linear = _opaque(
    "sparse_gated_linear(Tensor input, Tensor gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, str activation,"
    " bool transposed) -> Tensor",
    compute_gated_linear,
)
gated_mlp = _opaque(
    "sparse_gated_mlp(Tensor input, Tensor gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, Tensor down,"
    " Tensor? down_bias, str activation, bool transposed) -> Tensor",
    compute_gated_mlp,
)
linears = _opaque(
    "sparse_linears(Tensor input, Tensor[] weights, Tensor?[] biases, bool transposed) -> Tensor[]", compute_linears
)

__all__ = ["ACTIVATIONS", "FUSED", "activate", "gated_linear", "gated_mlp", "linear_activation", "linears", "plan_of"]
