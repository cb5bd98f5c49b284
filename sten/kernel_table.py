"""The kernel table: (operator, device, layouts) -> the registered kernel, and the Plan that it prepares.

The contract: a kernel is a function of plain tensors, and gets a sparse operand as its dictionary of parts. The table
is searched for the device, then for "any". Without a kernel the operator's reference implementation runs, which is pure
torch and always correct, and warns once how to register a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from .caller import user_stacklevel
from .layouts.base import Layout
from .markup import facts

Function = TypeVar("Function", bound=Callable[..., Any])
Layouts = Layout | tuple[Layout | None, ...]  # of one operand that may be sparse, or of each (None: it is dense)


class Flags(NamedTuple):
    """What `prepare` may decide by, besides layout, shape and dtype.

    Attributes:
        tokens: size of the work, from the first operand (`Operator.tokens`). None while the call is intercepted: sizes
            may be symbols then, and the Plan must run an operator (torch.library) that decides when it is run.
        entries: number of stored values; None where it is a symbol.
        device: of the values.
        memory_format: channels_last or channels_last_3d for a convolution whose first operand has that format;
            otherwise contiguous_format.
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
        variant: the chosen variant of the kernel, if it has several.
        reason: why this kernel and variant run.
        run: `run(*operands, **geometry)`: the operands of a kernel, a sparse one as its dictionary of parts.
        derive: `derive(parts, shape)`, of linear_grad_weight with a sparse input: what the kernel derives from the
            pattern of the input, which products of one pattern share: `run(*operands, derived=...)`. With `sums=True`
            this also returns the sums of the input's columns.

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
    derive: Callable[..., Any] | None = None

    @classmethod
    def of(
        cls, variant: str | None, reason: str, run: Callable[..., Any] | None, derive: Callable[..., Any] | None = None
    ) -> Plan:
        """Make the Plan that a `prepare` function returns; `sten.extend.run` fills in the other attributes.

        Args:
            variant: name of the variant, None for a kernel with one. "reference" means the operator's reference
                implementation; `run` may be None then.
            reason: why this variant runs, for `sten.which`.
            run: `run(*operands, **geometry)`, a sparse operand as its dictionary of parts.
            derive: `derive(parts, shape)`, where `run` takes what it returns as `derived=`, which it computes itself if
                there is none, and `sums=`.

        Returns:
            A Plan whose `operator`, `layouts`, `device` and `kernel` are empty.

        Example:
            >>> import sten
            >>> sten.extend.Plan.of("dense", "multiplies all entries", lambda x, weight, bias: x).variant
            'dense'
        """
        return cls("", (), "", "", variant, reason, run, derive)

    def __str__(self) -> str:
        variant = f" [{self.variant}]" if self.variant else ""
        return f"{self.product} on {self.device}: {self.kernel}{variant}: {self.reason}"

    @property
    def product(self) -> str:
        """The operator and the layouts of its sparse operands."""
        return f"{self.operator}({', '.join(self.layouts)})" if self.layouts else self.operator

    def _repr_html_(self) -> str:
        named = ("kernel", "variant", "reason")
        return facts(
            f"{self.product} on {self.device}", {name: value for name in named if (value := getattr(self, name))}
        )


@dataclass(frozen=True)
class Kernel:
    """One entry of the table: a kernel, or (`prepares`) a function that returns a Plan."""

    function: Callable[..., Any]
    prepares: bool = False


