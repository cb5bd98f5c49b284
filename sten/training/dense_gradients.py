"""The dense gradients, or momenta, that a method reads at a mask update, of weights whose Parameter is a pattern.

In eager mode the operators that compute a weight's gradient at its pattern compute it once, dense, pass it on
(`PatternCache.dense_gradient`) and return its entries in the pattern. A compiled model computes with a dense weight
plus a zero `probe` on those steps, and the probe's gradient is the dense gradient. Other steps make nothing dense.

A method that needs "grad" gets that of the update's own step, summed over microbatches and averaged over ranks. One
that needs "momentum" gets the optimizer's average of the last WINDOW gradients (a factor 0.9 a step leaves 2 % of
earlier ones). Where only the order of |grad| matters and one backward pass makes a step, each mask is decided as its
gradient arrives, and no two dense gradients exist at a time.

States of a weight's Collector:

    state       collector   what a backward pass does
    closed      none        computes the gradient at the pattern only
    empty       open        the first gradient starts a sum
    collecting  open        another use in the same pass, or a microbatch, adds to the sum
    collected   open        `gradient` took the sum; the mask update follows, then `close`
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
from .run_problems import AVERAGES
from .trained_weight import TrainedWeight

WINDOW = 40


class Collector:
    """Sums the dense gradient of one weight over the microbatches of one optimizer step.

    Attributes:
        total: the sum so far, in float32 at least, in the orientation of the layout; None before the first gradient.
        count: how many gradients arrived in this step.
    """

    def __init__(self, weight: PatternWeight, at_once: Callable[[Tensor], None] | None = None) -> None:
        """`at_once` gets each gradient in place of the sum, so that nothing dense is stored (one a step expected)."""
        self.weight, self.at_once = weight, at_once
        self.total: Tensor | None = None
        self.count, self.backward_pass = 0, -1
        weight.cache.dense_gradient = self.collect
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        weight.probe = weight.param.new_zeros(()).detach().expand(shape).requires_grad_()
        weight.probe.register_post_accumulate_grad_hook(_collect_from_probe(self))

    def close(self) -> None:
        """Nothing dense is computed from now on."""
        self.weight.cache.dense_gradient = self.weight.probe = self.total = None

    def collect(self, grad: Tensor) -> None:
        """Add a dense gradient to the sum. The first one after zero_grad() starts a new sum."""
        current = _torch_private.backward_pass()
        if self.count and current != self.backward_pass and self._after_zero_grad():
            self.total, self.count = None, 0
        self.backward_pass = current
        self.count += 1
        grad = grad.detach()
        if self.at_once is not None:
            self.at_once(grad)
            return
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        self.total = grad if self.total is None else self.total + grad

    def _after_zero_grad(self) -> bool:
        """Whether the sum so far is of an earlier step, which GradScaler skipped, not of an earlier microbatch."""
        grad = self.weight.param.grad
        return grad is None or not bool(grad.any())


def _collect_from_probe(collector: Collector):
    """A hook of the probe, which must not hold the collector."""
    weak = weakref.ref(collector)

    def collect(probe: Tensor) -> None:
        grad, probe.grad = probe.grad, None
        collector = weak()
        if collector is not None:
            collector.collect(grad.t() if collector.weight.transposed else grad)

    return collect


class DenseGradients:
    """Collects on the steps before a mask update, and gives the method the result.

    Attributes:
        window: how many steps before a mask update gradients are collected; 0: the method reads none.
        scale: GradScaler's scale, while gradients of a fused optimizer are multiplied by it.
        edits: the decisions that were made in the backward pass.
    """

    def __init__(self, method: Sparsifier, weights: list[TrainedWeight]) -> None:
        self.needs = method.needs & {"grad", "momentum"}
        self.in_backward = method.ranks_only and method.replaces_step and "momentum" not in self.needs
        self.weights = [weight for weight in weights if isinstance(weight, PatternWeight)]
        self.window = 0 if not self.needs or not self.weights else WINDOW if "momentum" in self.needs else 1
        self.collectors: dict[TrainedWeight, Collector] = {}
        self.edits: dict[TrainedWeight, Edit] = {}
        self.first: dict[TrainedWeight, Tensor] = {}
        self.second: dict[TrainedWeight, Tensor] = {}
        self.gradients: dict[TrainedWeight, Tensor | None] = {}
        self.not_finite: set[TrainedWeight] = set()
        self.scale: Tensor | None = None

    def open(self, decide: Callable[[TrainedWeight, Tensor], Edit] | None = None) -> None:
        """Collect the gradients of the next step; `decide(weight, grad) -> Edit` is called as each arrives."""
        self.close()
        in_backward = decide is not None and self.in_backward and ranks() == 1
        for weight in self.weights:
            if weight.param is None:  # its module exists no more
                continue
            at_once = (lambda g, w=weight: self._at_once(w, g, decide)) if in_backward else None
            self.collectors[weight] = Collector(weight, at_once)

    def close(self) -> None:
        for collector in self.collectors.values():
            collector.close()
        self.collectors, self.edits, self.gradients, self.not_finite = {}, {}, {}, set()

    def drop(self, weights: list[TrainedWeight]) -> None:
        """Collect nothing for these weights any more."""
        self.close()
        self.weights = [weight for weight in self.weights if weight not in weights]
        for weight in weights:
            self.read_averages(weight, {})

    def forget_averages(self) -> None:
        """Start the momenta anew after a mask update, which moved the pattern."""
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
        self.not_finite.discard(weight)
        if finite(grad):
            self.edits[weight] = decide(weight, grad)
        else:
            self.not_finite.add(weight)

    def gradient(self, weight: TrainedWeight) -> Tensor | None:
        """The unscaled gradient of this step, averaged over ranks; None if no rank has one."""
        if isinstance(weight, DenseWeight):
            grad = weight.param.grad
            return None if grad is None else self._unscaled(weight.dense(grad))
        if weight not in self.gradients:
            grad = self._collected(weight)
            self.gradients[weight] = None if grad is None else self._unscaled(grad * _ratio(weight, grad))
        return self.gradients[weight]

    def _collected(self, weight: PatternWeight) -> Tensor | None:
        """The sum of this step, averaged over ranks; a rank on which the weight was not used counts as zero."""
        collector, param = self.collectors.get(weight), weight.param
        grad = None if collector is None else collector.total
        if ranks() == 1 or not everywhere(grad is not None, param.device):
            total = grad
        else:
            dtype = torch.promote_types(param.dtype, torch.float32)
            total = mean(torch.zeros(weight.shape, dtype=dtype, device=param.device) if grad is None else grad)
        if collector is not None:
            collector.total = None
        return total

    def _unscaled(self, grad: Tensor) -> Tensor:
        return grad if self.scale is None else grad / self.scale.to(grad.device, grad.dtype)

    def release(self, weight: TrainedWeight) -> None:
        """Free the gradient of this step."""
        self.gradients.pop(weight, None)

    def obstacle(self, training: list[TrainedWeight]) -> str | None:
        """Why no mask of these weights can be updated now: "used twice" (a step later it can), "not finite", None."""
        device = training[0].param.device
        collectors = [c for weight, c in self.collectors.items() if weight in training]
        if everywhere(any(c.at_once is not None and c.count != 1 for c in collectors), device):
            return "used twice"
        sums = [c.total for c in collectors if c.total is not None]
        not_finite = any(w in training for w in self.not_finite) or not all(finite(total) for total in sums)
        return "not finite" if everywhere(not_finite, device) else None

    def average(self, optimizer: Optimizer) -> None:
        """Add this step's gradients to the momenta, by the rule of the optimizer."""
        for weight in self.collectors:
            grad = self.gradient(weight)
            if grad is None:
                continue
            groups = [g for g in optimizer.param_groups if any(p is weight.param for p in g["params"])]
            if not groups:  # taken out of the optimizer: frozen
                continue
            group = groups[0]
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


def _ratio(weight: PatternWeight, grad: Tensor) -> Tensor | float:
    """The factor from the collected gradient to the optimizer's, which GradScaler and clipping have multiplied."""
    if weight.param.grad is None:
        return 1.0
    exact = widest_float(grad.device)
    collected, optimizers = weight.packed(grad).to(exact).norm(), weight.param.grad.to(exact).norm()
    return torch.where(collected > 0, optimizers / collected, 1.0).to(grad.dtype)


def finite(t: Tensor) -> bool:
    """Whether all entries are finite; a sum is thirty times faster, and it tells unless it overflows."""
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())


def _blend(sums: dict[TrainedWeight, Tensor], weight: TrainedWeight, old: float, new: float, grad: Tensor) -> None:
    sums[weight] = grad * new if weight not in sums else sums[weight].mul_(old).add_(grad, alpha=new)
