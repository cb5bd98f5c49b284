"""`which`: the Plan that an operator would run, and why, without running it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .._torch_private import no_function
from ..dispatch import OPERATORS, Plan, planned
from ..tensor import SparseTensor, contiguous_strides
from .conv import named_geometry
from .linear import bias_row

FEATURES = {"linear": 1, "matmul": 0, "linear_grad_input": 0, "linear_grad_weight": 0, "embedding_grad_weight": 1}


def which(
    operator: str,
    x: Tensor | tuple[int, ...],
    weight: Tensor | torch.nn.Module,
    bias: Tensor | None = None,
    **geometry: Any,
) -> Plan:
    """The Plan that would run for an operator on a sparse weight, without running it; print it to read why.

    It is the object that a call with such operands runs, unless a compiler, a mode, a profiler or the like looks on.

    Args:
        operator: a name in `sten.extend.OPERATORS`, as the user means it: "linear" is x @ weight.T, "matmul" is
            x @ weight. A transposed weight resolves to the product that really runs.
        x: the first operand (activations, an index, or for "..._grad_..." the gradient), or its shape: then it is
            contiguous, of the weight's dtype and device, as all further operands are taken to be.
        weight: a `SparseTensor`; a module's weight in trainable form reads as one.
        bias: of "linear" or "conv2d".
        **geometry: of a convolution, as numbers or tuples: stride, padding, dilation, groups (for "conv2d" as the
            shapes say), and `size`, the input's, for its gradients. Of "embedding_grad_weight": padding.

    Raises:
        ValueError: an unknown operator, or a shape that does not fit.
        TypeError: the weight is not sparse.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.eye(4), sten.CSR())
        >>> sten.which("linear", (16, 4), w).operator
        'linear'
        >>> sten.which("linear", (16, 4), w.t()).operator
        'linear_grad_input'
    """
    if operator not in OPERATORS:
        raise ValueError(f"No operator named {operator!r}; sten has {', '.join(sorted(OPERATORS))}.")
    if not isinstance(weight, SparseTensor):
        raise TypeError(f"which() takes a SparseTensor; got {type(weight).__name__}, whose operators torch runs.")
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


def _resolve(operator: str, w: SparseTensor) -> str:
    """The operator of the table that a product becomes for this weight; any other is itself."""
    if operator not in ("linear", "matmul", "linear_grad_input"):
        return operator
    return "linear" if (operator == "linear") != w.transposed else "matmul"


class Contiguous:
    """What a signature reads of a contiguous tensor that is not made: on the weight's device, of its dtype or int64."""

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


def _in_order(operator: str, first: Any, w: SparseTensor, bias: Tensor | None) -> tuple:
    """The operands as the reference names them: parts for a sparse one, then `first`, and a bias."""
    known, operands, free = OPERATORS[operator], [], first
    for name, parameter in inspect.signature(known.reference).parameters.items():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            continue
        if name == known.sparse[-1]:
            operands.append(w.parts)
        elif name == "bias":
            operands.append(bias_row(bias, w.stored_shape[0], repeat=True))
        else:
            operands.append(free)
            free = None
    return tuple(operands)


def _convolution(operator: str, first: Any, w: SparseTensor, bias: Tensor | None, keywords: dict) -> tuple[tuple, dict]:
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
        raise TypeError(f"x is the first operand or its shape, a tuple of sizes; got {x!r}.")
    return tuple(shape)


def _expect(operator: str, shape: tuple[int, ...], w: SparseTensor) -> None:
    """ValueError unless a first operand of this shape goes with the weight."""
    if operator.startswith("conv"):
        fits = w.dim() > 2 and len(shape) in (w.dim() - 1, w.dim())
        channels = w.shape[1] if operator == "conv2d" else w.shape[0]
        fits = fits and shape[1 - w.dim()] % channels == 0
        wanted = f"{channels} channels and {w.dim() - 2} more dimensions"
    elif operator in FEATURES:
        size = w.shape[FEATURES[operator]]
        fits, wanted = shape[-1:] == (size,), f"{size} features, in its last dimension"
    else:
        return
    if not fits:
        raise ValueError(
            f"{operator} with a weight of shape {tuple(w.shape)} takes a first operand with {wanted}; got {shape}."
        )


__all__ = ["which"]
