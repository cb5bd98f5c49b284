"""The kernel table: (operator, layout type of each sparse operand, device type) -> kernel.

The contract, in one line: a kernel is a function of plain tensors; a sparse operand arrives as its dictionary of parts.
Look-up is one dictionary access: the exact key, else the operator's reference implementation, which is pure torch,
always correct, and says once how to register a real kernel.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .layout import Layout, Parts


@dataclass(frozen=True)
class Kernel:
    """One entry of the table: the function; `choose`, which picks a variant, and may ask for `entries`; `bind`."""

    function: Callable
    choose: Callable | None = None
    counts: bool = False
    bind: Callable | None = None

    def pick(self, shape: tuple[int, ...], values: Tensor, layout: Layout) -> tuple[str, str]:
        """(variant, reason) for shape = (tokens, *weight shape)."""
        if self.counts:
            return self.choose(shape, values.dtype, layout, entries=values.numel())
        return self.choose(shape, values.dtype, layout)


@dataclass(frozen=True)
class Operator:
    """An operator that weights may be sparse in: its reference implementation and the names of its sparse operands."""

    name: str
    sparse: tuple[str, ...]
    reference: Callable
    required: tuple[str, ...]
    tokens: Callable[[tuple[int, ...]], int]


@dataclass(frozen=True)
class Choice:
    """What would run: the answer of `sten.which`."""

    operator: str
    layouts: tuple[str, ...]
    device: str
    kernel: str
    variant: str | None
    reason: str

    def __str__(self) -> str:
        variant = f" [{self.variant}]" if self.variant else ""
        return f"{self.operator}({', '.join(self.layouts)}) on {self.device}: {self.kernel}{variant}: {self.reason}"


KERNELS: dict[tuple, Kernel] = {}
OPERATORS: dict[str, Operator] = {}
_warned: set[tuple] = set()
_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("sten_strict", default=False)
_observers: list[Callable[[str, Layout, Parts, Kernel | None], None]] = []
WRITTEN: list[Callable[..., None]] = []  # who keeps what was derived from a pattern, and has to know of a change
TAPS: dict[int, Callable] = {}  # id of a pattern part -> who wants that weight's gradient dense (sten/training/tap.py)


def written(*pattern: Tensor) -> None:
    """To be called by who writes a pattern in place: a recorded graph may be replayed before any call."""
    for told in WRITTEN:
        told(*pattern)


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
) -> Callable:
    """Declare an operator; the decorated function is its reference implementation, for every layout and device.

    It has the signature of the operator's kernels: the operands in order, a sparse one as its parts, then the
    keywords `spec` (the layout; a tuple where several operands may be sparse) and `shape` (true shape, likewise).

    Args:
        name: its name in the table.
        sparse: the operands that may be sparse.
        required: those of them that are sparse in every kernel.
        tokens: the size of the work, from the shape of the first operand; `choose` gets it.

    Example:
        >>> import torch, sten
        >>> @sten.operator("row_norms")
        ... def row_norms(weight, *, spec, shape):
        ...     return torch.linalg.vector_norm(spec.unpack(weight, shape), dim=1)
        >>> w = sten.from_dense(torch.eye(2), sten.CSR())
        >>> sten.dispatch.call("row_norms", w.spec, w.stored_shape, w.parts, w.parts)
        tensor([1., 1.])
    """

    def register(function: Callable) -> Callable:
        OPERATORS[name] = Operator(name, sparse, function, required, tokens)
        return function

    return register


def kernel(
    operator: str,
    *,
    device: str,
    choose: Callable | None = None,
    bind: Callable | None = None,
    **operands: type[Layout],
) -> Callable:
    """Register the decorated function as the kernel of an operator for given layouts on a device type.

    Args:
        operator: "linear", "linear_grad_input", "linear_grad_weight", "conv2d", "embedding", ... (`sten.OPERATORS`).
        device: "cpu", "cuda", ...
        choose: pure function `choose(shape, dtype, spec) -> (variant, reason)`; shape: (tokens, *stored weight shape).
            With a parameter `entries` it also gets the number of stored values.
            The kernel then receives `variant=`; the variant "reference" runs the reference implementation instead.
        bind: for "linear", where deciding takes longer than the product: `bind(weight, *, spec, shape)` returns
            `call(x, bias, checked)`, kept with that weight, which answers as the kernel would, or None to have it
            called. Not `checked`, x and bias may be of any kind, and None is the answer but for a kind that it met.
            `choose` is not asked: where that would say "reference", the answer is None. `bind` may return None too, for
            a weight that it does not serve.
        **operands: the layout class of each sparse operand by name, mostly `weight=`.

    Raises:
        ValueError: unknown operator or operand name; `bind` for another operator than "linear".

    Example:
        >>> import torch, sten
        >>> class Shadow(sten.Layout): ...
        >>> @sten.kernel("linear", weight=Shadow, device="cpu")
        ... def shadow_linear(x, weight, bias, *, spec, shape):
        ...     return torch.nn.functional.linear(x, weight["values"], bias)
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

    if bind is not None and operator != "linear":
        raise ValueError(f'Only "linear" asks for what is bound to a weight; got bind= for {operator!r}.')
    counts = choose is not None and "entries" in inspect.signature(choose).parameters

    def register(function: Callable) -> Callable:
        key = (operator, device, *(operands.get(name) for name in known.sparse))
        KERNELS[key] = Kernel(function, choose, counts, bind)
        return function

    return register


