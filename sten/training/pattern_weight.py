"""PatternWeight: a weight of which only the values that its layout stores are trained.

The Parameter is plain and 2-D, the pattern is buffers, and `module.weight` makes a SparseTensor of both at each use. So
optimizers (foreach and fused), gradient clipping, GradScaler, EMA, DDP and rules by `p.ndim` see a plain matrix, and
weight, gradient and optimizer state have the size of the pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._torch_private import exports, exports_to_onnx, has_tangents, is_compiling, transforms_active
from ..layouts.base import Parts
from ..pattern_cache import PatternCache
from ..rule import Rule
from ..sparsifiers import Edit
from ..tensor import SparseTensor, project, project_now
from .distributed import shard_like, sharded, whole
from .moves import of_vectors
from .trained_weight import TrainedWeight, fill, optimizer_slots, replace_in_optimizer

Move = Callable[[Tensor], Tensor]


def as_matrix(values: Tensor) -> Tensor:
    """The values of a layout as the Parameter holds them: (rows, slots), or (nnz, 1) where they have one dimension."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


class PatternWeight(TrainedWeight):
    """The pattern of a weight, as buffers under the names of the layout's parts.

    Attributes:
        part_names: the layout's parts, without the values.
        values_shape: of the values, whose dimensions after the first the 2-D Parameter has flattened.
        cache: what is derived from the pattern; every SparseTensor that is made here shares it.
        probe: a dense zero, whose gradient is the dense gradient of the weight; set while a method needs that one.

    Example:
        >>> import torch, sten
        >>> layer = sten.trainable(sten.sparsify(torch.nn.Linear(4, 8), sten.CSR(), sparsity=0.75))
        >>> [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
        [('weight', (8, 1)), ('bias', (8,))]
        >>> layer.weight.shape, list(layer.weight_pattern.pattern)
        (torch.Size([8, 4]), ['crow', 'col'])
    """

    def __init__(self, name: str, w: SparseTensor) -> None:
        super().__init__(name, w.sparse_layout, w.stored_shape, w.transposed)
        self.part_names = tuple(name for name in w.parts if name != "values")
        self.values_shape = tuple(w.parts["values"].shape)
        self.int16_parts = tuple(name for name in self.part_names if w.parts[name].dtype == torch.int16)
        self.int16_views: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.part_names:
            self.set_part(name, w.parts[name])
        self.cache = w.cache
        self.probe: Tensor | None = None

    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k not in ("cache", "probe", "int16_views")}

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self.cache, self.probe, self.int16_views = PatternCache(), None, {}
        self._view_int16_parts()

    def _apply(self, fn, recurse=True):
        super()._apply(of_vectors(fn), recurse)
        self._view_int16_parts()
        return self

    def set_part(self, name: str, part: Tensor) -> None:
        """Keep a part in the buffer of its name; 16-bit integers as bytes, which gloo and NCCL can send for DDP."""
        # not register_buffer: a part may have the name of an attribute
        self._buffers[name] = buffer = part.view(torch.uint8) if part.dtype == torch.int16 else part
        if buffer is not part:
            self.int16_views[name] = buffer, part

    def part(self, name: str) -> Tensor:
        """The part that `set_part` keeps."""
        buffer = self._buffers[name]
        if name not in self.int16_parts:
            return buffer
        if exports_to_onnx():  # which has no views of another dtype
            return (buffer[..., 0::2].int() + 256 * buffer[..., 1::2].int()).to(torch.int16)
        if torch.compiler.is_compiling():
            return buffer.view(torch.int16)
        known, view = self.int16_views[name]  # one view, since caches know a pattern by the identity of its parts
        return view if known is buffer else buffer.view(torch.int16)

    def _view_int16_parts(self) -> None:
        """Make the views of new buffers; not where they are read, which may be under torch.func."""
        for name in self.int16_parts:
            self.int16_views[name] = self._buffers[name], self._buffers[name].view(torch.int16)

    @property
    def pattern(self) -> Parts:
        return {name: self.part(name) for name in self.part_names}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.int16_parts:
            destination[prefix + name] = self.part(name) if keep_vars else self.part(name).detach()

    @property
    def tail(self) -> tuple[int, ...]:
        """The values' dimensions after the first."""
        return self.values_shape[1:]

    def parts(self, param: Tensor) -> Parts:
        """All parts, with the Parameter in the shape of the layout's values."""
        return {"values": param.view(len(param), *self.tail), **self.pattern}

    def active(self) -> Tensor:
        return self.layout.support(self.parts(self.param.detach()), self.shape)

    def dense(self, t: Tensor) -> Tensor:
        return self.layout.unpack(self.parts(t.detach()), self.shape)

    def packed(self, dense: Tensor) -> Tensor:
        return as_matrix(self.layout.pack_like(dense, self.parts(self.param.detach())))

    def forward(self, param: Tensor) -> Tensor:
        """The weight as a SparseTensor, differentiable."""
        if type(param) is Tensor:  # of torch.func.functional_call
            self.expect_values(param)
        self.expect_numbers()
        context = (self.layout, self.shape, self.transposed, self.tail, self.part_names)
        if torch.compiler.is_compiling():
            w = _traced(param, *context, None, *self._parts())
            return w if self.probe is None or not param.requires_grad else w.to_dense() + self.probe
        if (param.requires_grad and torch.is_grad_enabled()) or has_tangents():
            w = Assemble.run(param, *context, self.cache, *self._parts())
        else:
            w = SparseTensor(self.layout, self.parts(param), self.shape, self.transposed, cache=self.cache)
        w.trained = self
        return w

    def _parts(self) -> list[Tensor]:
        return [self.part(name) for name in self.part_names]

    def expect_values(self, param: Tensor) -> None:
        """Raise RuntimeError unless a tensor in the place of the Parameter has its shape."""
        rows, *rest = self.values_shape
        if tuple(param.shape) != (rows, math.prod(rest)):
            raise RuntimeError(
                f"Expected the stored values of {self.name}, of shape {(rows, math.prod(rest))}, got shape "
                f"{tuple(param.shape)}; sten.finalize the model to call it with another weight."
            )

    def tensor(self, param: Tensor | None = None) -> SparseTensor:
        """The weight as a SparseTensor, detached; it shares memory, and `requires_grad` is the Parameter's."""
        param = self.param if param is None else param
        parts = {name: part.detach() for name, part in self.parts(whole(param.detach())).items()}
        return SparseTensor(self.layout, parts, self.shape, self.transposed, param.requires_grad, cache=self.cache)

    def copy_from(self, param: Tensor, value: Tensor) -> None:
        self.tensor(param).detach().copy_(value)

    @property
    def grad(self) -> SparseTensor | None:
        grad = self.param.grad
        return None if grad is None else self.tensor(grad)

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        if grad is not None:
            grad = as_matrix(project_now(grad, self.tensor()).parts["values"])
        self.param.grad = grad

    # changes of the pattern

    def set_pattern(self, parts: Parts, assign: bool = False) -> None:
        """Replace the pattern, by its numbers or (`assign`) its tensors, and invalidate what was derived from it.

        Where a part changes its size, all are replaced: a graph that still exists then has the old pattern as a whole.
        """
        resized = any(self.part(name).shape != parts[name].shape for name in self.part_names)
        for name in self.part_names:
            new = parts[name] if assign or resized else fill(self.part(name), parts[name])
            if new is not self.part(name):
                self.set_part(name, new)
        self.values_shape = tuple(parts["values"].shape) if "values" in parts else self.values_shape
        self.lacks_numbers = False
        self.cache.invalidate(*self.pattern.values())

    @torch.no_grad()
    def load(self, parts: Parts, assign: bool = False) -> None:
        """Load values and pattern, which the caller has validated; the number of entries may differ."""
        param, values = self.param, as_matrix(parts["values"])
        if assign:
            parts = {name: part.detach() for name, part in parts.items()}
            self.replace_param(nn.Parameter(values, requires_grad=param.requires_grad))
        elif sharded(param):  # the shards keep their sizes, so another number of entries is refused by torch
            param.copy_(shard_like(values.to(param.dtype), param))
        elif param.shape != values.shape:
            param.data, param.grad = values.to(param.device, param.dtype, copy=True), None
        else:
            param.copy_(values)
        pattern = {name: parts[name].to(self.param.device) for name in self.part_names}
        if not assign:  # of the same shape, the numbers are copied into the present part
            new = (name for name in self.part_names if pattern[name].shape != self.part(name).shape)
            pattern |= {name: parts[name].to(self.param.device, copy=True) for name in new}
        self.set_pattern({**pattern, "values": parts["values"]}, assign)

    @torch.no_grad()
    def follow(self, other: PatternWeight, dense: Tensor) -> None:
        """Take the pattern of another weight, and the entries that `dense` has in it."""
        self.set_pattern({name: part.clone() for name, part in other.pattern.items()})
        self.values_shape = other.values_shape
        values, param = as_matrix(self.layout.pack_like(dense, other.parts(other.param.detach()))), self.param
        if values.shape == param.shape:
            param.copy_(values)
        else:
            param.data = values

    @torch.no_grad()
    def change(self, edit: Edit, *optimizers: Optimizer) -> Callable[[], None]:
        mask = self.active() if edit.mask is None else edit.mask
        parts, move = self._in_pattern(mask, edit)
        new, grad = move(self.param), self.param.grad
        if edit.value is not None:
            new = as_matrix(self.layout.pack_like(edit.value.to(self.param.dtype).masked_fill(~mask, 0), parts))
        slots = [(o, key, move(slot)) for o in optimizers for key, slot in optimizer_slots(self.param, o).items()]
        grad = None if grad is None else move(grad)

        @torch.no_grad()
        def write() -> None:
            if self.param.shape == new.shape:
                self.param.copy_(new)
            else:
                _replace_in_run(self, nn.Parameter(new, requires_grad=self.param.requires_grad), optimizers)
            for optimizer, key, slot in slots:
                optimizer.state[self.param][key] = fill(optimizer.state[self.param][key], slot)
            self.param.grad = grad
            self.set_pattern(parts)
            self.set_state(edit.state)

        return write

    def _in_pattern(self, mask: Tensor, edit: Edit) -> tuple[Parts, Move]:
        """The parts of the new pattern, and the function that moves values, a slot or the gradient into it.

        Only the numbers of the slots are made dense, once: `source` is the old slot of each new one, 0 for none.
        """
        param = self.param.detach()
        number = torch.int32 if param.numel() < 2**31 else torch.int64
        numbers = torch.arange(1, param.numel() + 1, dtype=number, device=param.device).view(param.shape)
        numbers = self.dense(numbers)
        if edit.fresh is not None:
            numbers = numbers.masked_fill(edit.fresh, 0)
        parts = self.layout.pack(param.new_zeros(()).expand(self.shape), mask)
        if self.layout.free_slots:
            parts = self.layout.with_slots(parts, len(param))
        source = as_matrix(self.layout.pack_like(numbers, parts))

        def move(t: Tensor) -> Tensor:
            old = torch.cat([t.new_zeros(1), t.detach().flatten()])
            return old.index_select(0, source.flatten()).view(source.shape)

        return parts, move


