"""SparseTensor: the one class that torch sees.

A wrapper subclass with the true shape, dtype and device, which has its layout and its parts as plain tensors. The
rules of operators are in two tables that `sten/ops/` fills: FUNCTIONS by Python function (`__torch_function__`, for
operators with a gradient rule) and ATEN by aten operator (`__torch_dispatch__`, for what runs below autograd).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ._torch_private import as_no_view, is_compiling, is_view, no_function, refuse_data_pointer
from .checked import checked
from .layouts.base import Layout, Parts
from .layouts.checks import expect_held
from .layouts.registry import fields
from .markup import WithPattern
from .pattern_cache import PatternCache as PatternCache
from .rule import Rule as Rule
from .rule import save_pattern, saved_pattern
from .sealed import Sealed

OTHERS = "others"  # the row of either table for what has none of its own, and for `out=`
FUNCTIONS: dict[Callable | str, Callable] = {}
ATEN: dict[Callable | str, Callable] = {}

# Opaque operators on SparseTensors, which torch.compile records; __torch_dispatch__ runs them.
LIBRARY = torch.library.Library("sten", "FRAGMENT")
LIBRARY.define("to_dense(Tensor input) -> Tensor")
LIBRARY.define("project(Tensor dense, Tensor like) -> Tensor")
OPS = torch.ops.sten


class SparseTensor(Sealed, WithPattern, torch.Tensor):
    """A tensor stored in a sparse layout, made by `sten.from_dense` and `sten.sparsify`.

    Args:
        layout: the `Layout`.
        parts: dict of the plain tensors that store it, not checked here.
        shape: the stored shape: of the transpose if `transposed`.
        transposed: whether the parts store the transpose.
        requires_grad: as of any tensor.
        cache: the `PatternCache` of a tensor with the same pattern; None: a new one.

    Attributes:
        sparse_layout: the `Layout`.
        parts: dict of the plain tensors that store it; `values` has the weights, the others the pattern.
        transposed: whether the parts store the transpose.
        cache: the `PatternCache` of the pattern.
        flat: what `__tensor_flatten__` returns: the attributes of the parts, and the rest.

    It works as an `nn.Parameter`, in `state_dict`, `copy.deepcopy`, pickle and `torch.load(weights_only=True)`; its
    gradient is a SparseTensor with the same pattern. Pointwise operators in place, or with f(0) = 0, work on the stored
    entries; others give the correct dense tensor.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.tensor([[1.0, -4, 2, 3]]), sten.NM(2, 4))
        >>> w
        SparseTensor(NM(n=2, m=4), shape=(1, 4), dtype=float32, density=0.5)
        >>> w.to_dense()
        tensor([[ 0., -4.,  0.,  3.]])
    """

    trained = None  # of a weight in trainable form, assembled from a trained Parameter: its TrainedWeight
    assembled = False  # in a graph that torch.export records, from parts: operators on them are recorded instead
    instead: str | None = None  # of a weight that is computed from another: what works in place of writing to it

    @staticmethod
    def __new__(
        cls,
        layout: Layout,
        parts: Parts | None = None,  # a call without them, as other libraries make of a Parameter's class, is refused
        shape: Iterable[int] = (),
        transposed: bool = False,
        requires_grad: bool = False,
        cache: PatternCache | None = None,
    ) -> SparseTensor:
        if not isinstance(parts, dict):
            kind = type(parts).__name__
            raise TypeError(f"Expected SparseTensor(layout, parts, shape), got a {kind} second; use sten.from_dense.")
        values = parts["values"]
        shape = tuple(shape)
        size, strides = shape, contiguous_strides(shape)
        if transposed:
            size, strides = shape[::-1], strides[::-1]
        self = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=strides, dtype=values.dtype, device=values.device, requires_grad=requires_grad
        )
        refuse_data_pointer(self)  # C++ that asks for it, as DLPack does, gets an exception instead of a null pointer
        self._adopt(layout, parts, shape, transposed, cache)
        return self

    def _adopt(
        self, layout: Layout, parts: Parts, shape: tuple[int, ...], transposed: bool, cache: PatternCache | None
    ) -> None:
        """Set what the wrapper stores. torch.compile reaches each part as an attribute of its own, `part_<name>`."""
        own = {"sparse_layout": layout, "parts": parts, "stored_shape": shape, "transposed": transposed}
        own["cache"] = PatternCache() if cache is None else cache
        inner = {"part_" + name: part for name, part in parts.items()}
        vars(self).update(own, flat=(tuple(inner), (layout, shape, transposed)), **inner)

    def __tensor_flatten__(self) -> tuple[tuple[str, ...], tuple]:
        return self.flat

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: tuple, outer_size, outer_stride) -> SparseTensor:
        layout, shape, transposed = context
        return SparseTensor(layout, {k.removeprefix("part_"): v for k, v in inner.items()}, shape, transposed)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        rule = FUNCTIONS.get(func)
        with no_function():
            if rule is None or (kwargs and "out" in kwargs):
                return FUNCTIONS[OTHERS](func, args, kwargs or {})
            return rule(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        rule = ATEN.get(func)
        return (ATEN[OTHERS] if rule is None else rule)(func, *args, **(kwargs or {}))

    # what users read

    def mask(self) -> Tensor:
        """The stored entries as a bool mask of the tensor's shape; explicit zeros count as stored."""
        mask = self.sparse_layout.support(self.parts, self.stored_shape)
        return mask.t() if self.transposed else mask

    def to_dense(self) -> Tensor:
        """The dense tensor; differentiable: the gradient is gathered at the pattern."""
        with no_function():
            return ToDense.run(self)

    @property
    def density(self) -> float:
        """Number of stored entries divided by the number of all entries."""
        with no_function():
            return float(self.mask().sum()) / max(self.numel(), 1)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts together, pattern included."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def with_values(self, values: Tensor, requires_grad: bool = False) -> SparseTensor:
        """A tensor with the same layout and pattern (shared, not copied), and other values."""
        parts = {**self.parts, "values": values}
        return SparseTensor(self.sparse_layout, parts, self.stored_shape, self.transposed, requires_grad, self.cache)

    def values_like(self, dense: Tensor) -> Tensor:
        """The `values` that a dense tensor of this shape has at this pattern."""
        return self.sparse_layout.pack_like(dense.t() if self.transposed else dense, self.parts)

    def same_pattern(self, other: SparseTensor) -> bool:
        """Whether both store the same entries in the same slots; pattern parts that are shared are not compared."""
        if (
            self.sparse_layout != other.sparse_layout
            or self.stored_shape != other.stored_shape
            or self.transposed != other.transposed
        ):
            return False
        mine, yours = self.parts, other.parts
        return all(mine[n] is yours[n] or _equal(mine[n], yours[n]) for n in mine if n != "values")

    def __repr__(self, *, tensor_contents=None) -> str:
        with no_function():
            shape, dtype = tuple(self.shape), str(self.dtype).removeprefix("torch.")
            grad = ", requires_grad=True" if self.requires_grad else ""
            device = "" if self.device.type == "cpu" else f", device={str(self.device)!r}"
            density = "" if traced(self.parts["values"]) else f", density={self.density:.3g}"
        kind = "Parameter(SparseTensor)" if getattr(self, "_is_param", False) else "SparseTensor"
        flip = ", transposed" if self.transposed else ""
        return f"{kind}({self.sparse_layout}, shape={shape}, dtype={dtype}{density}{device}{flip}{grad})"

    # copies and files

    def __deepcopy__(self, memo: dict) -> SparseTensor:
        if id(self) in memo:
            return memo[id(self)]
        with no_function():
            if not self.is_leaf:
                raise RuntimeError("Expected a leaf for deepcopy, got a tensor with a grad_fn; call detach() first.")
            parts = {name: copy.deepcopy(part, memo) for name, part in self.parts.items()}
            new = _restore(
                self.sparse_layout, parts, self.stored_shape, self.transposed, self.requires_grad, _is_param(self)
            )
            memo[id(self)] = new
            if self.grad is not None:
                new.grad = copy.deepcopy(self.grad, memo)
        return new

    def __reduce_ex__(self, protocol):
        with no_function():
            state = (self.stored_shape, self.transposed, self.requires_grad, _is_param(self))
        return _load, (type(self.sparse_layout).__name__, fields(self.sparse_layout), dict(self.parts), *state)


