"""Operators without a rule: on dense copies, made where the operator is entered.

The copies are differentiable, so that composites and formulas of gradients see dense tensors only. What the operator
writes is copied in if it is zero off the pattern, and refused otherwise; what shares memory with a copy is read-only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import init

from .._torch_private import BELOW_FUNCTIONS, OpOverload, is_compiling, transforms_active, tree_leaves, tree_map
from ..dispatch import warn_densified
from ..read_only import expect_writable, read_only_aliases, written
from ..tensor import OTHERS, SparseTensor, as_it_is, aten, function, function_rule, project
from .padding import dense_to_values

# Operators on what a tensor is, not on its numbers, and those whose aten operators have rules: run as they are.
AS_THEY_ARE = """size dim ndimension nelement numel element_size stride storage_offset get_device type
    is_floating_point is_complex is_conj is_neg is_inference is_signed is_contiguous is_pinned is_distributed is_set_to
    is_same_size is_coalesced has_names result_type __len__ __hash__ __repr__ __format__ __reduce_ex__ __deepcopy__
    __setstate__ __dir__ backward register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ detach
    detach_ clone to float double half bfloat16 int long short char byte bool cpu cuda xpu type_as contiguous equal
    record_stream untyped_storage _typed_storage module_load _use_count _is_view zeros_like ones_like full_like
    empty_like rand_like randn_like new_empty new_zeros new_ones new_full new_empty_strided new_tensor"""
OF_MATRICES = "t transpose permute swapaxes swapdims movedim moveaxis adjoint t_ transpose_"
SAME_SHAPE = "view reshape expand view_as reshape_as expand_as"
WRITE_ITSELF = "a copy of the entries of a {} tensor; assign to the tensor itself, w[i] = value"
A = torch.ops.aten


def owners(name: str, *places: Any) -> list[Callable]:
    """The functions of this name in torch, torch.Tensor and further modules."""
    found = (getattr(place, name, None) for place in (torch, Tensor, *places))
    return [f for f in found if callable(f)]


for _name in AS_THEY_ARE.split():
    for _function in owners(_name):
        as_it_is(_function)
as_it_is(torch.autograd.backward, init.uniform_, init.normal_, init.constant_, init.kaiming_uniform_)


@function(OTHERS)
def without_rule(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Any function that has no rule, or is called with `out=`."""
    name, rule = getattr(func, "__name__", str(func)), function_rule(func)
    attribute = name in ("__get__", "__set__", "__delete__")  # such as requires_grad
    if attribute or isinstance(func, BELOW_FUNCTIONS):
        return func(*args, **kwargs)
    out = kwargs.get("out")
    if rule is None and not sparse_in(out):
        return on_dense_copies(func, args, kwargs, name, warn=True)
    kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    if rule is None or not sparse_in((args, kwargs)):
        return on_dense_copies(func, args, kwargs, name, warn=True, out=out)
    result = rule(*args, **kwargs)
    if out is None:
        return result
    writes = writes_to_out(out, result, name)
    write(writes, name)
    return out


def sparse_in(tree: Any) -> list[SparseTensor]:
    """The different SparseTensors in some arguments."""
    return [a for a in tensors_in(tree) if isinstance(a, SparseTensor)]


def tensors_in(tree: Any) -> list[Tensor]:
    """The different tensors in some arguments."""
    found: list[Tensor] = []
    for a in tree_leaves(tree):
        if isinstance(a, Tensor) and not any(a is other for other in found):
            found.append(a)
    return found


def on_dense_copies(func: Callable, args: tuple, kwargs: dict, name: str, warn: bool = False, out: Any = None) -> Any:
    """Run an operator on dense copies of its sparse operands.

    Args:
        func, args, kwargs: the call, without its `out=` if `out` is given.
        name: the operator's in warnings and errors.
        warn: whether to warn.
        out: where to write the result, if a SparseTensor is among it.

    An operand that is written gets the numbers of its copy; if those do not fit a pattern, none is changed.
    """
    targets = written(func, args, kwargs)
    expect_writable(func, targets)
    sparse = sparse_in((args, kwargs))
    if not sparse and out is None:
        return func(*args, **kwargs)
    if is_compiling() and sparse_in(targets):
        return func(*args, **kwargs)  # `below_autograd` refuses it
    if warn and sparse:
        warn_densified(name, sparse[0])
    # an operator that may be refused in the end must not have written to a dense operand
    refusable = out is not None or bool(sparse_in(targets))
    olds = tensors_in((args, kwargs)) if refusable else sparse
    news = [a.to_dense() if isinstance(a, SparseTensor) else a.clone() for a in olds]
    args, kwargs = tree_map(lambda a: _first(a, olds, news), (args, kwargs))
    before = versions(news)
    result = func(*args, **kwargs)
    after = versions(news)
    writes, results = [], []
    for i, (old, new) in enumerate(zip(olds, news, strict=True)):
        wrote = after[i] != before[i] or any(old is a for a in targets)
        writes += [(old, new)] if wrote else []
        results.append(old if wrote else new)
    if out is not None:
        writes += writes_to_out(out, result, name)
    write(writes, name)
    if out is not None:
        return out if isinstance(out, Tensor) else type(result)(out)
    result = tree_map(lambda a: _first(a, news, results), result)
    copies = [new for old, new in zip(olds, news, strict=True) if isinstance(old, SparseTensor)]
    return read_only_aliases(result, copies, WRITE_ITSELF.format(sparse[0].sparse_layout)) if sparse else result


