"""Sparsifier: which entries of a weight are active.

A method reads a `View` and returns an `Edit`, which the engine carries out. Every method is one of two kinds:

- `PatternMethod`: what the layout stores is trained, and `update` moves the pattern (Magnitude, once; RigL);
- `DenseWeightMethod`: a dense weight is trained, and `apply` says what the model computes with (SR-STE, Gradual).

What is called, and when:

| call | when | what of the View is set |
|---|---|---|
| `check(layout)` | first, once a weight | |
| `update(view)` | at `sten.sparsify` | `mask` is None, `step` is 0, `state` is empty |
| `init(view)` | at `sten.sparsify`, unless the method `acts_once` | `mask` |
| `apply(w, view)` | every forward pass, of a DenseWeightMethod | `mask`, `state`, `step` (a 0-d tensor) |
| `grad(view)` | before every optimizer step, of a DenseWeightMethod | `mask`, `state`, `step` |
| `allocate(views, allocation)`, `update(view)` | on the steps of `schedule` | all |
| `finish(view)` | at `sten.finalize`, of a DenseWeightMethod | `mask`, `state`, `step` |
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..layouts.base import Layout
from ..layouts.construct import Constructor
from . import scores
from .allocation import Allocation
from .schedule import Schedule

State = dict[str, Tensor]

NEEDS = frozenset({"grad", "momentum"})
CALIBRATION = frozenset({"x_norm", "x_gram", "x_mean_var"})


@dataclass(frozen=True)
class Edit:
    """What a method decided for one weight; a field that is None changes nothing.

    Attributes:
        mask: bool, which entries are active from now on. New ones are zero, in the weight and in every optimizer slot.
        value: dense, new values of the weight, also at new entries.
        fresh: bool, further entries that become zero in the weight and in every optimizer slot.
        state: the method's new state.
    """

    mask: Tensor | None = None
    value: Tensor | None = None
    fresh: Tensor | None = None
    state: State | None = None


@dataclass(frozen=True)
class View:
    """What a method may read of one weight.

    Attributes:
        name: full name of the parameter.
        weight: dense, detached, in the orientation of the layout (a transposed weight is transposed already).
        layout: how the weight is, or will be, stored.
        sparsity: the fraction to drop that the allocation gave this weight; None where the layout fixes it.
        mask: bool mask of the active entries; None at `sten.sparsify`, when the first mask is chosen.
        allowed: where an earlier pruning has left something, as whole units of the layout, which a mask should choose
            from; None: everywhere. At `sten.sparsify` only.
        left: the entries themselves that it has left; None: all. The others stay zero, whatever `Edit.value` has there:
            a unit, or a group of an n:m layout that has fewer than n of them, is filled up with zeros.
        step: optimizer steps, the present one included; in `apply` a 0-d tensor with the steps done.
        generator: random numbers, the same on every rank.
        grad, momentum: set if the method's `needs` has them; else None.
        stats: what calibration measured of the inputs x of the weight, over all tokens that count, where `needs` has
            it. Columns are those of `weight.flatten(1)` (unfolded patches for a convolution). "x_norm" (columns,), the
            root of the mean of x_j^2; "x_gram" (columns, columns), the mean of x x^T; "x_mean_var" gives "x_mean" and
            "x_var" (columns,); all float32. Always there then: "tokens", their number, 0-d int64.
        previous: in a chain, the Edit of the method before; None for the first, and outside chains.
        last: whether it is the last of the chosen weights, mostly the classifier.
        frozen: in `allocate`, whether its mask stays in this mask update, whatever it is given: it does not train, or
            the gradient that the method reads did not arrive (`grad` and `momentum` are None then).
        state: the tensors that the method's `init` made for this weight, as the last `Edit.state` left them.
        memo: a cache of what a method computes of this weight; `dataclasses.replace` starts an empty one.
    """

    name: str
    weight: Tensor
    layout: Layout
    sparsity: float | None = None
    mask: Tensor | None = None
    step: int | Tensor = 0
    generator: torch.Generator | None = None
    grad: Tensor | None = None
    momentum: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)
    last: bool = False
    frozen: bool = False
    state: State = field(default_factory=dict)
    allowed: Tensor | None = None
    left: Tensor | None = None
    previous: Edit | None = None
    memo: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)


class Sparsifier(metaclass=Constructor):
    """Decides which entries of a weight are active. A method derives from `PatternMethod` or `DenseWeightMethod`.

    A method is a frozen dataclass. One that acts during training has a field `schedule: Schedule | None = None`, and
    defines `default_schedule` from its other fields.

    Attributes:
        layouts: the only layouts that the method works with, subclasses included; empty: all whose traits allow it.
        needs: what its View must hold when `update` is called, of {"grad", "momentum"}, or in `View.stats`, of
            {"x_norm", "x_gram", "x_mean_var"}.
        refines: whether it starts from the mask of `View.previous`, so that it can follow another method in a chain.
        schedule: the optimizer steps on which `update` is called; None: never after `sten.sparsify`.
        replaces_step: whether a mask update takes the place of the optimizer step (RigL) or follows it.
        stateless: whether nothing happens around optimizer steps (STE), so that it works without `sten.attach`.
        optimizer: name of the optimizer class that the method is defined for; None: any.
        capacity: slots of a weight as a multiple of its first count, where `allocate` moves counts between weights.
        resizes: whether mask updates change the shapes of parameters (SRigL), which DDP cannot follow.
        ranks_only: whether only the order of |grad| matters; then each dense gradient is freed at once.
        seed: of the random numbers in its View.
    """

    layouts: ClassVar[tuple[type[Layout], ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    refines: ClassVar[bool] = False
    replaces_step: ClassVar[bool] = False
    stateless: ClassVar[bool] = False
    optimizer: ClassVar[str | None] = None
    capacity: ClassVar[float] = 1.0
    resizes: ClassVar[bool] = False
    ranks_only: ClassVar[bool] = False
    schedule: Schedule | None = None
    seed = 0

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:  # @dataclass would write one that prints the default schedule
            cls.__repr__ = Sparsifier.__repr__

    def __post_init__(self) -> None:
        """Make the default schedule. A dataclass with a `__post_init__` of its own must call this one."""
        default, schedule, kind = self.default_schedule(), self.schedule, type(self).__qualname__
        if default is None:
            return
        if schedule is None or schedule == default:
            object.__setattr__(default, "default_of", kind)
            object.__setattr__(self, "schedule", default)
        elif getattr(schedule, "default_of", None) == kind:  # dataclasses.replace passes on the default of other fields
            raise ValueError(
                f"Expected schedule=None or a schedule of your own, got the default of a {kind} with other fields; "
                "with dataclasses.replace, pass schedule=None to have it made again."
            )

    def __repr__(self) -> str:
        """The dataclass's repr without a default schedule; checkpoints contain it."""
        if not dataclasses.is_dataclass(self):
            return object.__repr__(self)
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}
        kind, schedule = type(self).__qualname__, shown.get("schedule")
        if schedule is None or getattr(schedule, "default_of", None) == kind:
            shown.pop("schedule", None)
        return f"{kind}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def default_schedule(self) -> Schedule | None:
        """The schedule, made of the other fields, where `schedule=` is None. None: the method acts once."""
        return None

    @property
    @abstractmethod
    def acts_once(self) -> bool:
        """Whether it decides at `sten.sparsify` only. Both kinds of method define it."""

    def check(self, layout: Layout) -> None:
        """Raise ValueError if the method cannot train a weight in this layout."""
        kind = type(self).__name__
        if self.layouts and not isinstance(layout, self.layouts):
            names = " or ".join(f"sten.{known.__name__}" for known in self.layouts)
            raise ValueError(f"Expected layout={names} for {kind}, which works with no other, got {layout}.")
        if self.schedule is None and type(self).default_schedule is not Sparsifier.default_schedule:
            raise TypeError(f"Expected {kind}.__post_init__ to call super().__post_init__(), which makes its schedule.")

    def init(self, view: View) -> State:
        """The method's tensors for a weight, saved and resumed with the run; an nn.Parameter among them is trained."""
        del view
        return {}

    def check_state(self, state: State) -> None:
        """Raise ValueError if tensors of a state dict, of the right shapes, cannot be what the method has made."""
        del state

    def score(self, view: View) -> Tensor:
        """Importance of each entry, in the weight's shape; higher is better, ties go to the lower index.

        The default `update` takes the highest scores, and `sten.Global` compares those of all weights.
        """
        raise NotImplementedError(f"Expected {type(self).__name__} to define score or update.")

    def allocate(self, views: Mapping[str, View], allocation: Allocation | None) -> dict[str, int] | None:
        """How many active entries each weight has after this mask update; None: as many as before."""
        del views, allocation
        return None

    def update(self, view: View) -> Edit:
        """The decision: by default the highest scores that the layout can hold at the view's sparsity.

        Called at `sten.sparsify` with `view.mask` None, for the first mask, and then on the steps of `schedule`. A
        method that acts once may return values, too (`Edit.value`, as in SparseGPT).
        """
        score = self.scored(view)
        if view.mask is None and view.allowed is not None:
            score = score.masked_fill(~view.allowed, -torch.inf)
        return Edit(mask=view.layout.mask(score, view.sparsity))

    def scored(self, view: View) -> Tensor:
        """`score`, computed once a View: the scores of an allocation have drawn the random numbers already."""
        if "score" not in view.memo:
            view.memo["score"] = self.score(view)
        return view.memo["score"]


