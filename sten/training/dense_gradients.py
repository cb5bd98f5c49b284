"""The dense gradients, or momenta, that a method reads at a mask update, of weights whose Parameter is a pattern.

In eager mode the operators that compute a weight's gradient at its pattern compute it once, dense, hand it over and
keep what lies in the pattern (`PatternCache.dense_gradient`). A compiled model sees a dense weight plus a zero `probe`
on those steps, and the gradient of the probe is the same thing. Either way nothing dense exists on other steps.

A method that needs "grad" gets that of the update's own step, summed over microbatches and averaged over ranks. One
that needs "momentum" gets the optimizer's average of the last WINDOW gradients (a factor 0.9 a step leaves 2 % of what
came before). Where only the order of |grad| matters and one backward pass makes a step, the decision falls as each
gradient arrives, and no two dense gradients exist at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _torch_private
from ..layouts.topk import widest_float
from ..sparsifiers import Edit, Sparsifier
from .dense_weight import DenseWeight
from .distributed import everywhere, mean, ranks
from .pattern_weight import PatternWeight
from .trained_weight import TrainedWeight

WINDOW = 40
AVERAGES = ("momentum_first", "momentum_second")


class Collector:
    """Sums the dense gradient of one weight over the microbatches of one optimizer step.

    Attributes:
        total: the sum so far, in float32 at least, in the orientation of the layout; None before the first delivery.
        deliveries: how many gradients arrived in this step.
    """

    def __init__(self, weight: PatternWeight, at_once: Callable[[Tensor], None] | None = None) -> None:
        """`at_once` takes a gradient instead of the sum: nothing dense is kept then (one delivery a step expected)."""
        self.weight, self.at_once = weight, at_once
        self.total: Tensor | None = None
        self.deliveries, self.task = 0, -1
        weight.cache.dense_gradient = self.deliver
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        weight.probe = weight.param.new_zeros(()).detach().expand(shape).requires_grad_()
        weight.probe.register_post_accumulate_grad_hook(_deliver_probe(self))

    def close(self) -> None:
        """Ordinary steps from now on."""
        self.weight.cache.dense_gradient = self.weight.probe = self.total = None

    def deliver(self, grad: Tensor) -> None:
        """Take a dense gradient. The first one after zero_grad() starts a new sum: a step that GradScaler skipped
        leaves one."""
        task = _torch_private.backward_pass()
        if self.weight.param.grad is None and task != self.task:
            self.total, self.deliveries = None, 0
        self.task = task
        self.add(grad)

    def add(self, grad: Tensor) -> None:
        self.deliveries += 1
        grad = grad.detach()
        if self.at_once is not None:
            self.at_once(grad)
            return
        grad = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
        self.total = grad if self.total is None else self.total + grad


def _deliver_probe(collector: Collector):
    """A hook of the probe that does not keep the collector alive."""
    weak = weakref.ref(collector)

    def deliver(probe: Tensor) -> None:
        grad, probe.grad = probe.grad, None
        collector = weak()
        if collector is not None:
            collector.add(grad.t() if collector.weight.transposed else grad)

    return deliver


class DenseGradients:
    """Collects on the steps before a mask update, and gives the method what was collected."""

    def __init__(self, method: Sparsifier, weights: list[TrainedWeight]) -> None:
        self.needs = method.needs & {"grad", "momentum"}
        self.by_order = method.ranks_only and method.replaces_step and "momentum" not in self.needs
        self.weights = [weight for weight in weights if isinstance(weight, PatternWeight)]
        self.window = 0 if not self.needs or not self.weights else WINDOW if "momentum" in self.needs else 1
        self.collectors: dict[TrainedWeight, Collector] = {}
        self.edits: dict[TrainedWeight, Edit] = {}
        self.first: dict[TrainedWeight, Tensor] = {}
        self.second: dict[TrainedWeight, Tensor] = {}
        self.gradients: dict[TrainedWeight, Tensor | None] = {}
        self.infinite: set[TrainedWeight] = set()

    def open(self, decide: Callable[[TrainedWeight, Tensor], Edit] | None = None) -> None:
        """Collect the gradients of the next step; with `decide(weight, grad) -> Edit` each is turned into an edit at
        once."""
        self.close()
        at_once = decide is not None and self.by_order and ranks() == 1
        for weight in self.weights:
            take = (lambda g, w=weight: self._at_once(w, g, decide)) if at_once else None
            self.collectors[weight] = Collector(weight, take)

    def close(self) -> None:
        for collector in self.collectors.values():
            collector.close()
        self.collectors, self.edits, self.gradients, self.infinite = {}, {}, {}, set()

    def forget_averages(self) -> None:
        """After a mask update: momenta of the old pattern are of no use."""
        self.first, self.second = {}, {}

    def averages_of(self, weight: TrainedWeight) -> dict[str, Tensor]:
        """The running averages, for a state dict."""
        pairs = zip(AVERAGES, (self.first, self.second), strict=True)
        return {key: sums[weight] for key, sums in pairs if weight in sums}

    def read_averages(self, weight: TrainedWeight, state: dict[str, Tensor]) -> None:
        """The inverse of `averages_of`."""
        for key, sums in zip(AVERAGES, (self.first, self.second), strict=True):
            sums.pop(weight, None)
            if key in state:
                sums[weight] = state[key].to(weight.param.device).clone()

    def _at_once(self, weight: TrainedWeight, grad: Tensor, decide) -> None:
        self.infinite.discard(weight)
        if finite(grad):
            self.edits[weight] = decide(weight, grad)
        else:
            self.infinite.add(weight)

    def gradient(self, weight: TrainedWeight) -> Tensor | None:
        """The unscaled gradient of this step, averaged over ranks; None if none came."""
        param = weight.param
        if isinstance(weight, DenseWeight):
            return None if param.grad is None else weight.dense(param.grad)
        if weight not in self.gradients:
            collector = self.collectors.get(weight)
            grad = None if collector is None else collector.total
            if grad is not None:
                collector.total = None
                grad = mean(grad) if ranks() > 1 else grad
                grad = grad * _unscale(weight, grad)
            self.gradients[weight] = grad
        return self.gradients[weight]

    def release(self, weight: TrainedWeight) -> None:
        """The gradient of this step is of no use any more."""
        self.gradients.pop(weight, None)

    def trouble(self, device: torch.device) -> str | None:
        """Why no mask update can happen now: "late" (comes one step later), "infinite", or None."""
        late = any(c.at_once is not None and c.deliveries != 1 for c in self.collectors.values())
        if everywhere(late, device):
            return "late"
        sums = [c.total for c in self.collectors.values() if c.total is not None]
        infinite = bool(self.infinite) or not all(finite(total) for total in sums)
        return "infinite" if everywhere(infinite, device) else None

    def average(self, optimizer: Optimizer) -> None:
        """Add this step's gradients to the momenta, by the rule of the optimizer."""
        for weight in self.collectors:
            grad = self.gradient(weight)
            if grad is None:
                continue
            group = next(g for g in optimizer.param_groups if any(p is weight.param for p in g["params"]))
            if "betas" not in group:
                _blend(self.first, weight, group.get("momentum", 0.0), 1.0, grad)
            else:
                _blend(self.first, weight, group["betas"][0], 1 - group["betas"][0], grad)
                _blend(self.second, weight, group["betas"][1], 1 - group["betas"][1], grad * grad)
            if "grad" not in self.needs:
                self.release(weight)

    def momentum(self, weight: TrainedWeight, optimizer: Optimizer) -> Tensor | None:
        """The direction of the optimizer at every entry: SGD's buffer, or Adam's m / (sqrt(v) + 1e-8)."""
        if isinstance(weight, DenseWeight):
            return weight.momentum(optimizer)
        first, second = self.first.get(weight), self.second.get(weight)
        return first if second is None else first / (second.sqrt() + 1e-8)


def _unscale(weight: PatternWeight, grad: Tensor) -> Tensor | float:
    """What turns the collected gradient into the optimizer's: GradScaler has divided the one that it knows."""
    if weight.param.grad is None:
        return 1.0
    exact = widest_float(grad.device)
    collected, known = weight.packed(grad).to(exact).norm(), weight.param.grad.to(exact).norm()
    return torch.where(collected > 0, known / collected, 1.0).to(grad.dtype)


def finite(t: Tensor) -> bool:
    """Whether all entries are; a sum is thirty times faster, and exact unless it overflows."""
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())


def _blend(sums: dict[TrainedWeight, Tensor], weight: TrainedWeight, old: float, new: float, grad: Tensor) -> None:
    sums[weight] = grad * new if weight not in sums else sums[weight].mul_(old).add_(grad, alpha=new)
