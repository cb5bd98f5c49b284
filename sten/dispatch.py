"""One Plan per signature: from the weight's cache, or prepared by the registered kernel.

A signature is the operator; shape, strides, dtype, device and alignment of every dense operand; dtype, strides and
alignment of the values; torch's tf32 switch for fp32 on CUDA; and the geometry of a convolution. The plans of a weight
are stored in its `PatternCache` (`w.cache.plans`), and hold no pointer to a pattern. The states of a signature:

    absent       before its first call, after a kernel was registered, after MAX_PLANS other signatures were stored, and
                 under `observe()`. A call checks the operands, prepares a Plan, stores it (not under `observe()`, nor
                 while a CUDA graph is captured) and runs it.
    prepared     after an earlier call, or `sten.which`. A call is one dictionary look-up, then `plan.run`.
    invalidated  after the pattern was written: `PatternCache.invalidate` cleared the plans. As absent.
    intercepted  under a compiler, a mode, torch.func or forward AD. Nothing is looked up or stored: each call prepares
                 a Plan with `tokens=None`, which runs operators that these can see. Compilers and dispatch modes see
                 one operator on the SparseTensor (`sten.ops.traceable`), which runs not intercepted.

Under torch.profiler the same Plans run, each in a range with its name.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._torch_private import allows_tf32, exports_to_onnx, facts, is_compiling, is_intercepted, profiler_enabled
from .caller import refuse_shards, user_stacklevel, weight_name
from .kernel_table import KERNELS, OPERATORS, Flags, Kernel, Plan, _warned, find, prepare
from .kernel_table import kernel as kernel
from .kernel_table import operator as operator
from .kernel_table import rows as rows
from .layouts.base import Layout, Parts

if TYPE_CHECKING:
    from .tensor import SparseTensor

MAX_PLANS = 64  # of one pattern; then all are dropped, since signatures may vary without end (lengths of sequences)
_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("sten_strict", default=False)
_observers: list[list] = []  # the lists that `observe()` fills


class DensifyError(RuntimeError):
    """Raised under `sten.strict()` if an operator without a rule would run on a dense copy."""


def planned(
    name: str, w: SparseTensor, operands: tuple, geometry: dict[str, Any] | None = None, intercepted: bool = False
) -> Plan:
    """The Plan of a call, from the weight's cache or prepared; the caller runs it.

    Args:
        name, w, operands, geometry: as in `run`; the weight among `operands` is `w.parts` itself.
        intercepted: whether the call is intercepted (`sten._torch_private.is_intercepted`); it is, too, if an operand
            is more than its numbers.
    """
    values = w.parts["values"]
    if intercepted or (key := facts(values, *operands)) is None:
        return _new_plan(name, w, operands, geometry or {}, intercepted=True)
    signature = (name, KERNELS.version, key)
    if geometry:
        signature += tuple(geometry.values())
    if values.is_cuda and values.dtype is torch.float32:
        signature += (allows_tf32(),)
    plan = w.cache.plans.get(signature)
    if plan is None:
        plan = _prepare_and_store(name, w, operands, geometry or {}, signature)
    return _named(plan) if profiler_enabled() else plan


def _named(plan: Plan) -> Plan:
    """The Plan in a range of the profiler."""
    name = f"sten::{plan.product}: {plan.kernel}{f' [{plan.variant}]' if plan.variant else ''}"

    def run(*operands: Any, **keywords: Any) -> Any:
        with torch.profiler.record_function(name):
            return plan.run(*operands, **keywords)

    return plan if plan.run is None else dataclasses.replace(plan, run=run)


def _prepare_and_store(name: str, w: SparseTensor, operands: tuple, geometry: dict[str, Any], signature: tuple) -> Plan:
    """Make the Plan of a signature, and store it."""
    return _stored(w, signature, _new_plan(name, w, operands, geometry, intercepted=False))


def _stored(w: SparseTensor, signature: tuple, plan: Plan) -> Plan:
    """The Plan, stored with the weight unless it is for one call only."""
    if _observers or (w.parts["values"].is_cuda and torch.cuda.is_current_stream_capturing()):
        return plan
    plans = w.cache.plans
    if len(plans) >= MAX_PLANS:
        plans.clear()
    plans[signature] = plan
    return plan


def _new_plan(name: str, w: SparseTensor, operands: tuple, geometry: dict[str, Any], intercepted: bool) -> Plan:
    """Check the operands and make a Plan for them."""
    op, parts, first = OPERATORS[name], w.parts, operands[0]
    if op.check is not None:
        op.check(w, *operands, **geometry)
    layout, shape, values = w.sparse_layout, w.stored_shape, parts["values"]
    if len(op.sparse) > 1 and op.sparse[-1] != "weight":
        layouts = tuple(layout if a is parts else None for a in operands)
        if op.otherwise is not None and find(name, values.device.type, layouts) is None:
            name = op.otherwise
        else:
            layout, shape = layouts, tuple(shape if a is parts else tuple(a.shape) for a in operands)
    if intercepted and exports_to_onnx():  # whose files have standard operators only
        return Plan.of("onnx", "torch.onnx.export", functools.partial(op.reference, layout=layout, shape=shape))
    entries = values.numel()
    flags = Flags(
        tokens=None if intercepted or isinstance(first, dict) else op.tokens(tuple(first.shape)),
        entries=entries if type(entries) is int else None,
        device=values.device,
        memory_format=memory_format(first) if "groups" in geometry else torch.contiguous_format,
        geometry=geometry or None,
    )
    plan = prepare(name, layout, shape, values.dtype, flags)
    _record(name, w, layout, plan)
    return plan


def planned_input(name: str, x: SparseTensor, weight: Any, tokens: int | None) -> Plan:
    """The Plan of an operator with a sparse activation and a dense weight, which has a shape.

    It is stored with the pattern of the activation: that of a site, which is new at each call, has the Plans of the
    site (`Site.plans`). The signature has the share of the entries, in steps of half a percent, not their number.
    """
    values, shape = x.parts["values"], x.stored_shape
    share = -(-200 * values.numel() // max(1, shape[0] * shape[1]))
    size = weight.shape, weight.stride(), values.dtype, values.device
    signature = (name, KERNELS.version, shape, *size, share)
    plan = x.cache.plans.get(signature)
    if plan is None:
        plan = _prepare_input(name, x, weight, tokens, signature)
    return _named(plan) if profiler_enabled() else plan


def _prepare_input(name: str, x: SparseTensor, weight: Any, tokens: int | None, signature: tuple) -> Plan:
    """Make the Plan, and store it."""
    values, layouts = x.parts["values"], (x.sparse_layout, None)
    flags = Flags(tokens, values.numel(), values.device, geometry={"input_major": weight.t().is_contiguous()})
    plan = prepare(name, layouts, (x.stored_shape, tuple(weight.shape)), values.dtype, flags)
    _record(name, x, layouts, plan)
    return _stored(x, signature, plan)


def planned_together(
    name: str,
    weights: tuple[SparseTensor, ...],
    x: Tensor,
    biases: tuple,
    geometry: dict[str, Any],
    serves: Callable[[tuple[SparseTensor, ...]], bool],
    intercepted: bool,
) -> Plan:
    """The Plan of an operator on several sparse weights and one dense operand, stored with the first weight.

    Where no kernel is registered for their layouts, or `serves(weights)` is False, its `run` is None: the caller runs
    the operators that this one is made of.
    """
    key, values = None, [w.parts["values"] for w in weights]
    if not intercepted and (of_operands := facts(x, *values, *biases)) is not None:
        key = (name, KERNELS.version, of_operands, serves, *geometry.values())
        for w in weights:
            key += (w.cache, w.transposed)
        if values[0].is_cuda and values[0].dtype is torch.float32:
            key += (allows_tf32(),)
    plan = None if key is None else weights[0].cache.plans.get(key)
    if plan is None:
        plan = _prepare_together(name, weights, x, biases, geometry, serves, key)
    return _named(plan) if key is not None and profiler_enabled() else plan


def _prepare_together(name, weights, x, biases, geometry, serves, key) -> Plan:
    """Make the Plan; store it if it has a key."""
    op, values = OPERATORS[name], [w.parts["values"] for w in weights]
    layouts: Any = tuple(w.sparse_layout for w in weights) + (None,) * (len(op.sparse) - len(weights))
    shapes: Any = tuple(w.stored_shape for w in weights)
    if len(op.sparse) == 1:
        layouts, shapes = layouts[0], shapes[0]
    if not serves(weights) or find(name, values[0].device.type, layouts) is None:
        plan = Plan.of("apart", "no kernel runs these products together: each by itself", None)
    else:
        op.check(weights, x, biases)
        entries = None if key is None else sum(v.numel() for v in values) // len(values)
        tokens = None if key is None else op.tokens(tuple(x.shape))
        flags = Flags(tokens, entries, values[0].device, geometry=geometry)
        plan = prepare(name, layouts, shapes, values[0].dtype, flags)
        for w in weights:
            _record(name, w, layouts, plan)
    return plan if key is None else _stored(weights[0], key, plan)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last (channels_last_3d for volumes) if x has that format, else contiguous_format.

    An image of one pixel, or of one channel, is both, and counts as channels_last.
    """
    step = 1
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.shape[d] != 1 and x.stride()[d] != step:
            return torch.contiguous_format
        step *= x.shape[d]
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def run(name: str, w: SparseTensor, *operands: Any, **geometry: Any) -> Any:
    """Run an operator whose sparse operand is `w`; its Plan is stored in the cache of `w`.

    Args:
        name: a name in `sten.extend.OPERATORS`.
        w: the SparseTensor.
        *operands: the operands of a kernel, in order; the sparse one as `w.parts`.
        **geometry: further keywords of the operator's kernels; tuples, no lists.

    Returns:
        What the kernel returns.
    """
    plan = planned(name, w, operands, geometry, is_intercepted())
    return plan.run(*operands, **geometry)


