"""`check_kernel`: a kernel against the reference implementation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..dispatch import OPERATORS, find, planned
from ..layouts.base import Layout
from ..tensor import SparseTensor
from .layouts import accepts, claim, saying

SHAPES = ((1, 1), (8, 16), (16, 8), (17, 33), (64, 40), (63, 100))
CONV_SHAPES = ((4, 3, 3, 3), (8, 8, 1, 1), (5, 7, 2, 3))
LEADING = ((), (0,), (1,), (2,), (3, 5), (17,), (64,), (65,))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GEOMETRY = (
    {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1},
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 1},
)
Operands = Callable[[dict[str, Tensor], tuple[int, ...], Callable[..., Tensor]], Iterator[tuple[tuple, dict[str, Any]]]]


@dataclass
class Checked:
    """What `check_kernel` checked.

    Attributes:
        operator, layout, device: the row of the kernel table.
        dtypes, shapes: of the weights.
        calls: how many calls were compared with the reference.
        variants: the variants of the Plans that ran; the kernel's name where it has none.
    """

    operator: str
    layout: Layout
    device: str
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    calls: int = 0
    variants: set[str] = field(default_factory=set)


def check_kernel(
    operator: str,
    layout: Layout,
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    shapes: Sequence[tuple[int, ...]] | None = None,
    sparsity: Sequence[float] = (0.5, 0.9, 0.0, 1.0),
    operands: Operands | None = None,
) -> Checked:
    """Compare the kernel registered for (operator, layout, device) with the reference in float64.

    The cases: shapes that do not divide, empty and full patterns, zero, one and many tokens, activations of any number
    of dimensions and of any strides, images in both memory formats, with and without bias, results in memory full of
    NaN. Each call is made three times: a Plan's first call, which may build a launch, its second, which uses it, and
    one with the Plan of an intercepted call. The kernel must not write to its arguments, nor to earlier results. The
    relative error in norm must be within the dtype's tolerance.

    Args:
        operator: its name, as in `sten.kernel`.
        layout: the layout whose kernel is checked.
        device, dtypes: where to run it, and in which dtypes, which should not be those that it leaves to the reference.
        shapes: weight shapes; default: those of a fixed list that the layout accepts.
        sparsity: for layouts without a rate.
        operands: for an operator of your own: `operands(parts, shape, randn)` yields (arguments, keywords) of calls.

    Raises:
        AssertionError: no kernel is registered, or a result is wrong.

    Example:
        >>> import sten
        >>> sorted(sten.testing.check_kernel("linear", sten.Masked(), shapes=[(8, 16)]).variants)
        ['linear_expand']
    """
    entry = find(operator, device, layout)
    claim(entry is not None, f"No kernel is registered for {operator!r} with {type(layout).__name__} on {device}")
    operands = operands or OPERANDS.get(operator)
    claim(operands is not None, f"check_kernel does not know the operands of {operator!r}; pass operands=")
    if shapes is None:
        shapes = [s for s in (CONV_SHAPES if operator.startswith("conv") else SHAPES) if accepts(layout, s)]
    checked = Checked(operator, layout, device, tuple(dtypes), tuple(map(tuple, shapes)))
    for shape in checked.shapes:
        for dtype in dtypes:
            for number in sparsity if layout.rate is None else (None,):
                with saying(f"{operator} on {layout} at {shape}, {dtype}, sparsity {number}"):
                    _check_case(checked, dtype, shape, number, operands)
    return checked


def _check_case(checked: Checked, dtype, shape, sparsity, operands) -> None:
    random = torch.Generator().manual_seed(math.prod(shape))
    operator, layout, device = checked.operator, checked.layout, checked.device

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(device, dtype)

    dense = randn(*shape)
    w = SparseTensor(layout, layout.pack(dense, layout.mask(dense.abs(), sparsity)), shape)
    for args, kwargs in operands(w.parts, shape, randn):
        where = f"{operator} on {layout}: weight {shape}, {dtype}, sparsity {sparsity}, operands {_sizes(args)}"
        exact = OPERATORS[operator].reference(*_double(args), layout=layout, shape=shape, **kwargs)
        before, plan = _double(args), planned(operator, w, args, kwargs)
        again, intercepted = planned(operator, w, args, kwargs), planned(operator, w, args, kwargs, True)
        claim(again is plan, f"{where}: the Plan was not cached")
        results = []
        for each, turn in ((plan, "first call"), (again, "second call"), (intercepted, "intercepted call")):
            _poison(exact, dtype, device)
            results.append(each.run(*args, **kwargs))
            for result in results:
                _check_result(result, exact, dtype, f"{where}, {turn}")
            checked.calls += 1
            checked.variants.add(each.variant or each.kernel)
        claim(all(_same(a, b) for a, b in zip(before, _double(args), strict=True)), f"{where}: an argument was changed")


def _check_result(got: Tensor, exact: Tensor, dtype: torch.dtype, where: str) -> None:
    claim(got.shape == exact.shape, f"{where}: the result has shape {tuple(got.shape)}, not {tuple(exact.shape)}")
    claim(got.dtype == dtype, f"{where}: the result is {got.dtype}")
    error = (got.double().cpu() - exact.cpu()).norm() / exact.cpu().norm().clamp(min=1e-30)
    small = exact.numel() == 0 or bool(error <= TOLERANCE[dtype])
    claim(small or (not bool(exact.any()) and not bool(got.any())), f"{where}: relative error {float(error):.2g}")


def _double(args: tuple) -> tuple:
    """The operands in float64; parts and activations too, indices unchanged."""

    def wide(a):
        if isinstance(a, dict):
            return {name: wide(part) for name, part in a.items()}
        if not isinstance(a, Tensor):
            return a
        return a.double().clone() if a.is_floating_point() else a.clone()

    return tuple(wide(a) for a in args)


def _same(a, b) -> bool:
    if isinstance(a, dict):
        return all(torch.equal(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _sizes(args: tuple) -> list:
    return [tuple(a.shape) for a in args if isinstance(a, Tensor)]


def _poison(like: Tensor, dtype: torch.dtype, device: str) -> None:
    """Write NaN to memory that the allocator will reuse for the result, so that an unwritten entry shows."""
    blocks = [torch.full(like.shape, math.nan, dtype=dtype, device=device) for _ in range(4)]
    del blocks


def _activations(width: int, randn) -> Iterator[Tensor]:
    for leading in LEADING:
        yield randn(*leading, width)
    yield randn(width, 6).t()
    yield randn(4, 2 * width)[:, ::2]


def _linear(parts, shape, randn):
    for i, x in enumerate(_activations(math.prod(shape[1:]), randn)):
        yield (x, parts, randn(shape[0]) if i % 2 else None), {}


def _linear_grad_input(parts, shape, randn):
    for grad in _activations(shape[0], randn):
        yield (grad, parts), {}


def _linear_grad_weight(parts, shape, randn):
    for leading in LEADING[1:]:
        yield (randn(*leading, shape[0]), randn(*leading, math.prod(shape[1:])), parts), {}


def _conv(parts, shape, randn):
    for geometry in GEOMETRY:
        for form in (torch.contiguous_format, torch.channels_last):
            yield (randn(2, shape[1], 9, 8).contiguous(memory_format=form), parts, randn(shape[0])), geometry


def _conv_output(shape, randn, geometry) -> tuple[Tensor, Tensor]:
    x = randn(2, shape[1], 9, 8)
    y = torch.nn.functional.conv2d(x, randn(*shape), None, *geometry.values())
    return x, randn(*y.shape)


def _conv_grad_input(parts, shape, randn):
    for geometry in GEOMETRY:
        x, grad = _conv_output(shape, randn, geometry)
        yield (grad, parts), {**geometry, "size": tuple(x.shape)}


def _conv_grad_weight(parts, shape, randn):
    for geometry in GEOMETRY:
        x, grad = _conv_output(shape, randn, geometry)
        yield (grad, x, parts), geometry


def _embedding(parts, shape, randn):
    for size in ((), (0,), (3,), (2, 5)):
        yield (torch.randint(0, shape[0], size).to(parts["values"].device), parts), {}


OPERANDS: dict[str, Operands] = {
    "linear": _linear,
    "linear_grad_input": _linear_grad_input,
    "linear_grad_weight": _linear_grad_weight,
    "conv2d": _conv,
    "conv2d_grad_input": _conv_grad_input,
    "conv2d_grad_weight": _conv_grad_weight,
    "embedding": _embedding,
}
