"""check_sparsifier: what every method must keep to, whatever it decides."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..convert import finalize, sparsify
from ..layout import Layout
from ..layouts import CSR, NM
from ..optim import AdamS
from ..sparsifiers import Sparsifier
from ..training.resume import engines_of, load_state_dict, state_dict
from ..training.site import Site

Run = tuple[nn.Module, Optimizer]


def check_sparsifier(
    sparsifier: Sparsifier, layout: Layout | None = None, sparsity: float | None = None, steps: int = 12
) -> None:
    """Test on a small model that a method keeps the laws of training; AssertionError names the one that does not hold.

    - masks are bool, and as many entries live after every tick as the budget says;
    - a tick leaves kept entries of a compressed weight as they are, bit by bit; new ones are zero, in every optimizer
    slot too;
    - entries off a hard mask are zero after every step;
    - k microbatches equal one batch, and a loss scale changes nothing;
    - a run taken up from saved state, at any step, ends in the same weights bit by bit;
    - the finalized model computes what the trained one did with its last mask, and is stored in the layout.

    Args:
        sparsifier: an instance that acts within `steps` steps.
        layout: how weights are stored; default CSR, or NM(2, 4) for a dense master that no CSR can hold.
        sparsity: default 0.75, none for a layout with a rate.
        steps: optimizer steps of each run.

    Example:
        >>> import sten
        >>> sten.testing.check_sparsifier(sten.RigL(total_steps=12, every=3))
    """
    layout = layout if layout is not None else _default(sparsifier)
    sparsity = sparsity if sparsity is not None or layout.rate is not None else 0.75
    kit = _Kit(sparsifier, layout, sparsity, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # empty rows, reference kernels: not what is tested here
        kit.ticks()
        kit.same("k microbatches must equal one batch (is something added once a backward pass?)", kit.run(parts=4))
        kit.same("a loss scale must change nothing (is something added to scaled gradients?)", kit.run(scale=2.0**8))
        kit.resume()
        kit.end()


def _default(sparsifier: Sparsifier) -> Layout:
    try:
        sparsifier.check(CSR())
    except ValueError:
        return NM(2, 4)
    return CSR()


def claim(holds: bool, law: str) -> None:
    if not holds:
        raise AssertionError(law)


class _Kit:
    """One method, one layout, and runs that must agree."""

    def __init__(self, method: Sparsifier, layout: Layout, sparsity: float | None, steps: int) -> None:
        self.method, self.layout, self.sparsity, self.steps = method, layout, sparsity, steps

    def start(self) -> Run:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).double()
        kind = AdamS if self.method.optimizer == "AdamS" else torch.optim.Adam
        optimizer = kind(model.parameters(), lr=1e-2)
        sparsify(model, self.layout, self.method, self.sparsity, optimizer=optimizer)
        return model, optimizer

    def go(
        self,
        run: Run,
        first: int,
        last: int,
        parts: int = 1,
        scale: float | None = None,
        after: Callable = lambda: None,
    ) -> None:
        model, optimizer = run
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(first, last):
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            y = x[:, :8].argmax(1)
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                scaler.scale(F.cross_entropy(model(xs), ys) / parts).backward()
            scaler.step(optimizer)
            scaler.update()
            after()

    def run(self, **how) -> Run:
        run = self.start()
        self.go(run, 0, self.steps, **how)
        return run

    def weights(self, run: Run) -> list[Tensor]:
        return [layer.weight.to_dense().detach() for layer in run[0] if isinstance(layer, nn.Linear)]

    def same(self, law: str, run: Run, exact: bool = False) -> None:
        close = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-7, atol=1e-9)
        pairs = zip(self.weights(run), self.weights(self.run()), strict=True)
        claim(all(close(a, b) for a, b in pairs), law)

    def ticks(self) -> None:
        """Count, kept and new entries around every step."""
        run = self.start()
        engines = engines_of(run[0])
        sites = [site for engine in engines for site in engine.sites]
        total, done = sum(int(site.mask.sum()) for site in sites if not site.master), 0
        for step in range(self.steps):
            if engines:
                trial = self._next_ticks(engines[0].step + 1)
                before = [self._entries(site, run[1]) for site in sites]
                self.go(run, step, step + 1)
                for site, old in zip(sites, before, strict=True):
                    self._after(site, old, run[1], trial and self.method.replaces_step)
                now = sum(int(site.mask.sum()) for site in sites if not site.master)
                # a constant fan-in leaves the remainder of a division out
                slack = sum(site.holder.shape[0] for site in sites) if self.method.resizes else 0
                claim(
                    abs(now - total) <= slack, f"the count must equal the budget after every tick: {total}, not {now}"
                )
                done = engines[0].ticks
            else:
                self.go(run, step, step + 1)
        claim(
            self.method.schedule is None or done > 0,
            f"{self.method} must act within {self.steps} steps: give it a shorter schedule",
        )

    def _next_ticks(self, step: int) -> bool:
        return self.method.schedule is not None and self.method.schedule.due(step)

    def _entries(self, site: Site, optimizer: Optimizer) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        slots = {key: site.dense(slot).clone() for key, slot in site.slots(optimizer)}
        return site.dense(site.param).clone(), None if site.mask is None else site.mask.clone(), slots

    def _after(self, site: Site, old, optimizer: Optimizer, replaced: bool) -> None:
        (was, mask, slots), (now, new, new_slots) = old, self._entries(site, optimizer)
        claim(
            new is None or new.dtype == torch.bool,
            f"the mask of {site.name} must be bool; got {None if new is None else new.dtype}",
        )
        if new is not None and (site.zero_pruned or not site.master):
            claim(not now[~new].any(), f"entries of {site.name} off the mask must be zero")
            grown = new & ~mask
            claim(not now[grown].any(), f"new entries of {site.name} must start at zero")
            claim(
                not any(s[grown].any() for s in new_slots.values()),
                f"new entries of {site.name} must have empty optimizer slots",
            )
        if replaced and not site.master:
            both = mask & new
            claim(
                torch.equal(was[both], now[both]),
                f"kept entries of {site.name} must not change in a tick that replaces the step",
            )
            claim(
                all(torch.equal(slots[k][both], new_slots[k][both]) for k in slots),
                f"optimizer slots of kept entries of {site.name} must not change",
            )

    def resume(self) -> None:
        for stop in {1, self.steps // 2, self.steps - 1}:
            first = self.start()
            self.go(first, 0, stop)
            file = io.BytesIO()
            torch.save([first[0].state_dict(), first[1].state_dict(), state_dict(first[0])], file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            second = self.start()
            second[0].load_state_dict(saved[0])
            second[1].load_state_dict(saved[1])
            load_state_dict(second[0], saved[2])
            self.go(second, stop, self.steps)
            self.same(
                f"a run resumed at step {stop} must end in the same weights bit by bit (is state kept outside init()?)",
                second,
                exact=True,
            )

    def end(self) -> None:
        model, _ = self.run()
        held = [layer for layer in model if isinstance(layer, nn.Linear)]
        last = [layer.sparse_weight.tensor(layer._parameters["weight"]).to_dense() for layer in held]
        finalize(model)
        for layer, want in zip(held, last, strict=True):
            claim(layer.weight.spec == self.layout, f"the finalized weight must be stored in {self.layout}")
            claim(
                torch.equal(layer.weight.to_dense(), want),
                "the finalized weight must be the trained one in its last mask",
            )