def run_both(name: str, a: SparseTensor, b: SparseTensor) -> Any:
    """Run an operator on two sparse operands; its Plan is prepared at each call."""
    values, layouts = b.parts["values"], (a.sparse_layout, b.sparse_layout)
    flags = Flags(None, values.numel(), values.device)
    plan = prepare(name, layouts, (a.stored_shape, b.stored_shape), values.dtype, flags)
    _record(name, b, layouts, plan)
    return plan.run(a.parts, b.parts)


def warn_densified(name: str, w: SparseTensor) -> None:
    """Warn, once for each (operator, layout type), that an operator runs on a dense copy; raise under `strict`."""
    layout, traced = w.sparse_layout, is_compiling()  # Dynamo cannot look at frames
    if not traced:
        refuse_shards(layout)
    key = (name, type(layout))
    if not _strict.get() and key in _warned:
        return
    known = None if traced else weight_name(w)
    weight = f"{known or 'a weight'} ({layout}, shape {tuple(w.shape)})"
    if _strict.get():
        raise DensifyError(
            f"Expected an operator with a rule for {weight} under sten.strict(), got {name!r}; call to_dense() first."
        )
    _warned.add(key)
    text = f"sten: operator {name!r} has no rule for {weight}: it runs on a dense copy."
    warnings.warn(text, stacklevel=2 if traced else user_stacklevel())


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Context in which an operator that would run on a dense copy raises `sten.DensifyError` instead of warning.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.eye(4), sten.CSR())
        >>> with sten.strict():
        ...     y = torch.nn.functional.linear(torch.ones(1, 4), w)    # has a kernel: allowed
    """
    token = _strict.set(True)
    try:
        yield
    finally:
        _strict.reset(token)


@contextlib.contextmanager
def observe() -> Iterator[list[tuple[str, Layout, Parts, Kernel | None, Plan]]]:
    """Context that lists every operator call on a sparse operand: (operator, layout, parts, kernel or None, Plan).

    Inside it no stored Plan is used and none is stored: every call prepares one, and is listed then. Calls outside of
    it cost nothing more.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.eye(4), sten.CSR())
        >>> from sten.dispatch import observe
        >>> with observe() as seen:
        ...     y = torch.nn.functional.linear(torch.ones(1, 4), w)
        >>> [name for name, *_ in seen]
        ['linear']
    """
    seen: list[tuple[str, Layout, Parts, Kernel | None, Plan]] = []
    KERNELS.version += 1
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers[:] = [each for each in _observers if each is not seen]


def _record(name: str, w: SparseTensor, layout: Layout | tuple[Layout | None, ...], plan: Plan) -> None:
    for seen in _observers:
        seen.append((name, w.sparse_layout, w.parts, find(name, w.parts["values"].device.type, layout), plan))
