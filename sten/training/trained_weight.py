"""TrainedWeight: everything about one weight in trainable form, as a submodule of its module.

The trained Parameter is `module._parameters["weight"]`, where the dense weight was, always 2-D for a pattern; the
submodule is `module.weight_pattern`. There are two kinds:

    class           the trained Parameter             what the module computes with
    PatternWeight   the layout's values, 2-D          a SparseTensor of the values and the pattern
    DenseWeight     the dense weight                  what the method makes of it (`apply`)

States of a weight:

    state        engine   entered by                                      mask updates
    fixed        None     no method, or a stateless one                   none
    unattached   None     sten.sparsify without optimizer=                none; the first optimizer step warns
    copied       None     copy.deepcopy, a pickle                         the same; sten.attach continues the run
    attached     set      sten.attach, sten.sparsify(optimizer=)          on schedule, in that optimizer's steps; the
                                                                          first step of another one warns
    finalized    -        sten.finalize, which removes this object        -

The state of a run (method, step, counts, random numbers, mask, the method's tensors) is buffers here, so that
`model.state_dict()` has all of it. A state dict without them loads, with a warning, as the start of a run.
"""

from __future__ import annotations

import math
import warnings
import weakref
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import FormatError
from ..layouts.base import Layout
from ..read_only import ReadOnlyTensor
from ..sparsifiers import Edit, State, View
from ..tensor import SparseTensor
from .moves import empties, kept
from .run_problems import encoded, problem_of

if TYPE_CHECKING:
    from ..sparsifiers import Sparsifier
    from ..sparsifiers.allocation import Allocation
    from .engine import Engine
    from .reminders import Reminder

COUNTS = ("updates", "deferred_update_step", "backward_passes")  # of an engine, in the buffer `run_counts`
NO_STEP = -1
RUN = ("run_method", "run_step", "run_counts", "run_generator")
NOT_COPIED = ("engine", "owners", "averages", "loaded_averages", "warned_of_empty_rows")


