"""which: the Plan that an operator would run, and why, without running it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor

from .._torch_private import no_function
from ..dispatch import OPERATORS, Plan, planned, planned_input
from ..tensor import SparseTensor, contiguous_strides
from .conv import named_geometry
from .fused import FUSED, plan_of
from .linear import bias_row

Attribute = Tensor | torch.nn.Module  # the type of `model[0].weight` for type checkers
INPUTS = ("linear", "linear_grad_weight", "linear_grad_sparse_input")  # that may have a sparse input
# which dimension of the weight the features of the first operand are
FEATURES = {"linear": 1, "matmul": 0, "linear_grad_input": 0, "linear_grad_weight": 0, "embedding_grad_weight": 1}


def which(
    operator: str, x: Tensor | tuple[int, ...], weight: Attribute, bias: Attribute | None = None, **geometry: Any
) -> Plan:
    """Return the Plan that runs an operator on a sparse weight, without running it; print it to read the reason.

    It is the same object that a call with such operands runs, unless the call is intercepted by a compiler, a mode,
    torch.func or forward AD.

    Args:
        operator: a name in `sten.extend.OPERATORS`: "linear" is x @ weight.T, "matmul" is x @ weight. For a transposed
            weight the Plan is that of the product that runs.
        x: the first operand (activations, an index, or for "..._grad_..." the gradient), or its shape. A shape stands
            for a contiguous tensor of the weight's dtype and device, as do all other operands. Or a sparse activation:
            a SparseTensor (tokens, features).
        weight: a `SparseTensor`, such as `model[0].weight` of a sparse model, also in trainable form; or, of a sparse
            activation, a dense one. Or a linear layer: then what a method at its output adds to the product is named.
            "gated_linear", "gated_mlp" and "linears", which `sten.fuse` makes a model use, take a list of them.
        bias: of "linear" or "conv2d"; a list where `weight` is one.
        **geometry: of a convolution, as integers or tuples: stride, padding, dilation, groups (for "conv2d" derived
            from the shapes), and for its gradients `size`, the shape of the input. Of "embedding_grad_weight": padding.
            Of "linear_activation", "gated_linear" and "gated_mlp": activation.

    Returns:
        A `sten.extend.Plan`: its `kernel`, `variant` and `reason` say what runs and why.

    Raises:
        ValueError: `operator` is unknown, or the shape of x does not match the weight.
        TypeError: `weight` is not a SparseTensor, or x is neither a tensor nor a shape.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.eye(4), sten.CSR())
        >>> sten.which("linear", (16, 4), w).operator
        'linear'
        >>> sten.which("linear", (16, 4), w.t()).operator
        'linear_grad_input'
    """
    if operator not in OPERATORS:
        raise ValueError(f"Expected one of {', '.join(sorted(OPERATORS))}, got {operator!r}.")
    if isinstance(weight, torch.nn.Module):
        return _of_layer(operator, x, weight, bias, geometry)
    if operator in FUSED:
        return _together(operator, x, weight, bias, geometry)
    if isinstance(x, SparseTensor) and not isinstance(weight, SparseTensor) and operator in INPUTS:
        _expect_matrix(operator, x, weight)
        return planned_input(operator, x, weight, x.shape[0])
    if not isinstance(weight, SparseTensor):
        kind = type(weight).__name__
        raise TypeError(f"Expected a SparseTensor, got {kind}; convert it by sten.from_dense or sten.sparsify.")
    shape = _shape(x)
    _expect(operator, shape, weight)
    with no_function():
        first = x if isinstance(x, Tensor) else Contiguous(shape, weight, indices=operator == "embedding")
        if operator.startswith("conv"):
            operands, keywords = _convolution(operator, first, weight, bias, geometry)
        elif operator == "embedding_grad_weight":
            operands = (first.contiguous(), Contiguous(shape[:-1], weight, indices=True), weight.parts)
            keywords = {"padding": -1, **geometry}
        elif operator == "linear_grad_weight":
            other = Contiguous((*shape[:-1], weight.shape[1]), weight)
            operands = (*((other, first) if weight.transposed else (first, other)), weight.parts)
            keywords = geometry
        else:
            operator = _resolve(operator, weight)
            operands, keywords = _in_order(operator, first, weight, bias), geometry
        return planned(operator, weight, operands, keywords)


def _of_layer(operator: str, x: Any, layer: torch.nn.Module, bias: Any, geometry: dict[str, Any]) -> Plan:
    """The Plan of a layer's weight, with what a method at its output adds to the product."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"Expected a weight, or a layer that has one, got {type(layer).__name__}.")
    if isinstance(weight, SparseTensor) or isinstance(x, SparseTensor):
        plan = which(operator, x, weight, layer.bias if bias is None and operator == "linear" else bias, **geometry)
    else:
        plan = Plan(operator, (), weight.device.type, "dense", None, "a dense product", lambda *operands: None)
    describe = getattr(vars(layer).get("forward"), "describe", None)
    if operator != "linear" or describe is None:
        return plan
    return dataclasses.replace(plan, reason=f"{plan.reason}; {describe()}")


