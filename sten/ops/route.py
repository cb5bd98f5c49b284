"""`which`: the kernel that an operator would use, and why, without running it."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import OPERATORS, Choice, choice, find
from ..layout import Layout
from ..tensor import SparseTensor

PRODUCTS = ("linear", "matmul", "linear_grad_input")


def which(operator: str, x: Tensor | tuple[int, ...], weight: SparseTensor) -> Choice:
    """The kernel and variant that would run for an operator on a sparse weight, and the reason, without running it.

    Args:
        operator: a name in `sten.OPERATORS`, as the user means it: "linear" is x @ weight.T, "matmul" is x @ weight.
            A transposed weight resolves to the product that really runs.
        x: the first operand (activations, or for "..._grad_..." the gradient), or its shape.
        weight: a `SparseTensor`.

    Returns:
        `sten.Choice`; print it.

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
        raise TypeError(f"which() asks about a SparseTensor; got a {type(weight).__name__}, which torch runs.")
    shape = _shape(x)
    _check(operator, shape, weight)
    name, spec = resolve(operator, weight)
    return choice(name, spec, weight.stored_shape, weight.parts, shape)


def resolve(operator: str, w: SparseTensor) -> tuple[str, Layout | tuple[Layout | None, ...]]:
    """The operator of the table, and its layouts, that `operator` becomes for this weight."""
    if operator not in PRODUCTS:
        return operator, w.spec
    if (operator == "linear") != w.transposed:
        return "linear", w.spec
    if find("matmul", w.device.type, (None, w.spec)) is not None:
        return "matmul", (None, w.spec)
    return "linear_grad_input", w.spec


def _shape(x) -> tuple[int, ...]:
    shape = x.shape if isinstance(x, Tensor) else x
    if not isinstance(shape, (tuple, list)) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"x is the first operand or its shape, a tuple of sizes; got {x!r}.")
    return tuple(shape)


FEATURES = {"linear": 1, "matmul": 0, "linear_grad_input": 0, "linear_grad_weight": 0, "embedding_grad_weight": 1}


def _check(operator: str, shape: tuple[int, ...], w: SparseTensor) -> None:
    """ValueError unless a first operand of this shape goes with the weight (a convolution's groups are not known)."""
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


__all__ = ["resolve", "which"]
