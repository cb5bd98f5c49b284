"""AdamS, the optimizer of CAST: Adam whose denominator sees an L1 decay of what a mask prunes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class AdamS(Optimizer):
    """Adam with selective, adaptive L1 decay. A parameter without a mask is trained by Adam.

    Where the mask is True u = m, elsewhere u = (1 - a) * m + a * decay * sign(w); then

        m = beta1 * m + (1 - beta1) * g            (the raw gradient alone)
        v = beta2 * v + (1 - beta2) * u**2
        w = w - lr * (u / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    The engine gives it the masks, the decay and the ramp a = t / total_steps (`sten.CAST`).

    Args:
        params: tensors or parameter groups.
        lr, betas, eps: as in Adam.

    Source: https://arxiv.org/abs/2509.25996, algorithm 1, read through a reproduction's citations; default betas
    and eps are Adam's.

    Example:
        >>> import torch, sten
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = sten.optim.AdamS([w], lr=0.1)
        >>> w.sum().backward()
        >>> optimizer.step()
        >>> [round(x, 4) for x in w.tolist()]
        [0.9, 1.9]
    """

    def __init__(
        self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        if not lr >= 0 or not eps >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Expected lr >= 0, eps >= 0 and betas in [0, 1) for AdamS, got {lr}, {eps}, {betas}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self.steer({}, 0.0, 0.0)

    def __setstate__(self, state: dict) -> None:
        """A copy or a pickle has no masks: an engine sets them before each step."""
        super().__setstate__(state)
        self.steer({}, 0.0, 0.0)

    def steer(self, masks: dict[Tensor, Tensor], decay: float, ramp: float) -> None:
        """Set the masks (bool, by parameter), the decay and the ramp of the next step; the engine calls it."""
        if any(mask.dtype != torch.bool for mask in masks.values()):
            raise TypeError("Expected bool masks for AdamS, where True is an active entry; compare with zero first.")
        self.masks, self.decay, self.ramp = masks, decay, ramp

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, w: Tensor, group: dict) -> None:
        state = self.state[w]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(w), torch.zeros_like(w)
        state["step"] += 1
        t, (beta1, beta2) = float(state["step"]), group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(w.grad, 1 - beta1)
        mask = self.masks.get(w)
        u = m if mask is None else torch.where(mask, m, (1 - self.ramp) * m + self.ramp * self.decay * w.sign())
        squared = w.grad if mask is None else u
        v.mul_(beta2).addcmul_(squared, squared, value=1 - beta2)
        w.addcdiv_(u, (v / (1 - beta2**t)).sqrt_().add_(group["eps"]), value=-group["lr"] / (1 - beta1**t))
