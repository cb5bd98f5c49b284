"""The dense gradient of a weight whose Parameter is compressed, for the steps on which a method asks for it.

In eager mode the operators that compute a weight's gradient at its pattern are tapped: they compute it once, dense,
hand it over and keep what lies in the pattern. A compiled model sees a dense weight plus a zero `probe` on those steps,
and the gradient of the probe is the same thing. Either way nothing dense exists on other steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .pattern import SparseWeight


class Tap:
    """Sums the dense gradient of one weight over the microbatches of one optimizer step.

    Attributes:
        total: the sum so far, in float32 at least, in the orientation of the layout; None before the first delivery.
        deliveries: how many gradients arrived in this step.
    """

    def __init__(self, holder: SparseWeight, at_once: Callable[[Tensor], None] | None = None) -> None:
        """`at_once` takes a gradient instead of the sum: nothing dense is kept then (one delivery a step expected)."""
        self.holder, self.at_once = holder, at_once
        self.total: Tensor | None = None
        self.deliveries, self.task = 0, -1
        holder.cache.dense_gradient = self.deliver
        zero = holder.values.new_zeros(()).detach()
        shape = holder.shape[::-1] if holder.transposed else holder.shape
        holder.probe = zero.expand(shape).requires_grad_()
        holder.probe.register_post_accumulate_grad_hook(self._from_probe)

    def close(self) -> None:
        """Ordinary steps from now on."""
        self.holder.cache.dense_gradient = None
        self.holder.probe, self.total = None, None

    def deliver(self, grad: Tensor) -> None:
        """Take a dense gradient. The first one after zero_grad() starts a new sum: a step that GradScaler skipped
        leaves one."""
        task = torch._C._current_graph_task_id()
        if self.holder.values.grad is None and task != self.task:
            self.total, self.deliveries = None, 0
        self.task = task
        self.add(grad)

    def add(self, grad: Tensor) -> None:
        self.deliveries += 1
        grad = grad.detach()
        if self.at_once is not None:
            return self.at_once(grad)
        grad = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
        self.total = grad if self.total is None else self.total + grad
        return None

    def _from_probe(self, probe: Tensor) -> None:
        grad, probe.grad = probe.grad, None
        self.add(grad.t() if self.holder.transposed else grad)
