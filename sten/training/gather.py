"""Gather: the dense gradients, or momenta, that a method reads on its ticks, for weights that are compressed.

A method that needs "grad" gets that of the tick's own step, summed over microbatches and averaged over ranks. One that
needs "momentum" gets the optimizer's average of the last WINDOW gradients (a factor 0.9 a step leaves 2 % of what came
before). Where only the order of |grad| matters and one backward pass makes a step, the decision falls as each gradient
arrives, and no two dense gradients exist at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sparsifiers import Edit, Sparsifier
from .distributed import everywhere, mean, ranks
from .site import Site
from .tap import Tap

WINDOW = 40


class Gather:
    """Taps the weights on the steps before a tick, and answers with what they caught."""

    def __init__(self, method: Sparsifier, sites: list[Site]) -> None:
        self.needs = method.needs & {"grad", "momentum"}
        self.ranks_only = method.ranks_only and method.replaces_step
        self.sites = [site for site in sites if not site.master]
        self.window = 0 if not self.needs or not self.sites else WINDOW if "momentum" in self.needs else 1
        self.taps: dict[Site, Tap] = {}
        self.edits: dict[Site, Edit] = {}
        self.first: dict[Site, Tensor] = {}
        self.second: dict[Site, Tensor] = {}
        self.infinite: set[Site] = set()

    def open(self, decide=None) -> None:
        """Catch the gradients of the next step; with `decide(site, grad) -> Edit` each is turned into an edit at
        once."""
        self.close()
        at_once = decide is not None and self.ranks_only and ranks() == 1
        for site in self.sites:
            self.taps[site] = Tap(site.holder, (lambda g, s=site: self._at_once(s, g, decide)) if at_once else None)

    def close(self) -> None:
        for tap in self.taps.values():
            tap.close()
        self.taps, self.edits, self.infinite = {}, {}, set()

    def forget(self) -> None:
        """After a tick: momenta of the old pattern are of no use."""
        self.first, self.second = {}, {}

    def _at_once(self, site: Site, grad: Tensor, decide) -> None:
        self.infinite.discard(site)
        if finite(grad):
            self.edits[site] = decide(site, grad)
        else:
            self.infinite.add(site)

    def take(self, site: Site, optimizer: Optimizer) -> Tensor | None:
        """The unscaled gradient of this step, averaged over ranks; None if none came."""
        if site.master:
            return None if site.param.grad is None else site.dense(site.param.grad)
        tap = self.taps.get(site)
        if tap is None or tap.total is None:
            return None
        grad = mean(tap.total) if ranks() > 1 else tap.total
        tap.total = None
        return grad * self._unscale(site, grad)

    @staticmethod
    def _unscale(site: Site, grad: Tensor) -> Tensor | float:
        """What turns the caught gradient into the optimizer's: GradScaler has divided the one that it knows."""
        if site.param.grad is None:
            return 1.0
        caught = site.stored(grad, site.holder.parts).double().norm()
        known = site.param.grad.double().norm()
        return torch.where(caught > 0, known / caught, 1.0).to(grad.dtype)

    def trouble(self, device: torch.device) -> str | None:
        """Why no tick can happen now: "late" (comes one step later), "infinite", or None."""
        late = any(tap.at_once is not None and tap.deliveries != 1 for tap in self.taps.values())
        if everywhere(late, device):
            return "late"
        sums = [tap.total for tap in self.taps.values() if tap.total is not None]
        infinite = bool(self.infinite) or not all(finite(total) for total in sums)
        return "infinite" if everywhere(infinite, device) else None

    def average(self, optimizer: Optimizer) -> None:
        """Add this step's gradients to the momenta, by the rule of the optimizer."""
        for site in self.taps:
            grad = self.take(site, optimizer)
            if grad is None:
                continue
            group = next(g for g in optimizer.param_groups if any(p is site.param for p in g["params"]))
            if "betas" not in group:
                _blend(self.first, site, group.get("momentum", 0.0), 1.0, grad)
                continue
            _blend(self.first, site, group["betas"][0], 1 - group["betas"][0], grad)
            _blend(self.second, site, group["betas"][1], 1 - group["betas"][1], grad * grad)

    def momentum(self, site: Site, optimizer: Optimizer) -> Tensor | None:
        """The direction of the optimizer at every entry: SGD's buffer, or Adam's m / (sqrt(v) + 1e-8)."""
        if site.master:
            return site.momentum(optimizer)
        first, second = self.first.get(site), self.second.get(site)
        return first if second is None else first / (second.sqrt() + 1e-8)


def finite(t: Tensor) -> bool:
    """Whether all entries are; a sum is thirty times faster, and exact unless it overflows."""
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())


def _blend(sums: dict[Site, Tensor], site: Site, old: float, new: float, grad: Tensor) -> None:
    sums[site] = grad * new if site not in sums else sums[site].mul_(old).add_(grad, alpha=new)
