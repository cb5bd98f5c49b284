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
    record_stream untyped_storage _typed_storage module_load _use_count _is_view _has_compatible_shallow_copy_type
    zeros_like ones_like full_like empty_like rand_like randn_like new_empty new_zeros new_ones new_full
    new_empty_strided new_tensor"""
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
    others = {key: value for key, value in kwargs.items() if key != "out"}
    if rule is not None and out is None:
        return rule(*args, **others)
    if rule is None or not isinstance(out, Tensor) or not sparse_in((args, others)):
        return on_dense_copies(func, args, kwargs, name, warn=True)
    return on_dense_copies(A.clone.out, (rule(*args, **others),), {"out": out}, name)


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


def on_dense_copies(func: Callable, args: tuple, kwargs: dict, name: str, warn: bool = False) -> Any:
    """Run an operator on dense copies of its sparse operands, `out=` included; `name` is the operator's in messages.

    A sparse operand that is written gets the numbers of its copy. If those do not fit a pattern ValueError is raised,
    and no operand is changed.
    """
    targets = written(func, args, kwargs)
    expect_writable(func, targets)
    sparse = sparse_in((args, kwargs))
    if not sparse or (is_compiling() and sparse_in(targets)):  # the latter is refused by `below_autograd`
        return func(*args, **kwargs)
    if warn:
        warn_densified(name, sparse[0])
    copies = [w.to_dense() for w in sparse]
    dense_args, dense_kwargs = tree_map(lambda a: _first(a, sparse, copies), (args, kwargs))
    backups = []
    if sparse_in(targets):  # a call that may be refused in the end
        backups = [(a, a.clone()) for a in tensors_in((args, kwargs)) if not isinstance(a, SparseTensor)]
    before = versions(copies)
    result = func(*dense_args, **dense_kwargs)
    wrote = [a != b for a, b in zip(versions(copies), before, strict=True)]
    wrote = [each or any(w is a for a in targets) for each, w in zip(wrote, sparse, strict=True)]
    try:
        copy_in([(w, d) for w, d, yes in zip(sparse, copies, wrote, strict=True) if yes], name)
    except (ValueError, RuntimeError):
        for a, backup in backups:
            A.clone.out(backup, out=a.detach())
        raise
    owners_of_results = [w if yes else d for w, d, yes in zip(sparse, copies, wrote, strict=True)]
    result = tree_map(lambda a: _first(a, copies, owners_of_results), result)
    return read_only_aliases(result, copies, WRITE_ITSELF.format(sparse[0].sparse_layout))


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


def copy_in(writes: list[tuple[SparseTensor, Tensor]], name: str) -> None:
    """Copy dense tensors into sparse ones; ValueError, and no change, if one of them does not fit its pattern."""
    for w, dense in writes:
        if dense.shape != w.shape:
            shapes = f"shape {tuple(w.shape)} for {name}, got {tuple(dense.shape)}"
            raise ValueError(f"Expected a result of {shapes}: a sparse tensor cannot be resized.")
        dense_to_values(w, dense, name)
    for w, dense in writes:
        w.copy_(project(dense, w))


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
