"""Chains of methods that act once: a mask, its refinement, the weights in it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ..layouts.base import Layout
from .sparsifier import Edit, PatternMethod, Sparsifier, View


@dataclass(frozen=True)
class Chain(PatternMethod):
    """Methods one after the other, each with the Edit of the one before in `View.previous`; made by `sten.chain`."""

    methods: tuple[Sparsifier, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise ValueError("Expected methods for chain(), such as sten.chain(sten.Wanda(), sten.ADMM()), got none.")
        for place, method in enumerate(self.methods):
            if not isinstance(method, Sparsifier):
                raise TypeError(f"Expected methods for chain(), such as sten.Wanda(), got {method!r}.")
            if not method.acts_once:
                raise ValueError(
                    f"Expected methods that decide once, at sten.sparsify, for chain(), got {method}; call "
                    "sten.sparsify again for it."
                )
            if getattr(method, "reconstruct", None) is not None and method is not self.methods[-1]:
                raise ValueError(f"Expected {method}, which fits whole blocks, as the last of chain(), got it before.")
            if place and not method.refines:
                raise ValueError(
                    f"Expected methods that start from another one's mask behind the first of chain(), got {method}, "
                    "which chooses anew; put it first."
                )

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.methods))})"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(method.needs for method in self.methods))

    @property
    def seed(self) -> int:
        return self.methods[0].seed

    @property
    def reconstruct(self):
        """The last method's `reconstruct`, which is called once a block; None where it has none."""
        return getattr(self.methods[-1], "reconstruct", None)

    def check(self, layout: Layout) -> None:
        for method in self.methods:
            method.check(layout)

    def score(self, view: View) -> Tensor:
        return self.methods[0].score(view)

    def update(self, view: View) -> Edit:
        done, lost = Edit(), None
        for place, method in enumerate(self.methods):
            seen = dataclasses.replace(view, previous=done if place else None)
            if not place:
                seen.memo.update(view.memo)
            edit = method.update(seen)
            if edit.mask is None:  # the pattern stays
                edit = Edit(mask=done.mask, value=done.value if edit.value is None else edit.value)
            if done.value is not None and edit.value is None:
                lost = self.methods[place - 1], method
            done = edit
        if lost is not None and done.value is None and self.reconstruct is None:
            raise ValueError(
                f"Expected a weight update behind {lost[1]}, which moves the mask, so that the weights that {lost[0]} "
                f"made for the mask before are lost, got {self}; put sten.ADMM() last."
            )
        return done


def chain(*methods: Sparsifier) -> Chain:
    """Methods that decide once, as one: the first chooses a mask, each further one starts from what came before.

    What is calibrated is the union of what they need. A method that returns a mask without values puts the weight's
    own values there, so updates of weights (`sten.ADMM`) come after changes of masks (`sten.SparseSwaps`): a chain
    whose last change of a mask would lose an update is refused. A chain among the methods stands for its own.

    Raises:
        ValueError, TypeError: a method that acts during training, or one behind the first that chooses anew.

    Example:
        >>> import sten
        >>> method = sten.chain(sten.Wanda(), sten.SparseGPT())
        >>> method, sorted(method.needs)
        (chain(Wanda(per='row'), SparseGPT(block=128, damping=0.01)), ['x_gram', 'x_norm'])
    """
    return Chain(tuple(each for m in methods for each in (m.methods if isinstance(m, Chain) else (m,))))
