"""The kernel table: (operator, device, layouts) -> the registered kernel, and the Plan that it prepares.

The contract, in one line: a kernel is a function of plain tensors; a sparse operand arrives as its dictionary of parts.
The table is asked for the exact device, then for "any"; what it does not have runs the operator's reference
implementation, which is pure torch, always correct, and says once how to register a real kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .layouts.base import Layout

Layouts = Layout | tuple[Layout | None, ...]  # of one operand that may be sparse, or of each (None: it is dense)


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
    otherwise: str | None


KERNELS = Table()
OPERATORS: dict[str, Operator] = {}
_warned: set[tuple] = set()  # what was said once


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
    otherwise: str | None = None,
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
        otherwise: with several sparse operands, the operator that is the same where the last alone is sparse: its
            kernels run where this one has none.

    Example:
        >>> import torch, sten
        >>> @sten.extend.operator("row_norms")
        ... def row_norms(weight, *, layout, shape):
        ...     return torch.linalg.vector_norm(layout.unpack(weight, shape), dim=1)
        >>> w = sten.from_dense(torch.eye(2), sten.CSR())
        >>> sten.extend.run("row_norms", w, w.parts)
        tensor([1., 1.])
    """

    def register(function: Callable) -> Callable:
        OPERATORS[name] = Operator(name, sparse, function, required, tokens, check, otherwise)
        return function

    return register


def kernel(operator: str, *, device: str, prepare: bool = False, **operands: type[Layout]) -> Callable:
    """Register the decorated function for an operator, given layouts and a device type: a kernel, or what prepares one.

    Args:
        operator: "linear", "linear_grad_input", "linear_grad_weight", "conv2d", ... (`sten.extend.OPERATORS`).
        device: "cpu", "cuda", ..., or "any": for devices without a kernel of their own.
        prepare: False: the function is the kernel, `function(*operands, layout=, shape=)`, and always runs. True: it
            is `function(layout, shape, dtype, flags) -> Plan`, asked once for a signature, with the stored shape of
            the weight, the dtype of its values and `sten.extend.Flags`; it returns
            `sten.extend.Plan.of(variant, reason, run)` with `run(*operands)`, or None (or the variant "reference") for
            the reference implementation. What it decides by is the signature's, so `run` may build a launch from the
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
        ...     def run(x, weight, bias):
        ...         return torch.nn.functional.linear(x, weight["values"], bias)
        ...     if dtype is not torch.float32:
        ...         return sten.extend.Plan.of("reference", f"the kernel is for float32, not {dtype}", None)
        ...     return sten.extend.Plan.of("dense", "multiplies all entries", run)
    """
    known = OPERATORS.get(operator)
    if known is None:
        names = ", ".join(sorted(OPERATORS))
        raise ValueError(f"No operator named {operator!r}; sten has {names}; declare it with sten.extend.operator.")
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


def find(name: str, device: str, layout: Layouts) -> Kernel | None:
    """The registered kernel for this operator, device type and layout (a tuple of them: None marks a dense operand)."""
    if isinstance(layout, tuple):
        types = [None if each is None else type(each) for each in layout]
    else:
        types = [type(layout)]
    return KERNELS.get((name, device, *types)) or KERNELS.get((name, "any", *types))


def _layouts(layout: Layouts) -> tuple[Layout, ...]:
    return tuple(each for each in layout if each is not None) if isinstance(layout, tuple) else (layout,)


def prepare(
    name: str,
    layout: Layouts,
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