def without_view(out: Tensor) -> Tensor:
    """`out`, but not a view: autograd refuses in-place operators, such as activations, on a view from a rule."""
    return as_no_view(out, out.shape) if is_view(out) else out


class ToDense(Rule):
    """Sparse to dense; the gradient is gathered at the pattern."""

    @staticmethod
    def forward(w):
        return OPS.to_dense(w) if is_compiling() and not w.assembled else without_view(unpack(w))

    setup_context = staticmethod(save_pattern)

    @staticmethod
    def backward(ctx, grad):
        return grad if (w := saved_pattern(ctx)).cache.full_gradient else project(grad, w)

    @staticmethod
    def vmap(info, in_dims, w):
        return ToDense.run(w), None  # torch.vmap has no batch of SparseTensors


def unpack(w: SparseTensor) -> Tensor:
    """The dense tensor, without autograd."""
    dense = w.sparse_layout.unpack(w.parts, w.stored_shape)
    return dense.t() if w.transposed else dense


def project(grad: Tensor, w: SparseTensor) -> Tensor:
    """`grad` with the pattern of `w`; a sparse one of that pattern is returned as it is. Differentiable."""
    if isinstance(grad, SparseTensor) and grad.same_pattern(w):
        return grad
    return Project.run(grad, w)


class Project(Rule):
    """Dense to sparse at the pattern of `like`: the transpose of ToDense, and each is the other's gradient."""

    @staticmethod
    def forward(grad, like):
        if is_compiling():
            return OPS.project(grad, like)
        return project_now(grad, like)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        return project(grad, ctx.saved_tensors[0]).to_dense(), None