class Table(dict[tuple, Kernel]):
    """(operator, device type, layout type of each operand that may be sparse) -> Kernel.

    `version` changes with the table and is part of every signature, so that a kernel registered later is used.
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
_warned: set[tuple] = set()  # keys of the warnings that were raised


def rows(shape: tuple[int, ...]) -> int:
    """The number of rows of activations of this shape: the `tokens` of a product."""
    return math.prod(shape[:-1])


def operator(
    name: str,
    *,
    sparse: tuple[str, ...] = ("weight",),
    required: tuple[str, ...] = (),
    tokens: Callable[[tuple[int, ...]], int] = rows,
    check: Callable[..., None] | None = None,
    otherwise: str | None = None,
) -> Callable[[Function], Function]:
    """Declare an operator; the decorated function is its reference implementation, for every layout and device.

    It has the signature of the operator's kernels: the operands in order, a sparse one as its parts, then the
    keywords `layout` and `shape` (the stored shape). They are those of the weight where only `weight` is sparse, or if
    no other operand may be; otherwise tuples, in the order of `sparse`, with None as the layout of a dense operand.

    Args:
        name: its name in the table.
        sparse: the operands that may be sparse.
        required: those of them that are sparse in every kernel.
        tokens: the size of the work, from the shape of the first operand (`Flags.tokens`).
        check: `check(w, *operands, **geometry)` raises for invalid operands; called once for a signature.
        otherwise: with several sparse operands, the operator that equals this one if only the last is sparse: its
            kernels run if this one has none.

    Returns:
        A decorator, which returns the function unchanged.

    Example:
        >>> import torch, sten
        >>> @sten.extend.operator("row_norms")
        ... def row_norms(weight, *, layout, shape):
        ...     return torch.linalg.vector_norm(layout.unpack(weight, shape), dim=1)
        >>> w = sten.from_dense(torch.eye(2), sten.CSR())
        >>> sten.extend.run("row_norms", w, w.parts)
        tensor([1., 1.])
    """

    def register(function: Function) -> Function:
        OPERATORS[name] = Operator(name, sparse, function, required, tokens, check, otherwise)
        return function

    return register


def kernel(
    operator: str, *, device: str, prepare: bool = False, **operands: type[Layout]
) -> Callable[[Function], Function]:
    """Register the decorated function for an operator, layouts and a device type: a kernel, or what prepares one.

    Args:
        operator: "linear", "linear_grad_input", "linear_grad_weight", "conv2d", ... (`sten.extend.OPERATORS`).
        device: "cpu", "cuda", ..., or "any": for devices without a kernel of their own.
        prepare: False: the function is the kernel, `function(*operands, layout=, shape=)`, and always runs. True: it
            is `function(layout, shape, dtype, flags) -> Plan`, called once for a signature, with the stored shape of
            the weight, the dtype of its values and `sten.extend.Flags`; it returns
            `sten.extend.Plan.of(variant, reason, run)` with `run(*operands)`, or None (or the variant "reference") for
            the reference implementation. All calls of one Plan have one signature, so `run` may build a launch from
            the tensors of its first call, but must not store them.
        **operands: the layout class of each sparse operand by name, mostly `weight=`; `input=` of "linear" and of its
            gradients is a sparse activation, (tokens, features).

    Returns:
        A decorator, which returns the function unchanged.

    Raises:
        ValueError: an unknown operator or operand name, or something else than a layout class.

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
    op = OPERATORS.get(operator)
    if op is None:
        names = ", ".join(sorted(OPERATORS))
        raise ValueError(f"Expected one of {names}, got {operator!r}; declare it with sten.extend.operator.")
    if not operands or not set(op.required) <= set(operands) <= set(op.sparse):
        required = f" (required: {', '.join(op.required)})" if op.required else ""
        expected, got = ", ".join(op.sparse), ", ".join(operands) or "none"
        raise ValueError(f"Expected the sparse operands {expected}{required} for {operator!r}, got {got}.")
    for name, layout in operands.items():
        if not (isinstance(layout, type) and issubclass(layout, Layout)):
            raise ValueError(f"Expected a layout class such as sten.CSR for {name}=, got {layout!r}.")

    def register(function: Function) -> Function:
        alone = [*operands] == ["weight"] == [op.sparse[-1]]
        types = [operands["weight"]] if alone else [operands.get(name) for name in op.sparse]
        KERNELS[(operator, device, *types)] = Kernel(function, prepare)
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
    op, device = OPERATORS[name], flags.device.type
    entry = find(name, device, layout)
    reference = op.reference
    if entry is None:
        reference = functools.partial(_warn_and_run, op, device)
        plan = Plan.of("reference", "no kernel is registered for this layout on this device", None)
    elif entry.prepares:
        plan = entry.function(layout, shape, dtype, flags)
        plan = plan or Plan.of("reference", "the registered kernel does not serve this", None)
    else:
        reason = (inspect.getdoc(entry.function) or "the registered kernel").splitlines()[0].rstrip(".")
        plan = Plan.of(None, reason, functools.partial(entry.function, layout=layout, shape=shape))
    key = {"operator": name, "layouts": tuple(map(str, _layouts(layout))), "device": device}
    if plan.variant == "reference":
        run = functools.partial(reference, layout=layout, shape=shape)
        return dataclasses.replace(plan, **key, kernel="reference", variant=None, run=run)
    return dataclasses.replace(plan, **key, kernel=entry.function.__name__)


def stub(name: str, layout: Layouts, device: str) -> str:
    """The three lines that register a kernel for this key, ready to paste."""
    op = OPERATORS[name]
    each = zip(op.sparse, layout, strict=True) if isinstance(layout, tuple) else [(op.sparse[-1], layout)]
    operands = ", ".join(f"{n}={type(one).__name__}" for n, one in each if one is not None)
    signature = inspect.signature(op.reference)
    head = f'@sten.kernel("{name}", {operands}, device="{device}")'
    return f"{head}\ndef {name}{signature}:\n    ...  # a sparse operand is the dict of its parts"


def _warn_and_run(op: Operator, device: str, *operands: Any, layout: Any, shape: Any, **geometry: Any) -> Any:
    """The reference implementation, with one warning, where no kernel is registered."""
    types = tuple(type(each) for each in _layouts(layout))
    key = (op.name, types, device)
    if key not in _warned:
        _warned.add(key)
        titles = ", ".join(cls.__name__ for cls in types)
        warnings.warn(
            f"sten: no kernel for {op.name!r} with {titles} on {device}: the reference implementation runs "
            f"(correct, not fast). To register one:\n\n{stub(op.name, layout, device)}\n",
            stacklevel=user_stacklevel(),
        )
    return op.reference(*operands, layout=layout, shape=shape, **geometry)