def _replace_in_run(weight: PatternWeight, param: nn.Parameter, optimizers: tuple[Optimizer, ...]) -> None:
    """Replace the Parameter by one of another shape: an autograd graph that still exists needs the old shape."""
    old = weight.param
    weight.replace_param(param)
    for optimizer in optimizers:
        replace_in_optimizer(old, param, optimizer)
    if old._post_accumulate_grad_hooks:
        for hook in old._post_accumulate_grad_hooks.values():
            param.register_post_accumulate_grad_hook(hook)


def _parts_of(param: Tensor, tail: tuple[int, ...], names: tuple[str, ...], pattern) -> Parts:
    """The parts, the values as a view: `module.to(...)` gives the Parameter other numbers while a graph needs these."""
    return {"values": param.detach().view(len(param), *tail), **dict(zip(names, pattern, strict=True))}


class Assemble(Rule):
    """The SparseTensor of Parameter and pattern; backward, the values of its gradient, which has the same pattern."""

    @staticmethod
    def forward(param, layout, shape, transposed, tail, names, cache, *pattern):
        return SparseTensor(layout, _parts_of(param, tail, names, pattern), shape, transposed, cache=cache)

    @staticmethod
    def setup_context(ctx, inputs, output):
        param, layout, shape, transposed, tail, names, cache, *pattern = inputs
        made = type(output) is SparseTensor and cache is not None  # not under torch.compile and torch.func
        parts = output.parts if made else _parts_of(param, tail, names, pattern)
        ctx.like, ctx.param_shape = (layout, parts, shape, transposed), param.shape
        ctx.cache, ctx.generation = cache, None if cache is None else cache.generation

    @staticmethod
    def vmap(info, in_dims, *args):
        if any(dim is not None for dim in in_dims):
            raise NotImplementedError("torch.vmap over a sparse weight's values has no rule; map over the input only.")
        return Assemble.apply(*args), None

    @staticmethod
    def jvp(ctx, tangent, *_):
        layout, parts, shape, transposed = ctx.like
        dense = layout.unpack({**parts, "values": tangent.view(parts["values"].shape)}, shape)
        return dense.t() if transposed else dense  # torch.func hides the class of a tensor that has a tangent

    @staticmethod
    def backward(ctx, grad):
        layout, parts, shape, transposed = ctx.like
        if ctx.cache is not None and ctx.cache.generation != ctx.generation:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"mask update has moved the pattern of a {layout} weight; call backward() before the optimizer's step."
            )
        if transforms_active() and not is_compiling():  # torch.vmap knows no batch of SparseTensors
            values = layout.pack_like(grad.t() if transposed else grad, parts)
            return (values.reshape(ctx.param_shape), *(None,) * (5 + len(parts)))
        if type(grad) is not SparseTensor:
            like = {name: part.detach() for name, part in parts.items()}
            grad = project(grad, SparseTensor(layout, like, shape, transposed))
        values = Values.run(grad) if torch.is_grad_enabled() else grad.parts["values"]
        return (values.view(ctx.param_shape), *(None,) * (5 + len(parts)))


class Values(Rule):
    """The values of a SparseTensor, differentiable, for gradients of gradients."""

    @staticmethod
    def forward(w):
        return w.parts["values"].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.like = inputs[0]

    @staticmethod
    def backward(ctx, grad):
        return ctx.like.with_values(grad)


@torch.compiler.allow_in_graph
def _traced(param, layout, shape, transposed, tail, names, cache, *pattern):
    if not exports():
        return Assemble.apply(param, layout, shape, transposed, tail, names, cache, *pattern)
    w = SparseTensor(layout, _parts_of(param, tail, names, pattern), shape, transposed)
    w.assembled = True
    return w
