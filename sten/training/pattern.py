"""The trainable form of a weight whose pattern is fixed between edits ("sparse to sparse").

The Parameter is the plain tensor `values`, the pattern lies in buffers beside it, and the module's `weight` is put
together as a SparseTensor at each use. So optimizers (foreach and fused), gradient clipping, GradScaler, EMA and DDP
see nothing but plain tensors, and weight, gradient and optimizer state have the size of the pattern.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..allocation import Allocation
from ..layout import Parts, fields
from ..sparsifiers import Sparsifier
from ..tensor import PatternCache, Rule, SparseTensor, checked, project

PREFIX = "sparse_"  # the holder of `weight` is the submodule `sparse_weight`


@dataclass(frozen=True)
class Method:
    """What an engine must know of a weight: who decides, and how much of it lives.

    Attributes:
        name: full name of the weight when it was chosen.
        sparsifier: the dynamic method.
        sparsity: the weight's share of the budget; None where the layout has a rate.
        spread: the allocation of the whole model.
        last: whether it was the last of the chosen weights.
    """

    name: str
    sparsifier: Sparsifier
    sparsity: float | None
    spread: Allocation | None
    last: bool


class SparseWeight(nn.Module):
    """Holds the parts of one weight: `values` as a Parameter, the pattern as buffers. Calling it gives the
    SparseTensor.

    In a state_dict its tensors bear the weight's own name: `fc.weight.values`, `fc.weight.crow`, ...

    Example:
        >>> import torch, sten
        >>> holder = sten.training.SparseWeight(sten.from_dense(torch.eye(3), sten.CSR()))
        >>> holder().shape, holder.values.shape
        (torch.Size([3, 3]), torch.Size([3]))
    """

    def __init__(self, w: SparseTensor) -> None:
        super().__init__()
        self.spec, self.shape, self.transposed = w.spec, w.stored_shape, w.transposed
        self.names = tuple(name for name in w.parts if name != "values")
        self.values = nn.Parameter(w.parts["values"].detach(), requires_grad=w.requires_grad)
        for name in self.names:
            self.register_buffer(name, w.parts[name])
        self.method: Method | None = None
        self.extra: tuple[str, ...] = ()
        self.cache = PatternCache()
        self.probe: Tensor | None = None  # set while a dense gradient is wanted (tap.py)

    @property
    def pattern(self) -> dict[str, Tensor]:
        return {name: self._buffers[name] for name in self.names}

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"values": self._parameters["values"], **self.pattern}

    def adopt(self, method: Method, state: dict[str, Tensor]) -> None:
        """Take a dynamic method and its tensors; they are not in the model's state_dict (`sten.state_dict` has
        them)."""
        self.method, self.extra = method, tuple(state)
        for name, value in state.items():
            self.register_buffer("state_" + name, value, persistent=False)

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: self._buffers["state_" + name] for name in self.extra}

    def rewrite(self, parts: Parts) -> None:
        """Take on another pattern, and tell who derived something from the old one."""
        for name in self.names:
            self._buffers[name] = fill(self._buffers[name], parts[name])
        self.cache.invalidate(*self.pattern.values())

    @torch.no_grad()
    def follow(self, other: SparseWeight, dense: Tensor) -> None:
        """Take the pattern of another holder, and from `dense` the numbers that it has there."""
        self.rewrite({name: part.clone() for name, part in other.pattern.items()})
        values = self.spec.pack_like(dense, other.parts)
        if values.shape == self.values.shape:
            self.values.copy_(values)
        else:
            self.values.data = values

    def forward(self, param: Tensor | None = None) -> SparseTensor:
        if torch.compiler.is_compiling():
            pattern = [self._buffers[n] for n in self.names]
            w = _traced(self.values, self.spec, self.shape, self.transposed, None, self.names, *pattern)
            return w if self.probe is None else w.to_dense() + self.probe
        values = self._parameters["values"]
        if torch.is_grad_enabled() and values.requires_grad:
            pattern = self.pattern.values()
            return _Assemble.run(values, self.spec, self.shape, self.transposed, self.cache, self.names, *pattern)
        return SparseTensor(self.spec, self.parts, self.shape, self.transposed, cache=self.cache)

    def tensor(self, param: Tensor | None = None) -> SparseTensor:
        """The weight as a SparseTensor that shares memory and is cut off from autograd; `requires_grad` as the
        values'."""
        parts = {name: part.detach() for name, part in self.parts.items()}
        return SparseTensor(self.spec, parts, self.shape, self.transposed, self.values.requires_grad)

    def extra_repr(self) -> str:
        flip = ", transposed" if self.transposed else ""
        return f"{self.spec}, shape={self.shape}{flip}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, _public(prefix), keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        given = {n: state_dict[prefix + n] for n in ("values", *self.names) if prefix + n in state_dict}
        if len(given) == 1 + len(self.names):
            try:
                checked(type(self.spec).__name__, fields(self.spec), given, self.shape, self.transposed)
            except ValueError as error:
                errors.append(f"{_public(prefix)[:-1]}: {error}")
                return
            for own, part in ((self.parts[n], part) for n, part in given.items()):
                if own.shape != part.shape:  # a pattern with another number of entries
                    own.data, own.grad = own.new_zeros(part.shape), None
        lost: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, lost, unexpected, errors)
        self.cache.invalidate(*self.pattern.values())
        missing.extend(_public(prefix) + name.removeprefix(prefix) for name in lost)


