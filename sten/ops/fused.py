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

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import dispatch_modes, is_compiling, is_intercepted, no_function
from ..dispatch import Plan, find, operator, planned, planned_together
from ..tensor import ATEN, LIBRARY, OPS, SparseTensor
from .linear import _expect, compute_linear, compute_matmul

FUSED = {"linear_activation": (1,), "gated_linear": (2,), "gated_mlp": (3,), "linears": (2, 3)}  # numbers of weights
ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def activate(y: Tensor, activation: str) -> Tensor:
    """The activation of this name, of ACTIVATIONS or "none"."""
    return y if activation == "none" else ACTIVATIONS[activation](y)


# the operators of the kernel table


def _check_one(w: SparseTensor, x: Tensor, weight: dict, bias: Tensor | None, activation: str) -> None:
    _expect(w, x, w.stored_shape[1], bias)


def _check_together(weights: Sequence[SparseTensor], x: Tensor, biases: Sequence[Tensor | None]) -> None:
    for w, bias in zip(weights, biases, strict=True):
        _expect(w, x, w.stored_shape[1], bias)


def _check_mlp(weights: Sequence[SparseTensor], x: Tensor, biases: Sequence[Tensor | None]) -> None:
    _check_together(weights[:2], x, biases[:2])


@operator("linear_activation", check=_check_one)
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


def _has_kernel(name: str, weights: Sequence[SparseTensor], transposed: bool) -> bool:
    """Whether a kernel is registered for these weights, each stored as (out, in)."""
    if any(w.transposed is not transposed for w in weights):
        return False
    layouts = tuple(w.sparse_layout for w in weights)
    missing = (None,) * (3 - len(layouts)) if name == "linears" else ()
    layout = layouts[0] if name == "linear_activation" else layouts + missing
    return find(name, weights[0].parts["values"].device.type, layout) is not None


def compute_linear_activation(x, w, bias, activation: str, transposed: bool, intercepted: bool) -> Tensor:
    if not _has_kernel("linear_activation", (w,), transposed):
        return activate(_product(x, w, bias, transposed, intercepted), activation)
    parts, geometry = w.parts, {"activation": activation}
    return planned("linear_activation", w, (x, parts, bias), geometry, intercepted).run(x, parts, bias, **geometry)


def compute_gated_linear(x, gate, gate_bias, up, up_bias, activation, transposed: bool, intercepted: bool) -> Tensor:
    if gate.sparse_layout != up.sparse_layout or not _has_kernel("gated_linear", (gate, up), transposed):
        y = _product(x, gate, gate_bias, transposed, intercepted)
        return activate(y, activation) * _product(x, up, up_bias, transposed, intercepted)
    geometry = {"activation": activation}
    plan = planned_together("gated_linear", (gate, up), x, (gate_bias, up_bias), geometry, intercepted)
    return plan.run(x, gate.parts, gate_bias, up.parts, up_bias, **geometry)


def compute_gated_mlp(
    x, gate, gate_bias, up, up_bias, down, down_bias, activation: str, transposed: bool, intercepted: bool
) -> Tensor:
    if gate.sparse_layout != up.sparse_layout or not _has_kernel("gated_mlp", (gate, up, down), transposed):
        y = compute_gated_linear(x, gate, gate_bias, up, up_bias, activation, transposed, intercepted)
        return _product(y, down, down_bias, transposed, intercepted)
    geometry, biases = {"activation": activation}, (gate_bias, up_bias, down_bias)
    plan = planned_together("gated_mlp", (gate, up, down), x, biases, geometry, intercepted)
    return plan.run(x, gate.parts, gate_bias, up.parts, up_bias, down.parts, down_bias, **geometry)


def compute_linears(x, weights, biases, transposed: bool, intercepted: bool) -> list[Tensor]:
    layouts, rows = [w.sparse_layout for w in weights], [w.stored_shape[0] for w in weights]
    alike = all(layout == layouts[0] for layout in layouts) and layouts[0].stacks(rows)
    if not alike or not _has_kernel("linears", weights, transposed):
        return [_product(x, w, bias, transposed, intercepted) for w, bias in zip(weights, biases, strict=True)]
    plan = planned_together("linears", tuple(weights), x, tuple(biases), {}, intercepted)
    operands = [a for w, bias in zip(weights, biases, strict=True) for a in (w.parts, bias)]
    return list(plan.run(x, *operands).split(rows, -1))


def plan_of(name: str, x, weights: Sequence[SparseTensor], biases: Sequence[Tensor | None], geometry: dict) -> Plan:
    """The Plan of one of these operators; without a kernel, that of its first product, which then runs by itself."""
    operands = (x, weights[0].parts, biases[0])
    alike = len({w.sparse_layout for w in weights[:2]}) == 1
    if not alike or not _has_kernel(name, weights, transposed=False):
        return planned("linear", weights[0], operands)
    if len(weights) == 1:
        return planned(name, weights[0], operands, geometry)
    return planned_together(name, tuple(weights), x, tuple(biases), geometry, intercepted=False)


# what a fused forward calls. Compilers and dispatch modes see one operator, as of `sten.ops.traceable`


def _opaque(schema: str, compute):
    """A function of the operator's arguments, the first of them dense, the second a weight or a list of weights."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    overload = getattr(OPS, name).default

    def intercepts(x, weights, *rest) -> bool:
        several = isinstance(weights, (list, tuple))
        biases = rest[0] if several else rest
        values = [w.parts["values"] for w in weights[1:]] if several else []
        values += [a.parts["values"] for a in rest if isinstance(a, SparseTensor)]
        return is_intercepted(weights[0] if several else weights, x, *biases, *values)

    def call(x, weights, *rest):
        with no_function():
            if is_compiling() or dispatch_modes():
                return overload(x, weights, *rest)
            return compute(x, weights, *rest, intercepts(x, weights, *rest))

    ATEN[overload] = lambda _, *args: compute(*args, intercepts(*args))
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