def project_now(grad: Tensor, like: SparseTensor) -> SparseTensor:
    """`grad` gathered at the pattern of `like`, without autograd."""
    dense = unpack(grad) if isinstance(grad, SparseTensor) else grad
    return like.with_values(like.values_like(dense))


def from_dense(tensor: Tensor, layout: Layout, mask: Tensor | None = None) -> SparseTensor:
    """Store a dense tensor in a sparse layout.

    Args:
        tensor: floating point, two or more dimensions; the layout's `check` says which shapes fit.
        layout: how to store it, for example `sten.NM(2, 4)`.
        mask: bool, of the tensor's shape: the entries to store. None: of an n:m layout the largest magnitudes that it
            allows, of a layout without a fixed rate (Masked, CSR, BSR) the non-zeros.

    Returns:
        SparseTensor with `to_dense() == tensor * mask`. It does not require a gradient.

    Raises:
        TypeError: `tensor` is not a dense floating-point tensor, `layout` is not a layout, or `mask` is not bool.
        ValueError: the layout cannot store the shape or the mask, or the mask has another shape.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), sten.CSR())
        >>> w.density
        0.5
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"Expected a layout such as sten.NM(2, 4), got {layout!r}.")
    others = SparseTensor, torch.sparse.SparseSemiStructuredTensor
    if not isinstance(tensor, Tensor) or isinstance(tensor, others) or tensor.layout != torch.strided:
        kind = tensor.layout if type(tensor) in (Tensor, torch.nn.Parameter) else type(tensor).__name__
        raise TypeError(f"Expected a dense tensor, got {kind}; call {_maker(tensor)} on it.")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"Expected a floating-point tensor, got {tensor.dtype}; call .float() on it.")
    layout.check(shape := tuple(tensor.shape))
    with torch.no_grad():
        tensor = tensor.detach()
        if mask is None:
            mask = tensor != 0 if layout.rate is None else layout.mask(tensor.abs())
        elif mask.dtype != torch.bool:
            raise TypeError(f"Expected a bool mask, got {mask.dtype}; call .bool() on it.")
        elif tuple(mask.shape) != shape:
            raise ValueError(f"Expected a mask of the tensor's shape {shape}, got {tuple(mask.shape)}.")
        elif layout.rate is None:  # `pack` refuses what the others cannot hold
            expect_held(layout, mask)
        return SparseTensor(layout, layout.pack(tensor, mask.to(tensor.device)), shape)


def _maker(thing: object) -> str:
    """What makes of this, which is not a dense tensor, a SparseTensor or a dense one."""
    if type(thing).__module__.startswith("scipy.sparse"):
        return "sten.from_scipy"
    sparse = isinstance(thing, torch.sparse.SparseSemiStructuredTensor) or getattr(thing, "is_sparse", False)
    return "sten.from_torch" if sparse or "sparse" in str(getattr(thing, "layout", "")) else ".to_dense()"


def function(*functions: Callable | str, replace: bool = True) -> Callable:
    """Register the decorated rule for Python functions; it is called above autograd, with their arguments."""

    def register(rule: Callable) -> Callable:
        for key in functions:
            if replace or key not in FUNCTIONS:
                FUNCTIONS[key] = rule
        return rule

    return register


def as_it_is(*functions: Callable) -> None:
    """Register that Python functions without a rule run as they are, on the rules of the aten operators in them."""
    for each in functions:
        FUNCTIONS.setdefault(each, each)


def function_rule(func: Callable) -> Callable | None:
    """The rule of a Python function."""
    return FUNCTIONS.get(func)


def aten(*operators: Callable | str) -> Callable:
    """Register the decorated rule for aten operators; it is called with the operator and the arguments."""

    def register(rule: Callable) -> Callable:
        ATEN.update(dict.fromkeys(operators, rule))
        return rule

    return register


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def traced(t: Tensor) -> bool:
    """Whether a part has no numbers: under a compiler or vmap, or on the meta device."""
    return type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.device != b.device:
        return False
    if traced(a):
        return True  # there are no numbers to compare, and one weight has one pattern
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _is_param(t: Tensor) -> bool:
    return bool(getattr(t, "_is_param", False))


def _restore(layout, parts, shape, transposed, requires_grad, is_param) -> SparseTensor:
    w = SparseTensor(layout, parts, shape, transposed, requires_grad)
    return torch.nn.Parameter(w, requires_grad) if is_param else w


def _load(name: str, values: dict, parts: Parts, shape, transposed, requires_grad, is_param) -> SparseTensor:
    """Rebuild from a pickle or a checkpoint: nothing is imported by name, and every index is checked.

    The pattern is copied, because another tensor of the file may lie over the same storage, and be trained.
    """
    layout, parts, shape, transposed = checked(name, values, parts, shape, transposed)
    own = {name: part.detach() if name == "values" else part.detach().clone() for name, part in parts.items()}
    return _restore(layout, own, shape, transposed, requires_grad is True, is_param is True)


ATEN[OPS.to_dense.default] = lambda _, w: unpack(w)
ATEN[OPS.project.default] = lambda _, dense, like: project_now(dense, like)
torch.serialization.add_safe_globals([_load, SparseTensor])
