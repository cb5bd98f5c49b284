"""One decision a call: (operator, layouts, device) -> the registered kernel -> a Plan, which runs.

The contract, in one line: a kernel is a function of plain tensors; a sparse operand arrives as its dictionary of parts.
The table is asked for the exact device, then for "any"; what it does not have runs the operator's reference
implementation, which is pure torch, always correct, and says once how to register a real kernel.

A `Plan` is what runs for one signature: the operator, shape, strides, dtype, device and alignment of every dense
operand, dtype and alignment of the values, torch's tf32 switch where it matters, the geometry of a convolution.
`sten.which` prints it. The plans of a weight are kept in its `PatternCache` (`w.cache.plans`), and hold no pointer into
a pattern. The states of a signature:

    absent       its first call; a kernel was registered since; MAX_PLANS others came; `observe()` is on.
                 A call checks the operands, prepares a Plan, stores it (not under `observe()`, nor while a CUDA graph
                 is captured) and runs it.
    prepared     by an earlier call, or by `sten.which`. A call is one dictionary look-up, then `plan.run`.
    invalidated  the pattern was written: `PatternCache.invalidate` cleared the plans. As absent.
    intercepted  a compiler, a mode, torch.func, a tracer, the profiler or forward AD looks on. Nothing is looked up or
                 stored: each call prepares with `tokens=None`, for a Plan that runs operators which these can see.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._torch_private import allows_tf32, intercepted
from .layout import Layout, Parts

if TYPE_CHECKING:
    from .tensor import SparseTensor

MAX_PLANS = 64  # of one pattern; signatures that vary without end (lengths of sequences) start again behind it


class Flags(NamedTuple):
    """What a kernel may decide by beside layout, shape and dtype.

    Attributes:
        tokens: size of the work, from the first operand (`Operator.tokens`). None while the call is intercepted: sizes
            may be symbols then, and the Plan must run an operator (torch.library) that decides when it is run.
        entries: number of stored values; None where it is a symbol.
        device: where the values are.
        memory_format: of the first operand of a convolution, channels_last (channels_last_3d) where its channels lie
            last in memory; contiguous_format for every other operator.
        geometry: of a convolution: stride, padding, dilation, groups (and size, the input's, in conv2d_grad_input).
    """

    tokens: int | None
    entries: int | None
    device: torch.device
    memory_format: torch.memory_format = torch.contiguous_format
    geometry: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs for one signature: `sten.which` prints it, and a call runs it.

    Attributes:
        operator, layouts, device: the row of the kernel table.
        kernel: name of the registered function; "reference" for the operator's reference implementation.
        variant: which of the kernel's ways was chosen, if it has several.
        reason: why, in words.
        run: `run(*operands, **geometry)`: the operands of a kernel, a sparse one as its dictionary of parts.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.eye(4), sten.Masked())
        >>> print(sten.which("linear", (16, 4), w))
        linear(Masked()) on cpu: linear_expand: multiplies the dense values under the mask; saves no memory, no time
    """

    operator: str
    layouts: tuple[str, ...]
    device: str
    kernel: str
    variant: str | None
    reason: str
    run: Callable[..., Any]

    @classmethod
    def of(cls, variant: str | None, reason: str, run: Callable[..., Any] | None) -> Plan:
        """What a `prepare` function returns; dispatch fills in the rest (`kernel`: the name of that function).

        The variant "reference", for which `run` may be None, stands for the operator's reference implementation.
        """
        return cls("", (), "", "", variant, reason, run)

    def __str__(self) -> str:
        variant = f" [{self.variant}]" if self.variant else ""
        return f"{self.operator}({', '.join(self.layouts)}) on {self.device}: {self.kernel}{variant}: {self.reason}"


@dataclass(frozen=True)
class Kernel:
    """One entry of the table: a kernel, or (`prepares`) a function that returns a Plan."""

    function: Callable[..., Any]
    prepares: bool = False


class Table(dict[tuple, Kernel]):
    """(operator, device type, layout type of each operand that may be sparse) -> Kernel.

    `version` changes with the table and is part of every signature, so that a kernel registered later is found.
    """

    version = 0

    def __setitem__(self, key: tuple, entry: Kernel) -> None:
        self.version += 1
        super().__setitem__(key, entry)

    def __delitem__(self, key: tuple) -> None:
        self.version += 1
        super().__delitem__(key)


@dataclass(frozen=True)
class Operator:
    """An operator that weights may be sparse in: its reference implementation and the names of its sparse operands."""

    name: str
    sparse: tuple[str, ...]
    reference: Callable[..., Any]
    required: tuple[str, ...]
    tokens: Callable[[tuple[int, ...]], int]
    check: Callable[..., None] | None


KERNELS = Table()
OPERATORS: dict[str, Operator] = {}
_warned: set[tuple] = set()
_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("sten_strict", default=False)
_observers: list[list] = []  # those that `observe()` fills


class DensifyError(RuntimeError):
    """Raised under `sten.strict()` where an operator without a rule would turn a sparse tensor dense."""


def rows(shape: tuple[int, ...]) -> int:
    """How many rows of features activations of this shape have: the `tokens` of a product."""
    return math.prod(shape[:-1])


def operator(
    name: str,
    *,
    sparse: tuple[str, ...] = ("weight",),
    required: tuple[str, ...] = (),
    tokens: Callable[[tuple[int, ...]], int] = rows,
    check: Callable[..., None] | None = None,
) -> Callable:
    """Declare an operator; the decorated function is its reference implementation, for every layout and device.

    It has the signature of the operator's kernels: the operands in order, a sparse one as its parts, then the
    keywords `layout` and `shape` (the stored shape of the weight); tuples of them where several operands may be sparse.

    Args:
        name: its name in the table.
        sparse: the operands that may be sparse.
        required: those of them that are sparse in every kernel.
        tokens: the size of the work, from the shape of the first operand (`Flags.tokens`).
        check: `check(w, *operands, **geometry)` raises for operands that do not fit; called once for a signature.

    Example:
        >>> import torch, sten
        >>> @sten.operator("row_norms")
        ... def row_norms(weight, *, layout, shape):
        ...     return torch.linalg.vector_norm(layout.unpack(weight, shape), dim=1)
        >>> w = sten.from_dense(torch.eye(2), sten.CSR())
        >>> sten.dispatch.run("row_norms", w, w.parts)
        tensor([1., 1.])
    """

    def register(function: Callable) -> Callable:
        OPERATORS[name] = Operator(name, sparse, function, required, tokens, check)
        return function

    return register


def kernel(operator: str, *, device: str, prepare: bool = False, **operands: type[Layout]) -> Callable:
    """Register the decorated function for an operator, given layouts and a device type: a kernel, or what prepares one.

    Args:
        operator: "linear", "linear_grad_input", "linear_grad_weight", "conv2d", "embedding", ... (`sten.OPERATORS`).
        device: "cpu", "cuda", ..., or "any": for devices without a kernel of their own.
        prepare: False: the function is the kernel, `function(*operands, layout=, shape=)`, and always runs. True: it
            is `function(layout, shape, dtype, flags) -> Plan`, asked once for a signature, with the stored shape of
            the weight, the dtype of its values and `sten.dispatch.Flags`; it returns
            `sten.Plan.of(variant, reason, run)` with `run(*operands)`, or None (or the variant "reference") for the
            reference implementation. What it decides by is the signature's, so `run` may build a launch from the
            tensors of its first call, but must not keep them.
        **operands: the layout class of each sparse operand by name, mostly `weight=`.

    Raises:
        ValueError: unknown operator or operand name.

    Example:
        >>> import torch, sten
        >>> class Shadow(sten.Layout): ...
        >>> @sten.kernel("linear", weight=Shadow, device="cpu")
        ... def shadow_linear(x, weight, bias, *, layout, shape):
        ...     return torch.nn.functional.linear(x, weight["values"], bias)
        >>> @sten.kernel("linear", weight=Shadow, device="cpu", prepare=True)
        ... def shadow_linear(layout, shape, dtype, flags):
        ...     if dtype is not torch.float32:
        ...         return sten.Plan.of("reference", f"the kernel is for float32, not {dtype}", None)
        ...     return sten.Plan.of("dense", "multiplies all", lambda x, weight, bias: x @ weight["values"].T + bias)
    """
    known = OPERATORS.get(operator)
    if known is None:
        names = ", ".join(sorted(OPERATORS))
        raise ValueError(f"No operator named {operator!r}; sten has {names}; declare it with sten.operator.")
    if not operands or not set(known.required) <= set(operands) <= set(known.sparse):
        must = f" and needs {', '.join(known.required)}" if known.required else ""
        takes, got = ", ".join(known.sparse), ", ".join(operands)
        raise ValueError(f"Operator {operator!r} takes the sparse operands {takes}{must}; got {got}.")
    for name, layout in operands.items():
        if not (isinstance(layout, type) and issubclass(layout, Layout)):
            raise ValueError(f"{name}= takes a layout class such as sten.CSR; got {layout!r}.")

    def register(function: Callable) -> Callable:
        KERNELS[(operator, device, *(operands.get(name) for name in known.sparse))] = Kernel(function, prepare)
        return function

    return register


def find(name: str, device: str, layout: Layout | tuple[Layout | None, ...]) -> Kernel | None:
    """The registered kernel for this operator, device type and layout (a tuple of them: None marks a dense operand)."""
    if isinstance(layout, tuple):
        types = [None if each is None else type(each) for each in layout]
    else:
        types = [type(layout)]
    return KERNELS.get((name, device, *types)) or KERNELS.get((name, "any", *types))


def _layouts(layout: Layout | tuple[Layout | None, ...]) -> tuple[Layout, ...]:
    return tuple(each for each in layout if each is not None) if isinstance(layout, tuple) else (layout,)


def prepare(
    name: str,
    layout: Layout | tuple[Layout | None, ...],
    shape: tuple,
    dtype: torch.dtype,
    flags: Flags,
) -> Plan:
    """The Plan of an operator: what `run` stores for a signature. `shape`: the stored shape of the weight.

    With several operands that may be sparse, `layout` and `shape` are tuples (None: a dense operand).
    """
    known, device = OPERATORS[name], flags.device.type
    entry = find(name, device, layout)
    reference = known.reference
    if entry is None:
        reference = functools.partial(_unregistered, known, device)
        plan = Plan.of("reference", "no kernel is registered for this layout on this device", None)
    elif entry.prepares:
        plan = entry.function(layout, shape, dtype, flags)
        plan = plan or Plan.of("reference", "the registered kernel does not serve this", None)
    else:
        reason = (inspect.getdoc(entry.function) or "the registered kernel").splitlines()[0].rstrip(".")
        plan = Plan.of(None, reason, functools.partial(entry.function, layout=layout, shape=shape))
    about = {"operator": name, "layouts": tuple(map(str, _layouts(layout))), "device": device}
    if plan.variant == "reference":
        run = functools.partial(reference, layout=layout, shape=shape)
        return dataclasses.replace(plan, **about, kernel="reference", variant=None, run=run)
    return dataclasses.replace(plan, **about, kernel=entry.function.__name__)


def planned(
    name: str, w: SparseTensor, operands: tuple, geometry: dict[str, Any] | None = None, seen: bool = False
) -> Plan:
    """The Plan of a call, from the weight's plans or made now; the caller runs it.

    Args:
        name, w, operands, geometry: as in `run`; `operands` hold `w.parts` itself in the place of the weight.
        seen: whether the call is intercepted.
    """
    if seen:
        return _made(name, w, operands, geometry or {}, seen)
    parts = w.parts
    values = parts["values"]
    key = [name, KERNELS.version, values.dtype, values.data_ptr() & 15]
    for a in operands:
        if a is None:
            key.append(None)
        elif a is not parts:
            key += (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() & 15)
    if geometry:
        key += geometry.values()
    if values.is_cuda and values.dtype is torch.float32:
        key.append(allows_tf32())
    signature = tuple(key)
    plan = w.cache.plans.get(signature)
    return _absent(name, w, operands, geometry or {}, signature) if plan is None else plan


def _absent(name: str, w: SparseTensor, operands: tuple, geometry: dict[str, Any], signature: tuple) -> Plan:
    """Make the Plan of a signature, and store it unless that would outlive what it was made for."""
    plan = _made(name, w, operands, geometry, seen=False)
    if _observers or (w.parts["values"].is_cuda and torch.cuda.is_current_stream_capturing()):
        return plan
    plans = w.cache.plans
    if len(plans) >= MAX_PLANS:
        plans.clear()
    plans[signature] = plan
    return plan


def _made(name: str, w: SparseTensor, operands: tuple, geometry: dict[str, Any], seen: bool) -> Plan:
    """A new Plan for these operands, which are checked."""
    known, parts, first = OPERATORS[name], w.parts, operands[0]
    if known.check is not None:
        known.check(w, *operands, **geometry)
    layout, shape, values = w.spec, w.stored_shape, parts["values"]
    if len(known.sparse) > 1:
        layout = tuple(layout if a is parts else None for a in operands)
        shape = tuple(shape if a is parts else tuple(a.shape) for a in operands)
    entries = values.numel()
    flags = Flags(
        tokens=None if seen or isinstance(first, dict) else known.tokens(tuple(first.shape)),
        entries=entries if type(entries) is int else None,
        device=values.device,
        memory_format=memory_format(first) if "groups" in geometry else torch.contiguous_format,
        geometry=geometry or None,
    )
    plan = prepare(name, layout, shape, values.dtype, flags)
    _note(name, w, layout)
    return plan


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last (channels_last_3d for volumes) where channels lie last in memory, else contiguous_format.

    An image of one pixel, or of one channel, is both, and counts as channels_last.
    """
    step = 1
    for place in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.shape[place] != 1 and x.stride()[place] != step:
            return torch.contiguous_format
        step *= x.shape[place]
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def run(name: str, w: SparseTensor, *operands: Any, **geometry: Any) -> Any:
    """Run an operator whose sparse operand is `w`, whose cache keeps the Plan.

    Args:
        name: a name in `sten.OPERATORS`.
        w: the SparseTensor.
        *operands: those of a kernel, in order; `w.parts` in the place of the sparse one.
        **geometry: further keywords of the operator's kernels; tuples, no lists.
    """
    plan = planned(name, w, operands, geometry, intercepted(w, *operands))
    return plan.run(*operands, **geometry)


def run_both(name: str, a: SparseTensor, b: SparseTensor) -> Any:
    """Run an operator on two sparse operands; its Plan is made anew at each call."""
    values, layouts = b.parts["values"], (a.spec, b.spec)
    flags = Flags(None, values.numel(), values.device)
    plan = prepare(name, layouts, (a.stored_shape, b.stored_shape), values.dtype, flags)
    _note(name, b, layouts)
    return plan.run(a.parts, b.parts)


def stub(name: str, layouts: tuple[type[Layout], ...], device: str) -> str:
    """The three lines that register a kernel for this key, ready to paste."""
    known = OPERATORS[name]
    operands = ", ".join(f"{n}={cls.__name__}" for n, cls in zip(known.sparse, layouts, strict=True))
    signature = inspect.signature(known.reference)
    head = f'@sten.kernel("{name}", {operands}, device="{device}")'
    return f"{head}\ndef {name}{signature}:\n    ...  # a sparse operand is the dict of its parts"


def _unregistered(known: Operator, device: str, *operands: Any, layout: Any, shape: Any, **geometry: Any) -> Any:
    """The reference implementation in the place of a kernel that nobody registered; it says so once."""
    types = tuple(type(each) for each in _layouts(layout))
    key = (known.name, types, device)
    if key not in _warned:
        _warned.add(key)
        titles = ", ".join(cls.__name__ for cls in types)
        warnings.warn(
            f"sten: no kernel for {known.name!r} with {titles} on {device}: the reference implementation runs "
            f"(correct, not fast). To register one:\n\n{stub(known.name, types, device)}\n",
            stacklevel=4,
        )
    return known.reference(*operands, layout=layout, shape=shape, **geometry)


def say_densified(name: str, layout: Layout) -> None:
    """Warn, once for each (operator, layout type), that an operator without a rule runs dense; raise under strict."""
    if _strict.get():
        raise DensifyError(f"Operator {name!r} has no rule for {layout}: it would run dense, and sten.strict() is on.")
    key = (name, type(layout))
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"sten: operator {name!r} has no rule for {layout}: it runs on a dense copy.", stacklevel=4)


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Context in which turning a sparse tensor dense silently or with a warning is an error (`sten.DensifyError`).

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
def observe() -> Iterator[list[tuple[str, Layout, Parts, Kernel | None]]]:
    """Context that lists every operator call on a sparse operand: (operator, layout, parts, kernel or None).

    Inside it no Plan is stored, and none that was stored before is found: every call prepares one, which is what is
    listed. Calls outside cost nothing for it.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.eye(4), sten.CSR())
        >>> with sten.dispatch.observe() as seen:
        ...     y = torch.nn.functional.linear(torch.ones(1, 4), w)
        >>> [name for name, *_ in seen]
        ['linear']
    """
    seen: list[tuple[str, Layout, Parts, Kernel | None]] = []
    KERNELS.version += 1
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers[:] = [each for each in _observers if each is not seen]


def _note(name: str, w: SparseTensor, layout: Layout | tuple[Layout | None, ...]) -> None:
    for seen in _observers:
        seen.append((name, w.spec, w.parts, find(name, w.parts["values"].device.type, layout)))
