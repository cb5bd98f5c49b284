"""ReadOnlyTensor: dense numbers that a sparse tensor gave, for reading; what is written to them would be lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._torch_private import must_apply, no_function, storage_of, tree_leaves, tree_map

NO_WRITES = {"requires_grad_", "share_memory_", "detach_", "rename_"}  # they end in "_", and write no number


class ReadOnlyTensor(torch.Tensor):
    """A dense tensor that cannot be written: a view of a sparse tensor, or what a method makes of a weight.

    Reading and gradients are those of a plain tensor. In-place methods, `out=`, item assignment and `.data =` raise
    RuntimeError; `x *= 2` makes a new tensor. Views of it are read-only, all other results are plain tensors.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), sten.CSR())
        >>> w[1].tolist()
        [2.0, 3.0]
        >>> w[1] *= 2
        >>> w[1].tolist()
        [4.0, 6.0]
        >>> try:
        ...     w[1].zero_()
        ... except RuntimeError as error:
        ...     print(error)
        Expected a tensor that can be written for zero_, got a copy of a sparse tensor's entries; assign to the tensor \
itself, w[i] = value.
    """

    instead: str  # the end of the sentence: what it is, and what would work

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        mine = [a for a in tree_leaves((args, kwargs)) if isinstance(a, cls)]
        expect_writable(func, written(func, args, kwargs))
        plain_args, plain_kwargs = tree_map(_as_plain, (args, kwargs))
        with no_function():
            versions = [_version(a) for a in mine]
            out = func(*plain_args, **plain_kwargs)
            for a, version in zip(mine, versions, strict=True):
                if _version(a) != version:  # an operator whose name does not say that it writes
                    raise _refusal(func, a)
            return read_only_aliases(out, mine, mine[0].instead) if mine else out

    def set_(self, *args, **kwargs):  # torch calls no __torch_function__ for it
        raise _refusal(Tensor.set_, self)


def _augmented(name: str):
    """`x *= 2` out of place: for `w[:, 1] *= 2` Python assigns the result, `w[:, 1] = ...`."""

    def operate(self, other):
        return getattr(self, f"__{name}__")(other)

    return operate


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(ReadOnlyTensor, f"__i{_name}__", _augmented(_name))


def read_only(dense: Tensor, instead: str) -> Tensor:
    """The tensor as one that cannot be written; differentiable.

    Args:
        dense: a plain tensor. Under torch.compile, torch.func and fake tensors it is returned as it is.
        instead: the end of the sentence that a write raises, after "got": what it is; what would work.
    """
    if must_apply() or type(dense) is not Tensor:
        return dense
    out = dense.as_subclass(ReadOnlyTensor)
    out.instead = instead
    return out


def read_only_aliases(out: Any, sources: list[Tensor], instead: str) -> Any:
    """The result of an operator, with the tensors that share memory with one of `sources` read-only."""
    if must_apply():
        return out
    storages = {storage_of(a) for a in sources} - {None}

    def protect(a: Any) -> Any:
        if isinstance(a, np.ndarray):
            a.flags.writeable = False  # Tensor.numpy
        elif type(a) is Tensor and storage_of(a) in storages:
            return read_only(a, instead)
        return a

    return tree_map(protect, out)


def written(func: Any, args: tuple, kwargs: dict) -> list[Any]:
    """The arguments that an operator writes to, as far as its name tells: `out=`, and the first of an in-place one."""
    name = getattr(func, "__name__", "")
    out = tree_leaves(kwargs["out"]) if kwargs.get("out") is not None else []
    in_place = name.endswith("_") and not name.endswith("__") and name not in NO_WRITES
    if in_place or name == "__setitem__" or func == Tensor.data.__set__ or kwargs.get("inplace") is True:
        out += tree_leaves(args[0] if args else next(iter(kwargs.values()), None))
    return out


def expect_writable(func: Any, targets: list[Any]) -> None:
    """Raise RuntimeError if an operator would write to a tensor that is read-only."""
    for target in targets:
        if isinstance(target, ReadOnlyTensor):
            raise _refusal(func, target)


def _refusal(func: Any, target: ReadOnlyTensor) -> RuntimeError:
    name = ".data =" if func == Tensor.data.__set__ else getattr(func, "__name__", str(func))
    return RuntimeError(f"Expected a tensor that can be written for {name}, got {target.instead}.")


def _as_plain(a: Any) -> Any:
    return a.as_subclass(Tensor) if isinstance(a, ReadOnlyTensor) else a


def _version(a: Tensor) -> int:
    return 0 if a.is_inference() else a._version