class PatternMethod(Sparsifier):
    """Trains the values that the layout stores; `update` moves the pattern. With `schedule` None it acts once.

    Example:
        >>> import torch, sten
        >>> class NearMean(sten.extend.PatternMethod):
        ...     def score(self, view):
        ...         return -(view.weight - view.weight.mean()).abs()
        >>> NearMean().acts_once
        True
    """

    @property
    def acts_once(self) -> bool:
        return self.schedule is None


class DenseWeightMethod(Sparsifier):
    """Trains a dense weight under its own name; `apply` says what the model computes with. Scores are |w| by default.

    Attributes:
        zero_pruned: whether entries off the mask are zero in the dense weight itself, after every step. The first mask
            of such a method holds all entries (or those that an earlier pruning left).

    Example:
        >>> import torch, sten
        >>> class Halved(sten.extend.DenseWeightMethod):
        ...     def apply(self, w, view):
        ...         return torch.where(self.present_mask(view), w, w / 2)
        >>> Halved().zero_pruned, Halved().acts_once
        (False, False)
    """

    zero_pruned: ClassVar[bool] = False

    @property
    def acts_once(self) -> bool:
        return False

    def score(self, view: View) -> Tensor:
        return scores.magnitude(view.weight)

    def present_mask(self, view: View) -> Tensor:
        """The layout's mask of the present scores, made once a View: `grad` gets the one of `apply`."""
        if "mask" not in view.memo:
            view.memo["mask"] = view.layout.mask(self.score(view), view.sparsity)
        return view.memo["mask"]

    def apply(self, w: Tensor, view: View) -> Tensor:
        """The weight that the model computes with, differentiable."""
        del view
        return w

    def grad(self, view: View) -> Tensor | None:
        """The term that is added to the unscaled gradient, once an optimizer step; None: none."""
        del view
        return None

    def finish(self, view: View) -> Edit:
        """The mask and values that `sten.finalize` stores."""
        return Edit(mask=view.mask) if self.zero_pruned else self.update(view)


def check_needs(method: Sparsifier, calibrated: bool = False) -> None:
    """Raise ValueError if `method.needs` has something that no engine provides, or that needs `calibration=`."""
    kind = type(method).__name__
    if method.needs - NEEDS - CALIBRATION:
        raise ValueError(
            f"Expected {kind}.needs to name some of {sorted(NEEDS | CALIBRATION)}, got {sorted(method.needs - NEEDS)}."
        )
    if method.needs & CALIBRATION and not calibrated:
        names = ", ".join(sorted(method.needs & CALIBRATION))
        raise ValueError(
            f"Expected calibration= for {method}, which reads {names} of its inputs, got None; pass batches, or use "
            "sten.Magnitude()."
        )
