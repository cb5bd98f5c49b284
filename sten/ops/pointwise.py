"""Pointwise operators and reductions.

- in place with a scalar or a tensor of the same pattern: on the stored entries alone;
- out of place with f(0) = 0, or between same patterns: on the stored entries; otherwise the correct dense tensor;
- a dense factor is gathered at the pattern; a dense operand in place must be zero off the pattern, or is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensor import SparseTensor, aten, project_now, unpack
from .structure import dense_to_values, only_live

A = torch.ops.aten

KEEP_ZERO = [
    A.neg, A.abs, A.sign, A.sgn, A.sqrt, A.square, A.relu, A.tanh, A.sin, A.tan, A.asin, A.atan, A.sinh, A.asinh, A.atanh,
    A.erf, A.expm1, A.log1p, A.trunc, A.floor, A.ceil, A.round, A.gelu, A.silu, A.leaky_relu, A.elu, A.nan_to_num,
]  # fmt: skip
FACTORS = [A.mul.Tensor, A.mul.Scalar, A.div.Tensor, A.div.Scalar]
SAME_PATTERN = [
    A.add.Tensor, A.sub.Tensor, A.maximum.default, A.minimum.default, A.lerp.Scalar, A.lerp.Tensor, A.addcmul.default,
    A.addcdiv.default, A.pow.Tensor_Tensor, A.atan2.default, A.where.self, A.hypot.default,
]  # fmt: skip
TO_DENSE = [
    A.exp.default, A.exp2.default, A.cos.default, A.cosh.default, A.acos.default, A.log.default, A.log2.default,
    A.sigmoid.default, A.reciprocal.default, A.rsqrt.default, A.add.Scalar, A.sub.Scalar, A.rsub.Scalar, A.rsub.Tensor,
    A.eq.Scalar, A.ne.Scalar, A.lt.Scalar, A.le.Scalar, A.gt.Scalar, A.ge.Scalar, A.eq.Tensor, A.ne.Tensor, A.lt.Tensor,
    A.le.Tensor, A.gt.Tensor, A.ge.Tensor, A.isnan.default, A.isfinite.default, A.isinf.default, A.logical_not.default,
    A.sum.dim_IntList, A.mean.dim, A.pow.Scalar, A.clamp.default, A.clamp_min.default, A.clamp_max.default, A.max.default,
    A.min.default, A.amax.default, A.amin.default, A.any.default, A.all.default, A.remainder.Scalar, A.softmax.int,
    A._softmax.default,
]  # fmt: skip
IN_PLACE = [
    A.add_.Tensor, A.add_.Scalar, A.sub_.Tensor, A.sub_.Scalar, A.mul_.Tensor, A.mul_.Scalar, A.div_.Tensor, A.div_.Scalar,
    A.lerp_.Scalar, A.lerp_.Tensor, A.addcmul_.default, A.addcdiv_.default, A.sqrt_.default, A.neg_.default, A.abs_.default,
    A.clamp_.default, A.clamp_min_.default, A.clamp_max_.default, A.pow_.Scalar, A.square_.default, A.sign_.default,
    A.zero_.default, A.fill_.Scalar, A.fill_.Tensor, A.normal_.default, A.uniform_.default, A.exp_.default,
    A.reciprocal_.default, A.rsqrt_.default, A.nan_to_num_.default, A.relu_.default, A.bernoulli_.float,
]  # fmt: skip


def _is_scalar(a) -> bool:
    return not isinstance(a, Tensor) or a.dim() == 0


def _first(args) -> SparseTensor:
    return next(a for a in args if isinstance(a, SparseTensor))


def _as_dense(a):
    return unpack(a) if isinstance(a, SparseTensor) else a


def dense_result(func, *args, **kwargs):
    """The operator on dense copies: its result is dense by nature (f(0) is not 0)."""
    return func(*map(_as_dense, args), **{k: _as_dense(v) for k, v in kwargs.items()})


def _on_values(func, w: SparseTensor, args, kwargs) -> SparseTensor:
    values = [a.parts["values"] if isinstance(a, SparseTensor) else a for a in args]
    out = func(*values, **kwargs)
    return w.with_values(out)


def _same_patterns(args) -> bool:
    w = _first(args)
    return all(_is_scalar(a) or (isinstance(a, SparseTensor) and w.same_pattern(a)) for a in args)


@aten(*(getattr(op, name) for op in KEEP_ZERO for name in op.overloads() if name in ("default", "decimals")))
def keep_zero(func, w, *args, **kwargs):
    return _on_values(func, w, (w, *args), kwargs)


@aten(*FACTORS)
def factor(func, a, b, **kwargs):
    """w * s, s * w, w / s; between same patterns; a dense factor or divisor is gathered at the pattern."""
    if not isinstance(a, SparseTensor) and func in (A.div.Tensor, A.div.Scalar):
        return dense_result(func, a, b, **kwargs)
    w = _first((a, b))
    if _same_patterns((a, b)):
        out = _on_values(func, w, (a, b), kwargs)
        padded = func in (A.div.Tensor, A.div.Scalar) and isinstance(b, SparseTensor)
        return only_live(out, out.parts["values"]) if padded else out
    gathered = [x if _is_scalar(x) else _at_pattern(x, w) for x in (a, b)]
    if gathered is None or torch.broadcast_shapes(*(x.shape for x in (a, b) if isinstance(x, Tensor))) != w.shape:
        return dense_result(func, a, b, **kwargs)
    out = func(*gathered, **kwargs)
    return only_live(w, out) if func is A.div.Tensor else w.with_values(out)


def _at_pattern(x: Tensor, w: SparseTensor) -> Tensor:
    if x is w:
        return w.parts["values"]
    if x.dim() > w.dim() or torch.broadcast_shapes(x.shape, w.shape) != w.shape:
        return x
    return project_now(x if isinstance(x, SparseTensor) else torch.broadcast_to(x, w.shape), w).parts["values"]


@aten(*SAME_PATTERN)
def same_pattern(func, *args, **kwargs):
    w = _first(args)
    if all(isinstance(a, SparseTensor) or not isinstance(a, Tensor) for a in args[:2]) and _same_patterns(args):
        if isinstance(args[1], SparseTensor):
            out = _on_values(func, w, args, kwargs)
            return only_live(out, out.parts["values"]) if func is A.addcdiv.default else out
    return dense_result(func, *args, **kwargs)


@aten(A.pow.Tensor_Scalar)
def power(func, w, exponent):
    return _on_values(func, w, (w, exponent), {}) if exponent > 0 else dense_result(func, w, exponent)


@aten(A.threshold_backward.default, A.tanh_backward.default, A.sigmoid_backward.default, *TO_DENSE)
def to_dense(func, *args, **kwargs):
    return dense_result(func, *args, **kwargs)


@aten(*IN_PLACE)
def in_place(func, w, *args, **kwargs):
    """On the stored entries alone; a dense target takes the sparse operand as dense."""
    if not isinstance(w, SparseTensor):
        return dense_result(func, w, *args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    gather_only = func in (A.mul_.Tensor, A.div_.Tensor)
    values = [
        a if _is_scalar(a) else _operand(w, a, name, gather_only) for a in args
    ]
    stored = w.parts["values"]
    func(stored, *values, **kwargs)
    if func not in ZERO_SAFE:
        stored.copy_(only_live(w, stored).parts["values"])
    return w


ZERO_SAFE = {A.mul_.Tensor, A.mul_.Scalar, A.zero_.default, A.sqrt_.default, A.neg_.default, A.abs_.default,
             A.addcmul_.default, A.lerp_.Scalar, A.square_.default, A.sign_.default, A.relu_.default}  # fmt: skip


def _operand(w: SparseTensor, a: Tensor, name: str, gather_only: bool) -> Tensor:
    if isinstance(a, SparseTensor) and w.same_pattern(a):
        return a.parts["values"]
    if gather_only:
        return _at_pattern(a, w)
    return dense_to_values(w, _as_dense(a), name)


# reductions over everything need the stored entries alone


@aten(A.sum.default)
def total(func, w, *, dtype=None):
    return func(w.parts["values"], dtype=dtype)


@aten(A.mean.default)
def mean(func, w, *, dtype=None):
    return torch.sum(w.parts["values"], dtype=dtype) / w.numel()


@aten(A.linalg_vector_norm.default)
def vector_norm(func, w, ord=2, dim=None, keepdim=False, *, dtype=None):
    if ord <= 0 or (dim is not None and len(dim) not in (0, w.dim())):
        return dense_result(func, w, ord, dim, keepdim, dtype=dtype)
    out = func(w.parts["values"], ord, None, False, dtype=dtype)
    return out.reshape([1] * w.dim()) if keepdim else out


@aten(A.norm.Scalar, A.norm.ScalarOpt_dim, A.norm.ScalarOpt_dtype)
def norm(func, w, *args, **kwargs):
    return dense_result(func, w, *args, **kwargs)


@aten(A.count_nonzero.default)
def count_nonzero(func, w, dim=None):
    return torch.count_nonzero(w.parts["values"]) if dim is None else dense_result(func, w, dim)


@aten(A._amp_foreach_non_finite_check_and_unscale_.default)
def unscale(func, grads, found_inf, inv_scale):
    return func([g.parts["values"] if isinstance(g, SparseTensor) else g for g in grads], found_inf, inv_scale)


def _one_by_one(func):
    """A foreach operator on a list with SparseTensors: the operator it stands for, tensor by tensor."""
    schema = func._schema
    name = schema.name.removeprefix("aten::_foreach_")
    single = getattr(A, {"norm": "linalg_vector_norm"}.get(name, name), None)
    if single is None:
        return
    overload = {"Scalar": "Scalar", "List": "Tensor", "default": "default", "ScalarList": "Scalar"}.get(func._overloadname)
    chosen = next((getattr(single, o) for o in (overload, "Tensor", "Scalar", "default") if o in single.overloads()), None)
    if chosen is None:
        return

    @aten(func)
    def run(_, lists, *args, **kwargs):
        rows = [[a[i] if isinstance(a, (list, tuple)) else a for a in args] for i in range(len(lists))]
        packet = single
        return [packet(x, *row, **kwargs) for x, row in zip(lists, rows, strict=True)]


for _name in ("add_", "mul_", "div_", "sub_", "lerp_", "addcmul_", "addcdiv_", "sqrt", "norm", "zero_", "mul", "div", "add", "neg"):
    _packet = getattr(A, "_foreach_" + _name)
    for _overload in _packet.overloads():
        if "out" not in _overload:
            _one_by_one(getattr(_packet, _overload))