def _expect_matrix(operator: str, x: SparseTensor, weight: Any) -> None:
    """Raise unless the operator can multiply a sparse activation by this dense weight."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or x.dim() != 2 or x.shape[1] != weight.shape[1]:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"Expected a weight (outputs, {x.shape[-1]}) for {operator} with an input of shape {tuple(x.shape)}, got "
            f"{shape}."
        )


def _together(operator: str, x: Any, weight: Any, bias: Any, geometry: dict[str, Any]) -> Plan:
    """The Plan of an operator of `sten.ops.fused`."""
    weights = list(weight) if isinstance(weight, (list, tuple)) else [weight]
    if len(weights) not in FUSED[operator] or not all(isinstance(w, SparseTensor) for w in weights):
        counts = " or ".join(map(str, FUSED[operator]))
        got = ", ".join(type(w).__name__ for w in weights)
        raise TypeError(f"Expected a list of {counts} SparseTensors for {operator}, got {got}; use model[0].weight.")
    shape = _shape(x)
    _expect("linear", shape, weights[0])
    biases = list(bias) if isinstance(bias, (list, tuple)) else [bias] * len(weights)
    with no_function():
        first = x if isinstance(x, Tensor) else Contiguous(shape, weights[0])
        return plan_of(operator, first, weights, biases, geometry)


def _resolve(operator: str, w: SparseTensor) -> str:
    """The operator in the table for a product with this weight; other operators are unchanged."""
    if operator not in ("linear", "matmul", "linear_grad_input"):
        return operator
    return "linear" if (operator == "linear") != w.transposed else "matmul"


class Contiguous:
    """The attributes of a contiguous tensor that a signature reads, of the weight's device and dtype, or int64."""

    def __init__(self, shape: tuple[int, ...], like: SparseTensor, indices: bool = False) -> None:
        self.shape, self.device = torch.Size(shape), like.device
        self.dtype = torch.int64 if indices else like.dtype

    def dim(self) -> int:
        return len(self.shape)

    def stride(self) -> tuple[int, ...]:
        return contiguous_strides(self.shape)

    def data_ptr(self) -> int:
        return 0

    def contiguous(self) -> Contiguous:
        return self


def _in_order(operator: str, first: Any, w: SparseTensor, bias: Any) -> tuple:
    """The operands in the order of the reference implementation: parts of the weight, `first`, and a bias."""
    op, operands, dense = OPERATORS[operator], [], first
    for name, parameter in inspect.signature(op.reference).parameters.items():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            continue
        if name == op.sparse[-1]:
            operands.append(w.parts)
        elif name == "bias":
            operands.append(bias_row(bias, w.stored_shape[0], repeat=True))
        else:
            operands.append(dense)
            dense = None
    return tuple(operands)


def _convolution(operator: str, first: Any, w: SparseTensor, bias: Any, keywords: dict) -> tuple[tuple, dict]:
    """The operands and keywords of a convolution or of one of its gradients."""
    dims = w.dim() - 2
    if first.dim() == dims + 1:
        first = first.unsqueeze(0) if isinstance(first, Tensor) else Contiguous((1, *first.shape), w)
    sides = {name: keywords.get(name, usual) for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1))}
    sides = {name: [side] * dims if isinstance(side, int) else side for name, side in sides.items()}
    channels = first.shape[1] if operator == "conv2d" else keywords["size"][1] if "size" in keywords else w.shape[1]
    geometry = named_geometry(**sides, groups=keywords.get("groups", channels // w.shape[1]))
    if operator == "conv2d":
        return (first, w.parts, bias_row(bias, w.shape[0])), geometry
    rows = zip(first.shape[2:], geometry["stride"], geometry["padding"], geometry["dilation"], w.shape[2:], strict=True)
    least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in rows]
    size = tuple(keywords.get("size", (first.shape[0], w.shape[1] * geometry["groups"], *least)))
    if operator == "conv2d_grad_input":
        return (first, w.parts), {**geometry, "size": size}
    return (first, Contiguous(size, w), w.parts), geometry


def _shape(x) -> tuple[int, ...]:
    shape = x.shape if isinstance(x, Tensor) else x
    if not isinstance(shape, (tuple, list)) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"Expected a tensor or a shape, a tuple of sizes, got {x!r}.")
    return tuple(shape)


def _expect(operator: str, shape: tuple[int, ...], w: SparseTensor) -> None:
    """Raise ValueError unless the shape of the first operand matches the weight."""
    if operator.startswith("conv"):
        matches = w.dim() > 2 and len(shape) in (w.dim() - 1, w.dim())
        channels = w.shape[1] if operator == "conv2d" else w.shape[0]
        matches = matches and shape[1 - w.dim()] % channels == 0
        expected = f"{channels} channels and {w.dim() - 2} more dimensions"
    elif operator in FEATURES:
        size = w.shape[FEATURES[operator]]
        matches, expected = shape[-1:] == (size,), f"{size} features in the last dimension"
    else:
        return
    if not matches:
        weight = f"{operator} and a weight of shape {tuple(w.shape)}"
        raise ValueError(f"Expected a first operand with {expected} for {weight}, got {shape}.")


__all__ = ["which"]