def find(name: str, device: str, spec: Layout | tuple[Layout | None, ...]) -> Kernel | None:
    """The registered kernel for this operator, device type and layout (a tuple of them: None marks a dense operand)."""
    if isinstance(spec, tuple):
        return KERNELS.get((name, device, *(None if s is None else type(s) for s in spec)))
    return KERNELS.get((name, device, type(spec)))


class Bound(NamedTuple):
    """What a kernel has bound to a weight, `answer`, and what that holds for."""

    key: tuple
    entry: Kernel
    parts: Parts
    answer: Callable


ONCE, UNSERVED = False, ()  # in the place of a Bound: the weight was used once; nothing is bound to it


def ask_bound(name: str, w, x: Tensor, bias: Tensor | None, checked: bool) -> Tensor | None:
    """The operator by what a kernel has bound to the SparseTensor `w`; None where the kernel is to be called.

    It is bound at the second call that is checked: a weight that is made for one product is not worth it.
    """
    kept = w.bound
    if not kept:
        if checked and kept is not UNSERVED:
            w.bound = ONCE if kept is None else _bind(name, w.spec, w.stored_shape, w.parts)
        return None
    if KERNELS.get(kept.key) is not kept.entry or w.parts is not kept.parts:
        w.bound = None
        return None
    return None if _observers else kept.answer(x, bias, checked)


def _bind(name, spec, shape, parts):
    key = (name, parts["values"].device.type, type(spec))
    entry = KERNELS.get(key)
    answer = entry.bind(parts, spec=spec, shape=shape) if entry is not None and entry.bind is not None else None
    return UNSERVED if answer is None else Bound(key, entry, parts, answer)


def call(name: str, spec: Layout, shape: tuple[int, ...], parts: Parts, *args, cache=None, **kwargs) -> Any:
    """Run an operator on one sparse operand; `args` are the kernel's operands in order, `parts` among them."""
    values = parts["values"]
    entry = KERNELS.get((name, values.device.type, type(spec)))
    if _observers:
        for observe in _observers:
            observe(name, spec, parts, entry)
    if cache is not None and name.endswith("grad_weight"):
        tap = cache.dense_gradient
        if tap is not None:
            dense = OPERATORS[name].reference(*args, spec=_EveryEntry, shape=shape, **kwargs)
            tap(dense)
            return spec.pack_like(dense, parts)
    if entry is None:
        _say_reference(name, (type(spec),), values.device.type)
        return OPERATORS[name].reference(*args, spec=spec, shape=shape, **kwargs)
    kwargs["spec"], kwargs["shape"] = spec, shape
    return run(entry, name, shape, values, spec, args, kwargs)


