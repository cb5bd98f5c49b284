"""Pointwise operators and reductions.

- in place with a scalar or a tensor of the same pattern: on the stored entries only;
- out of place with f(0) = 0, or between equal patterns: on the stored entries; otherwise the result is dense;
- a dense factor or divisor is gathered at the pattern: entries off it stay zero, whatever the other factor is there;
- a dense operand of an in-place operator must be zero off the pattern.

These are aten rules, for what users call (`pointwise_functions.py` keeps an operator sparse only if every tensor in it
is), for formulas of gradients, and for optimizers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch_private import tree_map
from ..tensor import SparseTensor, aten, project_now, unpack
from .padding import dense_to_values, to_be_written, zero_padding, zero_padding_

A = torch.ops.aten

KEEP_ZERO = """neg abs sign sgn sqrt square relu tanh sin tan asin atan sinh asinh atanh erf erfinv expm1 log1p trunc
    floor ceil round gelu silu leaky_relu elu nan_to_num"""
SAME_PATTERN = "add sub maximum minimum lerp addcmul addcdiv atan2 hypot"
TO_DENSE = """exp exp2 cos cosh acos log log2 log10 sigmoid reciprocal rsqrt rsub eq ne lt le gt ge isnan isfinite isinf
    logical_not clamp clamp_min clamp_max max min amax amin any all remainder softmax _softmax where"""
BACKWARD = """threshold_backward tanh_backward sigmoid_backward gelu_backward silu_backward leaky_relu_backward
    elu_backward"""  # proportional to the gradient
IN_PLACE = """add sub mul div lerp addcmul addcdiv sqrt neg abs clamp clamp_min clamp_max pow square sign zero fill
    normal uniform exp reciprocal rsqrt nan_to_num relu bernoulli erfinv"""
ZERO_STAYS = "mul zero sqrt neg abs addcmul lerp square sign relu erfinv nan_to_num"  # in place, whatever the operands
FUSED = ["_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_"]
FOREACH = """add_ sub_ mul_ div_ lerp_ addcmul_ addcdiv_ sqrt_ neg_ abs_ zero_ copy_ maximum_ minimum_ reciprocal_
    sign_
    add sub mul div lerp addcmul addcdiv sqrt neg abs norm maximum sign reciprocal"""


def overloads(names: str, ending: str = "") -> list:
    """Every aten overload of these operators without `out`."""
    packets = [getattr(A, name + ending) for name in names.split()]
    return [getattr(p, o) for p in packets for o in p.overloads() if "out" not in o and "grad_input" not in o]


DIVISIONS = set(overloads("div"))
GATHERS = set(overloads("mul_ div_"))
PRODUCTS = set(overloads("addcmul_ addcdiv_"))
ZERO_SAFE = set(overloads(ZERO_STAYS, "_"))


def is_scalar(a) -> bool:
    return not isinstance(a, Tensor) or a.dim() == 0


def first_sparse(args) -> SparseTensor:
    return next(a for a in args if isinstance(a, SparseTensor))


def same_patterns(args) -> bool:
    """Whether every operand is a scalar or has the pattern of the first sparse one."""
    w = first_sparse(args)
    return all(is_scalar(a) or (isinstance(a, SparseTensor) and w.same_pattern(a)) for a in args)


def values_of(a):
    return a.parts["values"] if isinstance(a, SparseTensor) else a


def on_values(func, args, kwargs) -> SparseTensor:
    """The operator on the stored entries; padding that a division (0 / 0) made NaN is zeroed."""
    w, out = first_sparse(args), func(*map(values_of, args), **kwargs)
    return zero_padding(w, out) if func in DIVISIONS or func is A.addcdiv.default else w.with_values(out)


@aten(*overloads(TO_DENSE), *overloads("pow"), A.sum.dim_IntList, A.mean.dim)
def dense_result(func, *args, **kwargs):
    """The operator on dense copies, without a warning, since f(0) != 0 makes the result dense."""
    args, kwargs = tree_map(lambda a: unpack(a) if isinstance(a, SparseTensor) else a, (args, kwargs))
    return func(*args, **kwargs)


@aten(*overloads(KEEP_ZERO))
def keep_zero(func, w, *args, **kwargs):
    return on_values(func, (w, *args), kwargs)


@aten(*overloads(SAME_PATTERN), *overloads(BACKWARD))
def same_pattern(func, a, b, *rest, **kwargs):
    """On the stored entries between tensors of one pattern; otherwise dense, w + 1 included."""
    sparse = isinstance(a, SparseTensor) and isinstance(b, SparseTensor) and same_patterns((a, b, *rest))
    return (on_values if sparse else _dense_call)(func, (a, b, *rest), kwargs)


def _dense_call(func, args, kwargs):
    return dense_result(func, *args, **kwargs)


@aten(A.pow.Tensor_Scalar)
def power(func, w, exponent):
    return on_values(func, (w, exponent), {}) if exponent > 0 else dense_result(func, w, exponent)


@aten(*overloads("mul div"))
def factor(func, a, b, **kwargs):
    """w * s, s * w, w / s; between same patterns; a dense factor or divisor is gathered at the pattern."""
    w = first_sparse((a, b))
    shapes = [x.shape for x in (a, b) if isinstance(x, Tensor)]
    divisor = w is not a and func in DIVISIONS
    if divisor or torch.broadcast_shapes(*shapes) != w.shape:
        return dense_result(func, a, b, **kwargs)
    return on_values(func, [x if is_scalar(x) else gathered(x, w) for x in (a, b)], kwargs)


def gathered(x: Tensor, w: SparseTensor) -> SparseTensor:
    """A dense operand, or one of another pattern, at the pattern of w."""
    if isinstance(x, SparseTensor):
        return x if x is w or x.same_pattern(w) else project_now(x, w)
    return project_now(torch.broadcast_to(x, w.shape), w)


@aten(*overloads(IN_PLACE, "_"))
def in_place(func, w, *args, **kwargs):
    """On the stored entries only; for a dense target the sparse operand is unpacked."""
    if not isinstance(w, SparseTensor):
        return dense_result(func, w, *args, **kwargs)
    gather = func in GATHERS or (func in PRODUCTS and _has_pattern(w, args[0]))
    args = [a if is_scalar(a) else _operand(func, w, a, gather) for a in args]
    to_be_written(w)
    func(w.parts["values"], *args, **kwargs)
    if func not in ZERO_SAFE:
        zero_padding_(w)
    return w


def _has_pattern(w: Tensor, a: Tensor) -> bool:
    return isinstance(w, SparseTensor) and isinstance(a, SparseTensor) and w.same_pattern(a)


def _operand(func, w: SparseTensor, a: Tensor, gather: bool) -> Tensor:
    """The values that the operator reads: `gather` what a zero of another factor makes irrelevant off the pattern."""
    if _has_pattern(w, a):
        return a.parts["values"]
    if gather:
        return gathered(a, w).parts["values"]
    return dense_to_values(w, unpack(a) if isinstance(a, SparseTensor) else a, func._schema.name.removeprefix("aten::"))


@aten(A.masked_fill_.Scalar, A.masked_fill_.Tensor)
def masked_fill_(func, w, mask, value):
    """Fill with zero anywhere; with another number only at stored entries, so that the mask must be off elsewhere."""
    if not isinstance(w, SparseTensor):
        return dense_result(func, w, mask, value)
    if not is_scalar(mask):
        gather = value == 0 or isinstance(mask, SparseTensor)
        mask = gathered(mask, w).parts["values"] if gather else dense_to_values(w, mask, "masked_fill_")
    to_be_written(w)
    w.parts["values"].masked_fill_(mask, value)
    zero_padding_(w)
    return w


@aten(A.masked_fill.Scalar, A.masked_fill.Tensor)
def masked_fill(func, w, mask, value):
    zero = isinstance(w, SparseTensor) and value == 0
    return masked_fill_(func, w.clone(), mask, value) if zero else dense_result(func, w, mask, value)


@aten(A.maximum.out, A.minimum.out)
def extremum_out(func, a, b, *, out):
    """As amsgrad updates its state: into a tensor of the same pattern."""
    return out.copy_(torch.maximum(a, b) if func is A.maximum.out else torch.minimum(a, b))


# reductions over all entries need only the stored ones


@aten(A.sum.default)
def total(func, w, *, dtype=None):
    return func(w.parts["values"], dtype=dtype)


@aten(A.mean.default)
def mean(func, w, *, dtype=None):
    return torch.sum(w.parts["values"], dtype=dtype) / w.numel()


@aten(A.linalg_vector_norm.default)
def vector_norm(func, w, ord=2, dim=None, keepdim=False, *, dtype=None):
    whole = dim is None or len(dim) in (0, w.dim())
    if ord <= 0 or not whole or not w.parts["values"].numel():
        return dense_result(func, w, ord, dim, keepdim, dtype=dtype)
    out = func(w.parts["values"], ord, None, False, dtype=dtype)
    return out.reshape([1] * w.dim()) if keepdim else out


@aten(*overloads("norm"))
def norm(func, w, p=2, dim=(), keepdim=False, *, dtype=None):
    return torch.linalg.vector_norm(w, 2 if p is None else p, dim or None, keepdim, dtype=dtype)


@aten(A.count_nonzero.default)
def count_nonzero(func, w, dim=None):
    return torch.count_nonzero(w.parts["values"]) if dim is None else dense_result(func, w, dim)


# lists of tensors, as optimizers with foreach=True, clip_grad_norm_ and GradScaler use them


@aten(A._amp_foreach_non_finite_check_and_unscale_.default)
def unscale(func, grads, found_inf, inv_scale):
    return func([values_of(g) for g in grads], found_inf, inv_scale)


@aten(*overloads(" ".join(FUSED)))
def fused_step(func, params, *lists, **kwargs):
    """A fused optimizer step, on the stored entries; gradients and state must have the patterns of the parameters."""
    for i, w in enumerate(params):
        for each in lists:
            a = each[i] if isinstance(each, (list, tuple)) and len(each) else None
            if isinstance(a, Tensor) and not is_scalar(a) and isinstance(w, SparseTensor) != _has_pattern(w, a):
                raise NotImplementedError(
                    "Expected gradients and state with the patterns of their parameters for a fused optimizer, got "
                    "others; make it with fused=False."
                )
    params, lists = tree_map(values_of, (list(params), lists))
    return func(params, *lists, **kwargs)


def _add_products(func, single, tensors, first, second, values):
    """addcmul and addcdiv take `value` as a keyword, the foreach operators as the third positional argument."""
    values = list(values) if isinstance(values, (list, tuple, Tensor)) else [values] * len(tensors)
    rows = zip(tensors, first, second, values, strict=True)
    out = [single(t, a, b, value=v) for t, a, b, v in rows]
    return None if func._schema.is_mutable else out


# maximum takes no number, as the foreach operators do
SINGLE = {
    "maximum_": A.clamp_min_,
    "minimum_": A.clamp_max_,
    "maximum": lambda t, a: A.maximum(t, a) if isinstance(a, Tensor) else A.clamp_min(t, a),
    "norm": lambda t, order=2, dtype=None: torch.linalg.vector_norm(t, order, dtype=dtype),
}


def _one_by_one(name: str):
    single = SINGLE[name] if name in SINGLE else getattr(A, name)

    def rule(func, tensors, *rest, **kwargs):
        """The operator that a foreach operator stands for, tensor by tensor."""
        if name.startswith("addc") and len(rest) == 3:
            return _add_products(func, single, tensors, *rest)
        rows = [[a[i] if isinstance(a, (list, tuple)) else a for a in rest] for i in range(len(tensors))]
        out = [single(t, *row, **kwargs) for t, row in zip(tensors, rows, strict=True)]
        return None if func._schema.is_mutable else out

    return rule


for _name in FOREACH.split():
    aten(*overloads("_foreach_" + _name))(_one_by_one(_name))