class TrainedWeight(nn.Module):
    """One weight in trainable form.

    Attributes:
        name: the weight's full name when it was chosen.
        layout, shape, transposed: how it is, or will be, stored; the shape is that of the stored matrix.
        method, sparsity, allocation, is_last: the dynamic method, this weight's share of the budget, the rule that
            distributed it, and whether it was the last of the chosen weights. None without a method.
        engine: what carries out the method's decisions; None unless attached.
        owners: (weak reference to a module, attribute), several where the weight is tied.
        averages: weak references to the same weight of running averages (`sten.follow`).
        reminder: what warns at the first step of an optimizer in which the method does not act.
        loaded_averages: running averages of the gradient that a state dict had, for the engine that will be made.
        lacks_numbers: whether `to_empty` gave this weight memory, and no state dict has been loaded into it since.
    """

    def __init__(self, name: str, layout: Layout, shape: tuple[int, ...], transposed: bool) -> None:
        super().__init__()
        self.name, self.layout, self.shape, self.transposed = name, layout, tuple(shape), transposed
        self.method: Sparsifier | None = None
        self.sparsity: float | None = None
        self.allocation: Allocation | None = None
        self.is_last = False
        self.state_names: tuple[str, ...] = ()
        self.reminder: Reminder | None = None
        self.lacks_numbers = False  # here, not on the class: a compiled model would see another attribute appear
        self._detach_from_run()

    def _detach_from_run(self) -> None:
        """Set what neither a copy nor a pickle contains."""
        self.engine: Engine | None = None
        self.owners: list[tuple[weakref.ref, str]] = []
        self.averages: list[weakref.ref] = []
        self.loaded_averages: State = {}
        self.warned_of_empty_rows = False

    def __getstate__(self) -> dict[str, Any]:
        self.write_run()
        return {k: v for k, v in self.__dict__.items() if k not in NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._detach_from_run()
        if self.reminder is not None:
            self.reminder.add(self)

    def _apply(self, fn, recurse=True):
        if not empties(fn):
            return super()._apply(fn, recurse)
        buffers = dict(self.named_buffers())
        self.lacks_numbers |= any(buffers[name].is_meta for name in buffers.keys() - self._non_persistent_buffers_set)
        return super()._apply(lambda t: kept(fn, t), recurse)

    def expect_numbers(self) -> None:
        """Raise RuntimeError if the pattern has no numbers yet."""
        if self.lacks_numbers:
            raise RuntimeError(
                f"Expected a pattern for {self.name}, got one without numbers after to_empty; load a state dict of the "
                "sparse model first."
            )

    def add_owner(self, module: nn.Module, attribute: str) -> None:
        """Note that this attribute of a module is the weight."""
        if not any(ref() is module and name == attribute for ref, name in self.owners):
            self.owners.append((weakref.ref(module), attribute))

    def owner_modules(self) -> list[tuple[nn.Module, str]]:
        """(module, attribute) of every owner that still exists."""
        return [(module, name) for ref, name in self.owners if (module := ref()) is not None]

    @property
    def param(self) -> nn.Parameter | None:
        """The trained Parameter; None if no owner exists any more."""
        for ref, name in self.owners:  # the first that exists: every hook of a step reads this
            if (module := ref()) is not None:
                return module._parameters[name]
        return None

    @property
    def attribute(self) -> str:
        """The name of the weight in its module."""
        return self.owners[0][1]

    @property
    def size(self) -> int:
        """How many entries the dense weight has."""
        return math.prod(self.shape)

    def replace_param(self, param: nn.Parameter) -> None:
        """Replace the Parameter in every module that owns the weight."""
        for module, name in self.owner_modules():
            module._parameters[name] = param

    # what the two kinds define

    @abstractmethod
    def active(self) -> Tensor:
        """The entries that are active, bool, in the orientation of the layout."""

    @abstractmethod
    def dense(self, t: Tensor) -> Tensor:
        """The Parameter, a gradient or an optimizer slot of it, dense and in the orientation of the layout."""

    @abstractmethod
    def packed(self, dense: Tensor) -> Tensor:
        """The inverse of `dense`, at the present pattern."""

    @abstractmethod
    def tensor(self, param: Tensor | None = None) -> SparseTensor:
        """What `sten.finalize` would store now."""

    @abstractmethod
    def copy_from(self, param: Tensor, value: Tensor) -> None:
        """Copy the numbers of a dense or sparse tensor into the Parameter; ValueError if they do not fit."""

    @property
    @abstractmethod
    def grad(self) -> Tensor | None:
        """The gradient as that of `module.weight`."""

    @grad.setter
    @abstractmethod
    def grad(self, grad: Tensor | None) -> None: ...

    @abstractmethod
    def follow(self, other: Any, dense: Tensor) -> None:
        """Take the pattern of the same weight of another model, and the entries that `dense` has in it."""

    @abstractmethod
    def change(self, edit: Edit, *optimizers: Optimizer) -> Any:
        """Compute what an Edit changes (Parameter, gradient, slots, pattern); calling the result writes it.

        Pattern parts are shared, so reading after writing would mix two patterns.
        """

    # what users do to `module.weight`, which is made at each use

    @torch.no_grad()
    def assign(self, param: Tensor, value: Tensor) -> None:
        """Carry out `module.weight = value`: copy the numbers into the Parameter, or raise."""
        if type(value) not in (Tensor, nn.Parameter) and not isinstance(value, (SparseTensor, ReadOnlyTensor)):
            raise TypeError(
                f"Expected a plain or a sparse tensor for {self.attribute}, which sten trains, got a "
                f"{type(value).__name__}; call sten.finalize or sten.densify before replacing it by another kind."
            )
        shape = self.shape[::-1] if self.transposed else self.shape
        want, got = (shape, param.dtype), (tuple(value.shape), value.dtype)
        if want != got:
            raise ValueError(
                f"Expected a tensor of shape {shape} and {param.dtype} for {self.attribute}, which sten trains, got "
                f"{got[0]} and {got[1]}; call sten.densify before replacing it by another."
            )
        self.copy_from(param, value.detach())

    def refuse_hook(self) -> None:
        """Raise RuntimeError: a hook would be lost."""
        raise RuntimeError(
            "Expected a tensor that outlives the call for a hook, got a weight that is assembled at each use; register "
            f'it on the trained Parameter, module._parameters["{self.attribute}"].'
        )

    # the run

    def set_method(self, method: Sparsifier, view: View, allocation: Allocation | None) -> None:
        """Set the dynamic method, and register the buffers of its run."""
        self.method, self.sparsity, self.allocation, self.is_last = method, view.sparsity, allocation, view.last
        device = view.weight.device
        if not method.stateless:
            self.register_buffer("run_method", encoded(repr(method)).to(device))
            self.register_buffer("run_step", torch.zeros((), dtype=torch.int64, device=device))
            self.register_buffer("run_counts", torch.zeros(len(COUNTS), dtype=torch.int64, device=device))
            self.register_buffer("run_generator", torch.Generator().manual_seed(method.seed + 1).get_state().to(device))
        state = method.init(view)
        self.state_names = tuple(state)
        for name, value in state.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter("method_" + name, value)
            else:
                self.register_buffer("method_" + name, value)

    @property
    def state(self) -> State:
        """The method's tensors."""
        return {name: getattr(self, "method_" + name) for name in self.state_names}

    def set_state(self, state: State | None) -> None:
        """Copy new numbers into the method's tensors."""
        for name, value in (state or {}).items():
            getattr(self, "method_" + name).copy_(value)

    def view(self, **more: Any) -> View:
        """What the method may read now; makes the dense weight and its mask."""
        fields = {"sparsity": self.sparsity, "state": self.state, **more}
        return View(self.name, self.dense(self.param), self.layout, mask=self.active(), last=self.is_last, **fields)

    def run_names(self) -> tuple[str, ...]:
        """The names of the tensors that hold the state of a run."""
        if self.method is None or self.method.stateless:
            return ()
        return (*RUN, *("method_" + name for name in self.state_names))

    def write_run(self) -> None:
        """Write to the buffers what the engine counts in Python."""
        if self.engine is not None and not self.method.stateless:
            self.run_step.fill_(self.engine.step)
            counts = [getattr(self.engine, name) for name in COUNTS]
            self.run_counts.copy_(torch.tensor([NO_STEP if count is None else count for count in counts]))
            self.run_generator.copy_(self.engine.generator.get_state())

    def read_run(self) -> dict[str, Any]:
        """The counts that the buffers hold."""
        counts = dict(zip(COUNTS, self.run_counts.tolist(), strict=True))
        deferred = counts["deferred_update_step"]
        return {**counts, "step": int(self.run_step), "deferred_update_step": None if deferred <= 0 else deferred}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.write_run()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.engine is not None:
            for key, value in self.engine.gradients.averages_of(self).items():
                destination[prefix + key] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        """The state of a run; the pattern is loaded together with the values (`conversion.state_dict_hooks`)."""
        state = {key[len(prefix) :]: state_dict[key] for key in state_dict if key.startswith(prefix)}
        if strict:
            unexpected += [prefix + name for name in state if not is_of_run(name)]
        if self.method is None or self.method.stateless:
            return
        run = {name: state[name] for name in self.run_names() if name in state}
        averages = {name: value for name, value in state.items() if name.startswith("momentum_")}
        if not run:
            warnings.warn(
                f"sten: the state dict has no state of {type(self.method).__name__}, so its schedule starts afresh; "
                "take model.state_dict() while the method trains.",
                stacklevel=2,
            )
            if self.lacks_numbers:
                errors.append(
                    f"{self.name}: Expected the mask of {self.method} after to_empty, got a dense weight only."
                )
            elif not self.run_step.is_meta:
                self.restart()
        elif problem := problem_of(self, run, averages):
            raise FormatError(f"{self.name}: {problem}.")
        else:
            self._load_run(run, averages, metadata.get("assign_to_params_buffers", False))

    @torch.no_grad()
    def _load_run(self, run: dict[str, Tensor], averages: dict[str, Tensor], assign: bool) -> None:
        for name, value in run.items():
            present = getattr(self, name)
            if not assign:
                present.copy_(value)
            elif isinstance(present, nn.Parameter):
                setattr(self, name, nn.Parameter(value, present.requires_grad))
            else:
                setattr(self, name, value)
        self.lacks_numbers = False
        if self.engine is not None:
            self.engine.read_run(self, averages)
        else:
            self.loaded_averages = averages  # for the engine that `sten.attach` makes

    @torch.no_grad()
    def restart(self) -> None:
        """Begin the method's run again, with the present numbers."""
        self.run_method.copy_(encoded(repr(self.method)))
        self.run_step.zero_()
        self.run_counts.zero_()
        generator = torch.Generator().manual_seed(self.method.seed + 1)
        self.run_generator.copy_(generator.get_state())
        self.set_state(self.method.init(self.view()))
        if self.engine is not None:
            self.engine.read_run(self, {})

    def extra_repr(self) -> str:
        method = f"{self.method}, " if self.method is not None else ""
        return f"{method}{self.layout}, shape={self.shape}{', transposed' if self.transposed else ''}"


def is_of_run(name: str) -> bool:
    """Whether `weight_pattern.<name>` in a state dict is state of a run, not a part of the pattern."""
    return name == "mask" or name.startswith(("run_", "method_", "momentum_"))


def optimizer_slots(param: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors with a number for each entry of the parameter, by name; quantized ones dequantized."""
    found = {}
    for key, t in optimizer.state.get(param, {}).items():
        if isinstance(t, Tensor) and t.dim() > 0 and t.shape == param.shape:
            plain = t if type(t).dequantize is Tensor.dequantize else t.dequantize()
            if plain.is_floating_point():
                found[key] = plain
    return found


def replace_in_optimizer(old: Tensor, new: Tensor, optimizer: Optimizer) -> None:
    """Put another Parameter in the place of one, with its state."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def fill(old: Tensor | None, new: Tensor) -> Tensor:
    """The old tensor with the new numbers, so that CUDA graphs read them; the new one where shapes differ."""
    if old is None or old.shape != new.shape:
        return new
    return old.copy_(new)
