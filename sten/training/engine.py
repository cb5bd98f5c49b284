"""Engine: carries out what sparsifiers decide, in hooks of the optimizer's step; the training loop stays as it is.

Around each optimizer step, in this order:

    before   gradients are complete: the method's term is added to them; a mask update that replaces the step
    after    a mask update that follows the step; pruned entries are zeroed; where the next step needs dense gradients,
             their collection starts

When a mask update is decided and when it is written:

    the method                                                   decided                           written
    reads no gradient (SET, Gradual, SR-STE's masks)             after the step                    after the step
    reads only the order of |grad|, replaces the step; one
      process, one backward pass in the last step (RigL, SRigL)  in backward, weight by weight     before the step
    reads gradients and replaces the step (DSTEE, RigL with
      microbatches or several processes)                         before the step                   before the step
    reads gradients or momenta and follows the step              after the step                    after the step

    the gradient of a weight was not seen exactly once in the
      backward pass, and the method reads it                     not at all: one step later ("deferred")
    a gradient is not finite                                     not at all; a warning says so
    GradScaler skips the step                                    not at all; the step does not count
    the weight is frozen: it requires no gradient, or the
      optimizer does not hold it any more                        not at all for it; the others go on

A mask update calls `method.update` for every weight that trains, checks and computes all changes, and only then writes:
an error does not leave a part of them, and the update is due again at the next step. A frozen weight keeps pattern and
numbers, and continues when it trains again. An update in place of a step sets all gradients of the optimizer to None.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..sparsifiers import DenseWeightMethod, Edit, Sparsifier
from ..sparsifiers.allocation import Allocation
from ..sparsifiers.edits import check_edit, check_mask
from .dense_gradients import DenseGradients
from .dense_weight import DenseWeight
from .distributed import agreed, ranks, sharded
from .optimizer_checks import expect_elementwise, expect_optimizer, expect_slots, holds, inner_of
from .pattern_weight import PatternWeight
from .reminders import empty_rows, forget, listed, warn_of_empty_rows
from .trained_weight import TrainedWeight
from .uninterrupted import drawn_again, uninterrupted
from .views import Views
from .weights import dynamic_weights, is_frozen, trained_weights


class Engine:
    """Trains some weights of a model under one optimizer by one method. Made by `sten.sparsify` and `sten.attach`.

    The optimizer's hooks hold the engine, and so do its weights; it holds neither the model nor the optimizer.

    Attributes:
        step: optimizer steps done.
        updates: mask updates done.
        backward_passes: those of the last optimizer step; microbatches make several.
        deferred_update_step: the step of a mask update that could not happen when it was due; None: none is deferred.
        step_runs: whether the optimizer step in progress changes parameters (GradScaler skips some).
        weights: the TrainedWeights.
        optimizer: a weak reference to the optimizer whose steps call the engine.
        others: weak references to further optimizers that hold the weights (wrappers): their slots move, too.
        counted: the weight at which backward passes are counted.
    """

    def __init__(
        self,
        method: Sparsifier,
        weights: list[TrainedWeight],
        optimizer: Optimizer,
        allocation: Allocation | None,
        others: list[Optimizer] = (),
    ) -> None:
        expect(method, weights, optimizer)
        self.optimizer, self.others = weakref.ref(optimizer), [weakref.ref(other) for other in others]
        self.method, self.weights, self.allocation = method, weights, allocation
        self.generator = torch.Generator().manual_seed(method.seed + 1)
        self.step = self.updates = self.backward_passes = 0
        self.deferred_update_step: int | None = None
        self.gradients = DenseGradients(method, weights)
        self.step_runs = self.gradients_complete = False
        self.passes_so_far = 0
        self.counted: TrainedWeight | None = None
        self.slots_checked = False
        self.handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        for weight in weights:
            weight.engine = self
            can_warn = weight.layout.rows_may_be_empty
            weight.warned_of_empty_rows = can_warn and empty_rows(weight.active(), weight.layout) is not None
            self.gradients.read_averages(weight, weight.loaded_averages)
        self._read_counts(weights[0])
        with torch.no_grad():
            self.prepare_next()

    def _count_backward_passes(self) -> None:
        """Count them at the first weight that requires a gradient."""
        if self.counted is not None and not is_frozen(self.counted):
            return
        self._stop_counting()
        self.counted = next((weight for weight in self.weights if not is_frozen(weight)), None)
        if self.counted is not None:
            self.pass_counter = self.counted.param.register_post_accumulate_grad_hook(_counter(self))

    def _stop_counting(self) -> None:
        if self.counted is not None:
            self.pass_counter.remove()
            self.counted = None

    def acts_in(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimizer, or of one that it wraps, calls the engine."""
        return optimizer is self.optimizer() or ((inner := inner_of(optimizer)) is not None and self.acts_in(inner))

    def close(self, weights: list[TrainedWeight]) -> None:
        """Release these weights; with the last one the optimizer's hooks are removed."""
        for weight in weights:
            weight.write_run()
            weight.loaded_averages = self.gradients.averages_of(weight)
            weight.engine = None
        self.weights = [weight for weight in self.weights if weight.engine is self]
        self.gradients.drop(weights)
        self._stop_counting()
        if self.weights:
            with torch.no_grad():
                self.prepare_next()
        else:
            for handle in self.handles:
                handle.remove()

    # the state of a run

    def _read_counts(self, weight: TrainedWeight) -> None:
        if not self.method.stateless:
            for name, count in weight.read_run().items():
                setattr(self, name, count)
            self.generator.set_state(weight.run_generator.cpu())

    @torch.no_grad()
    def read_run(self, weight: TrainedWeight, averages: dict[str, Tensor]) -> None:
        """Take over the state of a run that a state dict gave this weight; all weights of an engine hold one count."""
        self._read_counts(weight)
        self.gradients.read_averages(weight, averages)
        self.prepare_next()

    # hooks

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict):
        self.step_runs = self.gradients_complete = False
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._prepare(optimizer)
            return None

        @functools.wraps(closure)
        def complete():
            loss = closure()
            if not self.gradients_complete:  # LBFGS calls its closure several times a step
                self._prepare(optimizer)
            return loss

        return ((args[0], complete, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": complete})

    @torch.no_grad()
    def _prepare(self, optimizer: Optimizer) -> None:
        """What happens before the step, when gradients are complete."""
        self.gradients_complete = True
        # A fused optimizer under GradScaler gets scaled gradients, and skips inside its step.
        found_inf, self.gradients.scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        self.step_runs = found_inf is None or not bool(found_inf)
        if not self.step_runs:
            return
        self.backward_passes, self.passes_so_far = self.passes_so_far, 0
        self._add_grads(self.gradients.scale)
        if self.method.optimizer is not None:
            masks = {
                weight.param: weight.packed(weight.active()) for weight in self.weights if weight.param is not None
            }
            optimizer.steer(masks, *self.method.strength(self.step))
        if "momentum" in self.method.needs:
            self.gradients.average(optimizer)
        if self.method.replaces_step and self.due(self.step + 1) and self._update(self.step + 1, optimizer):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.gradients.scale = None
        if not self.step_runs:
            return
        self.step_runs = False
        self.step += 1
        self._check_slots(optimizer)
        try:
            if not self.method.replaces_step and self.due(self.step):
                self.deferred_update_step = self.step + 1  # if it fails
                self._update(self.step, optimizer)
        finally:
            if getattr(self.method, "zero_pruned", False):
                for weight in self.weights:
                    if weight.param is not None:
                        weight.zero_pruned()
            self.prepare_next()

    def _check_slots(self, optimizer: Optimizer) -> None:
        """After the first step, which makes the optimizer's state: raise if mask updates cannot move it."""
        moves = self.method.schedule is not None and getattr(self.method, "zero_pruned", True)
        if moves and not self.slots_checked:
            for weight in self.weights:
                expect_slots(weight.name, weight.param, optimizer)
        self.slots_checked = True

    def _add_grads(self, scale: Tensor | None) -> None:
        """Add the method's term to the gradients of dense weights, multiplied by GradScaler's scale if they are."""
        if getattr(type(self.method), "grad", DenseWeightMethod.grad) is DenseWeightMethod.grad:
            return
        for weight in self.weights:
            grad = None if is_frozen(weight) else weight.param.grad
            term = None if grad is None else self.method.grad(weight.view(step=self.step + 1))
            if term is not None:
                grad.add_(weight.packed(term if scale is None else term * scale))

    def prepare_next(self) -> None:
        """Write the step count to dense weights, and collect dense gradients if a coming update reads them."""
        for weight in self.weights:
            if isinstance(weight, DenseWeight) and not self.method.stateless:
                weight.set_step(self.step)
        window = self.gradients.window
        if window:
            self._count_backward_passes()
        if window and any(self.due(self.step + i) for i in range(1, window + 1)):
            at_once = self.backward_passes == 1 and self.deferred_update_step is None
            self.gradients.open(self._decide if at_once else None)
        else:
            self.gradients.close()

    # mask updates

    def due(self, step: int) -> bool:
        """Whether a mask update happens at this step."""
        schedule = self.method.schedule
        return schedule is not None and (schedule.due(step) or step == self.deferred_update_step)

    @torch.no_grad()
    def _decide(self, weight: TrainedWeight, grad: Tensor) -> Edit:
        return self.method.update(weight.view(step=self.step + 1, grad=grad, generator=self.generator))

    def _update(self, step: int, optimizer: Optimizer) -> bool:
        """Decide, compute all changes, write all; False if nothing was written."""
        training = [weight for weight in self.weights if not is_frozen(weight) and holds(optimizer, weight.param)]
        obstacle = self.gradients.obstacle(training) if self.gradients.window and training else None
        if obstacle is not None:
            self.deferred_update_step = step + 1 if obstacle == "used twice" else None
        if obstacle == "not finite":
            warnings.warn(f"sten: a gradient is not finite: the mask update of step {step} is skipped.", stacklevel=5)
        if obstacle is not None:
            return False
        views = Views(self, step, optimizer, training)
        self._leave_out_missing(views)
        counts = self.method.allocate(views, self.allocation) if views.moving else None
        optimizers = [optimizer, *(other for ref in self.others if (other := ref()) is not None)]
        writes, empty = [], {}
        with drawn_again(self.generator):
            for weight in views.moving:
                count = None if counts is None else counts[weight.name]
                edit = self.gradients.edits.get(weight) or self.method.update(views.of(weight, count))
                self.gradients.release(weight)
                try:
                    edit = self._checked(edit, weight, count)
                    writes.append(weight.change(edit, *optimizers))
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{weight.name}: {self.method}: {error}") from error
                can_warn = edit.mask is not None and not weight.warned_of_empty_rows
                if can_warn and (rows := empty_rows(edit.mask, weight.layout)):
                    weight.warned_of_empty_rows, empty[weight.name] = True, rows
        if not writes:
            self.deferred_update_step = None
            return False
        averages = [(w, a, a.dense(a.param)) for w in views.moving for ref in w.averages if (a := ref()) is not None]
        with uninterrupted():
            for write in writes:
                write()
            for weight, average, dense in averages:
                average.follow(weight, dense)
            self.gradients.forget_averages()
            self.updates, self.deferred_update_step = self.updates + 1, None
        warn_of_empty_rows(empty, stacklevel=5 + self.method.replaces_step)
        return True

    def _leave_out_missing(self, views: Views) -> None:
        """Keep the masks of weights whose gradient, which the method reads, did not arrive; a warning names them."""
        edits = self.gradients.edits
        missing = [weight for weight in views.moving if weight not in edits and None in views.needed(weight).values()]
        views.moving = [weight for weight in views.moving if weight not in missing]
        if missing:
            names = listed([weight.name for weight in missing])
            text = f"no gradient reached {names} at the mask update of step {views.step}: the mask stays"
            warnings.warn(f"sten: {text}.", stacklevel=6 + self.method.replaces_step)

    def _checked(self, edit: Edit, weight: TrainedWeight, count: int | None) -> Edit:
        """An Edit that can be carried out, the same on every rank; TypeError or ValueError if it cannot."""
        check_edit(edit, weight.shape, weight.param.device, weight.state)
        if edit.mask is None:
            return edit
        # The mask of a dense weight is what will be stored only if entries off it are zero; and it is wider at first.
        if isinstance(weight, PatternWeight):
            check_mask(edit.mask, weight.layout, weight.sparsity if count is None else 1 - count / weight.size)
        elif self.method.zero_pruned:
            check_mask(edit.mask, weight.layout, None if count is None else 1 - count / weight.size)
        return edit if ranks() == 1 else dataclasses.replace(edit, mask=agreed(edit.mask))


def _counter(engine: Engine):
    """A hook that counts backward passes; the Parameter must not hold the engine."""
    weak = weakref.ref(engine)

    def count(param: Tensor) -> None:
        engine = weak()
        if engine is not None:
            engine.passes_so_far += 1

    return count


def expect(method: Sparsifier, weights: list[TrainedWeight], optimizer: Optimizer) -> None:
    """Raise TypeError or ValueError if this method cannot train these weights with this optimizer."""
    expect_optimizer(method, optimizer)
    expect_elementwise(optimizer)
    for weight in weights:
        if weight.engine is not None and weight.engine.acts_in(optimizer):
            raise ValueError(
                f"Expected a weight that is not attached yet, got {weight.name}, which is attached to this optimizer; "
                "call sten.attach once, or with another optimizer to move it there."
            )
        if sharded(weight.param) and isinstance(weight, PatternWeight):
            raise TypeError(
                f"Expected a whole parameter for {weight.name}, whose pattern FSDP cannot shard, got a DTensor: use "
                "DDP, or a method that trains a dense weight."
            )


def engines_of(model: nn.Module) -> list[Engine]:
    """The engines that train a model's weights, in the order of their weights."""
    return list({id(w.engine): w.engine for w in trained_weights(model) if w.engine is not None}.values())


def start(model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Make an engine for each method and optimizer of the model's unattached weights; all or nothing.

    Weights that are attached to another optimizer move, and their runs go on, if no weight is unattached. Of several
    optimizers that hold a weight (a wrapper and what it wraps) the first one calls the engine.
    """
    groups: dict[tuple[tuple[int, ...], Sparsifier], list[TrainedWeight]] = {}
    weights = dynamic_weights(model)
    for weight in [weight for weight in weights if weight.engine is None] or weights:
        having = tuple(i for i, optimizer in enumerate(optimizers) if holds(optimizer, weight.param))
        if having:
            groups.setdefault((having, weight.method), []).append(weight)
        elif weight.param.requires_grad:
            raise ValueError(
                f"Expected {weight.name} among the optimizer's parameters, got an optimizer without it: make it from "
                "model.parameters()."
            )
    for (having, method), members in groups.items():
        expect(method, members, optimizers[having[0]])
    for (having, method), members in groups.items():
        first, *others = (optimizers[i] for i in having)
        for old in {weight.engine for weight in members} - {None}:
            old.close([weight for weight in members if weight.engine is old])
        Engine(method, members, first, members[0].allocation, others)


def stop(model: nn.Module) -> None:
    """End the training of all weights of a model; a warning says so if a schedule has not reached its end."""
    for engine in engines_of(model):
        schedule = engine.method.schedule
        if schedule is not None and schedule.include_stop and engine.step < schedule.stop:
            kind, end = type(engine.method).__name__, f"ends at step {schedule.stop}, but training ended at"
            text = f"sten: {kind} {end} {engine.step}: the sparsity of sten.sparsify is not reached."
            warnings.warn(text, stacklevel=4)
    release(model)


def release(model: nn.Module) -> None:
    """Take all weights of a model from their engines."""
    weights = dynamic_weights(model)
    for weight in weights:
        forget(weight)
    for engine in engines_of(model):
        engine.close([weight for weight in weights if weight.engine is engine])