class _EveryEntry:
    """Stands for a layout where a reference computes a gradient: nothing is left out."""

    @staticmethod
    def pack_like(dense, parts):
        return dense


def call_both(name: str, specs: tuple, shapes: tuple, *args) -> Any:
    """Run the registered kernel of an operator with two operands that may be sparse (None in `specs`: a dense one)."""
    which = max(i for i, spec in enumerate(specs) if spec is not None)
    parts, spec = args[which], specs[which]
    entry = find(name, parts["values"].device.type, specs)
    for observe in _observers:
        observe(name, spec, parts, entry)
    return run(entry, name, shapes[which], parts["values"], spec, args, {"spec": specs, "shape": shapes})


def run(
    entry: Kernel, name: str, shape_of: tuple[int, ...], values: Tensor, layout: Layout, args: tuple, kwargs: dict
) -> Any:
    """Run a kernel with the variant that its `choose` picks; "reference" is the operator's reference implementation."""
    if entry.choose is None:
        return entry.function(*args, **kwargs)
    variant, _ = entry.pick((OPERATORS[name].tokens(args[0].shape), *shape_of), values, layout)
    if variant == "reference":
        return OPERATORS[name].reference(*args, **kwargs)
    return entry.function(*args, variant=variant, **kwargs)


def choice(name: str, spec: Layout | tuple, shape: tuple[int, ...], parts: Parts, x_shape: tuple[int, ...]) -> Choice:
    """Which kernel and variant `call` would run for a first operand of shape `x_shape`, and why, without running it."""
    values = parts["values"]
    layouts = tuple(s for s in (spec if isinstance(spec, tuple) else (spec,)) if s is not None)
    about = (name, tuple(map(str, layouts)), values.device.type)
    entry = find(name, values.device.type, spec)
    if entry is None:
        return Choice(*about, "reference", None, "no kernel is registered for this layout on this device")
    variant, reason = None, (inspect.getdoc(entry.function) or "the registered kernel").splitlines()[0].rstrip(".")
    if entry.choose is not None:
        variant, reason = entry.pick((OPERATORS[name].tokens(tuple(x_shape)), *shape), values, layouts[-1])
    if variant == "reference":
        return Choice(*about, "reference", None, reason)
    return Choice(*about, entry.function.__name__, variant, reason)


def stub(name: str, layouts: tuple[type[Layout], ...], device: str) -> str:
    """The three lines that register a kernel for this key, ready to paste."""
    known = OPERATORS[name]
    operands = ", ".join(f"{n}={cls.__name__}" for n, cls in zip(known.sparse, layouts, strict=True))
    signature = inspect.signature(known.reference)
    head = f'@sten.kernel("{name}", {operands}, device="{device}")'
    return f"{head}\ndef {name}{signature}:\n    ...  # a sparse operand is the dict of its parts"


def _say_reference(name: str, layouts: tuple[type[Layout], ...], device: str) -> None:
    key = (name, layouts, device)
    if key not in _warned:
        _warned.add(key)
        titles = ", ".join(cls.__name__ for cls in layouts)
        warnings.warn(
            f"sten: no kernel for {name!r} with {titles} on {device}: the reference implementation runs (correct, not "
            f"fast). To register one:\n\n{stub(name, layouts, device)}\n",
            stacklevel=4,
        )


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
    """Context that lists every operator call on a sparse operand: (operator, layout, parts, kernel or None)."""
    seen: list[tuple[str, Layout, Parts, Kernel | None]] = []

    def note(*event) -> None:
        seen.append(event)

    _observers.append(note)
    try:
        yield seen
    finally:
        _observers.remove(note)