def _first(a: Any, olds: list, news: list) -> Any:
    """The new object in the place of an old one."""
    for old, new in zip(olds, news, strict=True):
        if a is old:
            return new
    return a


def versions(tensors: list[Tensor]) -> list[int]:
    """torch's counts of writes; zeros where it keeps none."""
    untracked = is_compiling() or transforms_active() or torch.is_inference_mode_enabled()
    return [0 if untracked or t.is_inference() else t._version for t in tensors]


def write(writes: list[tuple[Tensor, Tensor]], name: str) -> None:
    """Copy (target, numbers) in; ValueError, and no change, if one of them does not fit its target's pattern."""
    for target, numbers in writes:
        if isinstance(target, SparseTensor):
            if numbers.shape != target.shape:
                shapes = f"shape {tuple(target.shape)} for {name}, got {tuple(numbers.shape)}"
                raise ValueError(f"Expected a result of {shapes}: a sparse tensor cannot be resized.")
            dense_to_values(target, numbers, name)
    for target, numbers in writes:
        if isinstance(target, SparseTensor):
            target.copy_(project(numbers, target))
        else:
            A.clone.out(numbers, out=target) if numbers.shape != target.shape else target.copy_(numbers)


def writes_to_out(out: Any, result: Any, name: str) -> list[tuple[Tensor, Tensor]]:
    """What to write to each tensor of `out=`, as torch allows it."""
    writes = []
    for o, r in zip(tree_leaves(out), tree_leaves(result), strict=True):
        if torch.is_grad_enabled() and (o.requires_grad or r.requires_grad):
            raise RuntimeError(f"Expected no tensor that requires a gradient for out= of {name}, got one; detach() it.")
        if not torch.can_cast(r.dtype, o.dtype):
            raise RuntimeError(f"Expected an out= for {name} that can hold {r.dtype}, got {o.dtype}; convert it first.")
        writes.append((o, r.to_dense() if isinstance(r, SparseTensor) else r))
    return writes


@aten(OTHERS)
def below_autograd(func: Callable, *args, **kwargs) -> Any:
    """An aten operator without a rule, on dense copies; raises if it would write to a sparse operand.

    What users call was entered by `without_rule`: here come formulas of gradients, compilers and torch.func.
    """
    sparse = sparse_in((args, kwargs))
    name = getattr(func, "__name__", str(func))
    if isinstance(func, OpOverload):
        name = func._schema.name.removeprefix("aten::")
        for argument, operand in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and sparse_in(operand):
                raise NotImplementedError(
                    f"Expected an operator that can write to a {sparse[0].sparse_layout} tensor, got {name}; to train, "
                    "use the trainable form (sten.attach, sten.trainable), or sten.densify."
                )
    warn_densified(name, sparse[0])
    args, kwargs = tree_map(lambda a: a.to_dense() if isinstance(a, SparseTensor) else a, (args, kwargs))
    return func(*args, **kwargs)


@function(Tensor.__iter__)
def rows(w: SparseTensor):
    return iter(on_dense_copies(Tensor.unbind, (w,), {}, "__iter__", warn=True))


def _same_shape(w, *size, **kwargs) -> bool:
    """Whether a view keeps the shape, as those that autograd makes of gradients."""
    size = size[0] if size and not isinstance(size[0], int) else size
    size = tuple(size.shape if isinstance(size, Tensor) else size) if isinstance(size, (Tensor, tuple, list)) else ()
    return len(size) == w.dim() and all(want in (-1, have) for want, have in zip(size, w.shape, strict=True))


def _view(func: Callable, stays_sparse: Callable[..., bool]) -> Callable:
    def rule(w, *args, **kwargs):
        if isinstance(w, SparseTensor) and stays_sparse(w, *args, **kwargs):
            return func(w, *args, **kwargs)
        return on_dense_copies(func, (w, *args), kwargs, name, warn=True)

    name = func.__name__
    return rule


for _name in OF_MATRICES.split():
    for _function in owners(_name):
        function(_function)(_view(_function, lambda w, *args, **kwargs: w.dim() == 2))
for _name in SAME_SHAPE.split():
    for _function in owners(_name):
        function(_function)(_view(_function, _same_shape))


@function(torch.autograd.grad)
def grad(outputs, inputs, *args, **kwargs):
    """torch.autograd.grad; the gradient of a sparse tensor has its pattern."""
    grads = torch.autograd.grad(outputs, inputs, *args, **kwargs)
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    return tuple(
        project(g, w) if isinstance(w, SparseTensor) and isinstance(g, Tensor) and g.shape == w.shape else g
        for g, w in zip(grads, inputs, strict=True)
    )
