"""ActivationMethod: which entries of an activation or a gradient are kept, decided anew at each call.

kind            decides by                      examples
streaming       each entry by itself            Threshold, RandomFraction, JumpReLU
blocking        entries of one row, or block    TopK, MVUE24
materializing   the whole tensor                BatchTopK
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..layouts.construct import Constructor
from ..ops.epilogue import Kept
from .straight_through import masked_straight_through

State = dict[str, Tensor]


class ActivationMethod(metaclass=Constructor):
    """Decides which entries of a matrix (tokens, features) are kept: of an activation, or of a gradient.

    A method is a frozen dataclass without tensors. What it learns or counts is the `state` of one site, made by
    `init`: parameters and buffers of the module, so that `state_dict`, `.to` and optimizers see them. Random numbers
    come from torch's default generator, as those of dropout.

    Attributes:
        kind: "streaming", "blocking" or "materializing": what a decision about one entry may depend on. Only the first
            two can be fused into the kernel that computes the tensor.
        straight_through: whether entries that were dropped get the gradient of those that were kept.
        takes_gradients: whether it works on gradients, which have no state.
        full_gradient: whether entries that were dropped have a gradient: then a layout does not reduce the gradient.

    Example:
        >>> import torch, sten
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Positive(sten.extend.ActivationMethod):
        ...     kind = "streaming"
        ...     def mask(self, x, state, training):
        ...         return x > 0
        >>> sten.sparse_op(torch.neg, out=Positive())(torch.tensor([[1.0, -2.0]]))
        tensor([[0., 2.]])
    """

    kind: ClassVar[Literal["streaming", "blocking", "materializing"]]
    straight_through = False
    takes_gradients = True

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = ActivationMethod.__repr__
        if {"mask", "apply"} & vars(cls).keys() and "kept" not in vars(cls):
            cls.kept = ActivationMethod.kept  # what it inherits says what another `mask` keeps

    def __repr__(self) -> str:
        """The dataclass's repr without defaults."""
        if not dataclasses.is_dataclass(self):
            return object.__repr__(self)
        shown = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def full_gradient(self) -> bool:
        """By default: of a straight-through method."""
        return self.straight_through

    def check(self, features: int) -> None:
        """Raise ValueError if rows of so many features cannot be sparsified."""
        del features

    def init(self, features: int | None) -> State:
        """The tensors of one site, an nn.Parameter among them is trained; `features` is None where it is not known."""
        del features
        return {}

    def calibrate(self, x: Tensor) -> State:
        """State from a sample of the tensor, (tokens, features); the default refuses: the method has none to find."""
        del x
        raise ValueError(f"{self} has nothing to calibrate: leave calibration= out.")

    @abstractmethod
    def mask(self, x: Tensor, state: State, training: bool) -> Tensor:
        """The entries to keep: bool, in the shape of x, (tokens, features)."""

    def columns(self, x: Tensor) -> Tensor | None:
        """Of a method that keeps k entries of each row as they are: their columns, (tokens, k), ascending; else None.

        A layout then stores them without a mask of the whole matrix; `apply` gives the same numbers.
        """
        del x

    def kept(self, x: Tensor, state: State, training: bool) -> Kept | None:
        """`mask` as a rule that kernels know, for tensors like x; None: there is none.

        Then an activation, this rule and the storing are one pass over rows that have just been computed.
        """
        del x, state, training

    def apply(self, x: Tensor, state: State, training: bool) -> tuple[Tensor, Tensor]:
        """(the tensor with zeros for what was dropped, differentiable; the mask of the entries that are stored)."""
        mask = self.mask(x.detach(), state, training)
        if self.straight_through and x.requires_grad:
            return masked_straight_through(x, mask), mask
        return torch.where(mask, x, 0), mask


def expect_fraction(method: ActivationMethod, name: str, least: float = 0.0, most: float = 1.0) -> None:
    """Raise ValueError unless a field is a number within these bounds."""
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"Expected {name} from {least} to {most} for {type(method).__name__}, got {value!r}.")


def expect_count(method: ActivationMethod, name: str = "k") -> None:
    """Raise ValueError unless a field is a positive count, or a fraction below 1."""
    value = getattr(method, name)
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not whole and not (isinstance(value, float) and 0 < value < 1):
        kind = type(method).__name__
        raise ValueError(f"Expected a positive count or a fraction below 1 for {kind}({name}=...), got {value!r}.")


def count_of(k: int | float, size: int) -> int:
    """The count of entries that a count or a fraction of `size` means; at least one."""
    return k if isinstance(k, int) else max(1, round(k * size))