def fill(old: Tensor | None, new: Tensor) -> Tensor:
    """The old tensor with the new numbers, so that references survive; the new one where shapes differ."""
    if old is None or old.shape != new.shape:
        return new
    return old.copy_(new)


class _Assemble(Rule):
    """Values and pattern to the SparseTensor; its gradient, which has the same pattern, back to the values."""

    @staticmethod
    def forward(values, spec, shape, transposed, cache, names, *pattern):
        parts = {"values": values, **dict(zip(names, pattern, strict=True))}
        return SparseTensor(spec, parts, shape, transposed, cache=cache)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, spec, shape, transposed, cache, names, *pattern = inputs
        ctx.like = (spec, {"values": values, **dict(zip(names, pattern, strict=True))}, shape, transposed, cache)

    @staticmethod
    def vmap(info, in_dims, *args):
        if any(dim is not None for dim in in_dims):
            raise NotImplementedError("torch.vmap over a sparse weight's values has no rule; map over the input only.")
        return _Assemble.apply(*args), None

    @staticmethod
    def backward(ctx, grad):
        spec, parts, shape, transposed, cache = ctx.like
        if type(grad) is not SparseTensor:
            parts = {n: p.detach() for n, p in parts.items()}
            grad = project(grad, SparseTensor(spec, parts, shape, transposed, cache=cache))
        return (_Values.run(grad) if torch.is_grad_enabled() else grad.parts["values"], *[None] * (4 + len(parts)))


class _Values(Rule):
    """The values of a SparseTensor, as a step of a graph (needed for gradients of gradients alone)."""

    @staticmethod
    def forward(w):
        return w.parts["values"].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.like = inputs[0]

    @staticmethod
    def backward(ctx, grad):
        return ctx.like.with_values(grad)


@torch._dynamo.allow_in_graph
def _traced(*args):
    return _Assemble.apply(*args)


def _public(prefix: str) -> str:
    """`fc.sparse_weight.` -> `fc.weight.`"""
    owner, _, holder = prefix[:-1].rpartition(".")
    return (owner + "." if owner else "") + holder.removeprefix(PREFIX) + "."


@functools.cache
def _with_weights(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a module class whose attributes `names` are put together by their holders."""

    def attribute(name: str) -> property:
        holder = PREFIX + name
        return property(lambda self: self._modules[holder](self._parameters[name]))

    def reduce(self, protocol):
        return _rebuild, (cls, names), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    body = {name: attribute(name) for name in names}
    return type(
        cls.__name__,
        (cls,),
        {**body, "__reduce_ex__": reduce, "__module__": cls.__module__, "plain_class": cls, "sparse_names": names},
    )


def _rebuild(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    new = _with_weights(cls, names)
    return new.__new__(new)


def install(module: nn.Module, name: str, holder: nn.Module) -> None:
    """Let the holder answer for `name`; a SparseWeight takes the place of the Parameter, a MasterWeight reads it."""
    if isinstance(holder, SparseWeight):
        module._parameters[name] = None  # keeps the place, so that the order of parameters survives finalize
    module.add_module(PREFIX + name, holder)
    _set_names(module, (*installed(module), name))


def remove(module: nn.Module, name: str, param: nn.Parameter) -> None:
    """Put a Parameter back in the place of its holder."""
    names = tuple(n for n in installed(module) if n != name)
    del module._modules[PREFIX + name]
    _set_names(module, names)
    module._parameters[name] = param


def installed(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's weights that are in trainable form."""
    return getattr(type(module), "sparse_names", ())


def _set_names(module: nn.Module, names: tuple[str, ...]) -> None:
    plain = getattr(type(module), "plain_class", type(module))
    module.__class__ = _with_weights(plain, names) if names else plain


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(full name of the weight, owner, name, holder) of every weight in trainable form; ties appear once an owner."""
    for prefix, module in model.named_modules(remove_duplicate=True):
        for name in installed(module):
            yield (prefix + "." if prefix else "") + name, module, name, module._modules[PREFIX + name]
