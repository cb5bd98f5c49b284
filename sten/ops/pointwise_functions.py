"""Pointwise operators and reductions as a user calls them, above autograd.

An operator stays sparse only if every tensor in it is sparse at one pattern (a dense factor is gathered first);
otherwise it runs on differentiable dense copies. So the gradient of a dense tensor is dense, always.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import unscale
from ..tensor import SparseTensor, as_it_is, function, project
from . import pointwise
from .others import on_dense_copies, owners, tensors_in
from .pointwise import is_scalar, same_patterns

# other spellings of an operator
SPELLINGS = {
    "add": "__add__ __radd__", "sub": "subtract __sub__", "mul": "multiply __mul__ __rmul__", "rsub": "__rsub__",
    "div": "divide true_divide __truediv__", "reciprocal": "__rdiv__ __rtruediv__", "pow": "__pow__ __rpow__",
    "neg": "negative __neg__", "abs": "absolute __abs__", "trunc": "fix", "clamp": "clip", "remainder": "__mod__",
    "asin": "arcsin", "atan": "arctan", "asinh": "arcsinh", "atanh": "arctanh", "acos": "arccos", "acosh": "arccosh",
    "atan2": "arctan2", "eq": "__eq__", "ne": "not_equal __ne__", "lt": "less __lt__", "le": "less_equal __le__",
    "gt": "greater __gt__", "ge": "greater_equal __ge__",
}  # fmt: skip


def named(names: str, ending: str = "") -> list[Callable]:
    """The functions of these operators, in every spelling."""
    found = []
    for name in names.split():
        for spelling in (name, *SPELLINGS.get(name, "").split()):
            in_place = spelling + ending if not spelling.startswith("__") else ""
            found += owners(in_place if ending else spelling, F)
    return found


def rule_of(functions: list[Callable], stays_sparse: Callable[[tuple, dict], bool]) -> None:
    """Run these functions as they are where `stays_sparse(args, kwargs)`, otherwise on dense copies."""

    def make(func: Callable) -> Callable:
        def rule(*args, **kwargs):
            if stays_sparse(args, kwargs):
                return func(*args, **kwargs)
            return on_dense_copies(func, args, kwargs, func.__name__)

        return rule

    for func in functions:
        function(func, replace=False)(make(func))


def only_sparse(args: tuple, kwargs: dict) -> bool:
    """Whether every tensor is sparse at one pattern, or a number."""
    every = (*args, *kwargs.values())
    return isinstance(args[0], SparseTensor) and same_patterns([a for a in every if isinstance(a, Tensor)])


def positive_power(args: tuple, kwargs: dict) -> bool:
    return isinstance(args[0], SparseTensor) and isinstance(args[1], (int, float)) and args[1] > 0


def no_gradient(args: tuple, kwargs: dict) -> bool:
    """Whether autograd does not record the call, of lists of tensors."""
    return not torch.is_grad_enabled() or not any(a.requires_grad for a in tensors_in((args, kwargs)))


def filled_with_zero(args: tuple, kwargs: dict) -> bool:
    value = args[2] if len(args) > 2 else kwargs.get("value")
    return isinstance(args[0], SparseTensor) and not isinstance(value, Tensor) and value == 0


def of_all_entries(args: tuple, kwargs: dict) -> bool:
    """Whether a reduction has no argument but the tensor, or `dtype`."""
    return isinstance(args[0], SparseTensor) and len(args) == 1 and not kwargs.keys() - {"dtype"}


def vector_norm(args: tuple, kwargs: dict) -> bool:
    """Whether it is a norm of all entries, of a positive order."""
    order = args[1] if len(args) > 1 else kwargs.get("p", kwargs.get("ord", 2))
    return (
        of_all_entries(args[:1], {k: v for k, v in kwargs.items() if k not in ("p", "ord")})
        and len(args) < 3
        and (order in (None, "fro") or (isinstance(order, (int, float)) and order > 0))
    )


def written_sparse(args: tuple, kwargs: dict) -> bool:
    """Whether an in-place operator writes to a sparse tensor, and no dense operand needs a gradient."""
    others = (a for a in (*args[1:], *kwargs.values()) if isinstance(a, Tensor) and not isinstance(a, SparseTensor))
    return isinstance(args[0], SparseTensor) and not (
        torch.is_grad_enabled() and any(a.requires_grad and not is_scalar(a) for a in others)
    )


def _factor(func: Callable) -> Callable:
    """w * x, x * w, w / x: the other operand is gathered at the pattern of w, differentiably."""
    divides = "div" in func.__name__

    def rule(a, b, **kwargs):
        w, other = (a, b) if isinstance(a, SparseTensor) else (b, a)
        if divides and not isinstance(a, SparseTensor):
            return on_dense_copies(func, (a, b), kwargs, func.__name__)
        if is_scalar(other) or (isinstance(other, SparseTensor) and other.same_pattern(w)):
            return func(a, b, **kwargs)
        if torch.broadcast_shapes(other.shape, w.shape) != w.shape or w.cache.full_gradient:
            return on_dense_copies(func, (a, b), kwargs, func.__name__)
        dense = other.to_dense() if isinstance(other, SparseTensor) else other
        other = project(torch.broadcast_to(dense, w.shape), w)
        return func(w, other, **kwargs) if w is a else func(other, w, **kwargs)

    return rule


@function(F.dropout)
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout of the stored entries; the others are zero already."""
    if not training or p == 0:
        return input
    if not isinstance(input, SparseTensor) or inplace or input.cache.full_gradient:
        return on_dense_copies(F.dropout, (input, p, training, inplace), {}, "dropout")
    factor = F.dropout(torch.ones_like(input.parts["values"], requires_grad=False), p)
    return input * input.detach().with_values(factor)


for _function in named("mul div"):
    function(_function)(_factor(_function))
FOREACH = " ".join("_foreach_" + name for name in pointwise.FOREACH.split())
rule_of([f for f in named(FOREACH) if not f.__name__.endswith("_")], no_gradient)
as_it_is(unscale, *named(FOREACH), *named(" ".join(pointwise.FUSED)))
rule_of(named("pow", "_"), lambda args, kwargs: written_sparse(args, kwargs) and not isinstance(args[1], Tensor))
rule_of(named(pointwise.IN_PLACE + " masked_fill", "_"), written_sparse)
rule_of(named(pointwise.KEEP_ZERO), only_sparse)
rule_of(named(pointwise.SAME_PATTERN), only_sparse)
rule_of(named("pow"), positive_power)
rule_of(named("masked_fill"), filled_with_zero)
rule_of(named("sum mean count_nonzero"), of_all_entries)
rule_of([torch.linalg.norm], of_all_entries)
rule_of([*named("norm"), torch.linalg.vector_norm], vector_norm)
rule_of(named(pointwise.TO_DENSE), lambda args, kwargs: False)
rule_of([F.layer_norm, F.rms_norm], lambda args, kwargs: False)
