"""`check_sparsifier`: the laws of every method."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..conversion import finalize, sparsify
from ..layouts import CSR, NM
from ..layouts.base import Layout
from ..sparsifiers import ActivationMethod, Sparsifier
from ..training.engine import engines_of
from ..training.optim import AdamS
from ..training.pattern_weight import PatternWeight
from ..training.trained_weight import TrainedWeight, optimizer_slots
from .activations import CheckedSites, check_activations
from .layouts import claim

Run = tuple[nn.Module, Optimizer]


@dataclass(frozen=True)
class Checked:
    """What `check_sparsifier` checked."""

    sparsifier: Sparsifier
    layout: Layout
    sparsity: float | None
    steps: int
    updates: int
    resumed_at: tuple[int, ...]


def check_sparsifier(
    sparsifier: Sparsifier | ActivationMethod,
    layout: Layout | None = None,
    sparsity: float | None = None,
    steps: int = 12,
) -> Checked | CheckedSites:
    """Check the laws of training for a method on a small model, or those of a method for activations and gradients.

    Of a method for weights:

    - the method acts: some weight is sparse after `steps` steps;
    - masks are bool, and the count of active entries equals the budget after every mask update;
    - a mask update does not change active entries of a pattern, bit by bit; new ones are zero, slots too;
    - with `zero_pruned`, pruned entries are zero after every step;
    - k microbatches equal one batch, and a loss scale changes nothing;
    - a run that is resumed from saved state, at any step, ends in the same weights bit by bit;
    - the finalized model computes the same as the trained one with its last mask, and is stored in the layout.

    Of a method for activations, in training and evaluation, for odd numbers of tokens and none, and other dtypes:

    - the result is zero off a bool mask; the input is not changed; a decision depends on no more than `kind` says;
    - the gradient is that of its numbers, or goes straight through;
    - stored in a layout, results and gradients, of state too, are those of the dense tensor;
    - at every site its state is saved, loaded and copied with the module, and `sten.densify` takes it off.

    Args:
        sparsifier: an instance that acts within `steps` steps.
        layout: how weights are stored; default CSR, or NM(2, 4) for a method that refuses CSR. Of activations: the
            only layout to try; default Masked, CSR and FanIn, which hold any mask.
        sparsity: default 0.75, none for a layout with a rate.
        steps: optimizer steps of each run.

    Raises:
        AssertionError: the law that does not hold.

    Example:
        >>> import sten
        >>> sten.testing.check_sparsifier(sten.RigL(total_steps=12, every=3)).updates
        3
    """
    if isinstance(sparsifier, ActivationMethod):
        return check_activations(sparsifier, layout)
    layout = layout if layout is not None else _default(sparsifier)
    sparsity = sparsity if sparsity is not None or layout.rate is not None else 0.75
    check = _Check(sparsifier, layout, sparsity, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty rows and reference kernels
        updates = check.updates()
        check.same("k microbatches must equal one batch (is a term added once a backward pass?)", check.run(parts=4))
        check.same("a loss scale must change nothing (is a term added to scaled gradients?)", check.run(scale=2.0**8))
        resumed_at = check.resume()
        check.end()
    return Checked(sparsifier, layout, sparsity, steps, updates, resumed_at)


def _default(sparsifier: Sparsifier) -> Layout:
    try:
        sparsifier.check(CSR())
    except ValueError:
        return NM(2, 4)
    return CSR()


class _Check:
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

    def updates(self) -> int:
        """Check count, active and new entries at every step; returns the number of mask updates."""
        run = self.start()
        engines = engines_of(run[0])
        weights = [weight for engine in engines for weight in engine.weights]
        total = self._count(weights)
        for step in range(self.steps):
            due = bool(engines) and engines[0].due(engines[0].step + 1)
            before = [self._entries(weight, run[1]) for weight in weights]
            self.go(run, step, step + 1)
            for weight, old in zip(weights, before, strict=True):
                self._after(weight, old, run[1], due and self.method.replaces_step)
            now = self._count(weights)
            # Rows of equal fan-in omit the remainder of a division.
            slack = sum(weight.shape[0] for weight in weights) if self.method.resizes else 0
            claim(
                abs(now - total) <= slack,
                f"the count must equal the budget after every mask update: {total}, not {now}",
            )
        done = sum(engine.updates for engine in engines)
        claim(
            self.method.schedule is None or done > 0,
            f"{self.method} must act within {self.steps} steps: give it a shorter schedule",
        )
        self._acted(run[0])
        return done

    def _count(self, weights: list[TrainedWeight]) -> int:
        return sum(int(weight.active().sum()) for weight in weights if isinstance(weight, PatternWeight))

    def _acted(self, model: nn.Module) -> None:
        """Some weight is sparse."""
        stored = [layer.weight_pattern.tensor() for layer in model if isinstance(layer, nn.Linear)]
        claim(
            any(w.density < 1 for w in stored),
            f"{self.method} never acted: every weight would be stored dense after {self.steps} steps",
        )

    def _entries(self, weight: TrainedWeight, optimizer: Optimizer) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        slots = {k: weight.dense(slot).clone() for k, slot in optimizer_slots(weight.param, optimizer).items()}
        return weight.dense(weight.param).clone(), weight.active().clone(), slots

    def _after(self, weight: TrainedWeight, old, optimizer: Optimizer, replaced: bool) -> None:
        (was, mask, slots), (now, new, new_slots) = old, self._entries(weight, optimizer)
        claim(new.dtype == torch.bool, f"the mask of {weight.name} must be bool; got {new.dtype}")
        pattern = isinstance(weight, PatternWeight)
        if pattern or self.method.zero_pruned:
            claim(not now[~new].any(), f"entries of {weight.name} off the mask must be zero")
            grown = new & ~mask
            claim(not now[grown].any(), f"new entries of {weight.name} must start at zero")
            claim(
                not any(s[grown].any() for s in new_slots.values()),
                f"new entries of {weight.name} must have empty optimizer slots",
            )
        if replaced and pattern:
            both = mask & new
            claim(
                torch.equal(was[both], now[both]),
                f"active entries of {weight.name} must not change in an update that replaces the step",
            )
            claim(
                all(torch.equal(slots[k][both], new_slots[k][both]) for k in slots),
                f"optimizer slots of active entries of {weight.name} must not change",
            )

    def resume(self) -> tuple[int, ...]:
        stops = tuple(sorted({1, self.steps // 2, self.steps - 1}))
        for stop in stops:
            first = self.start()
            self.go(first, 0, stop)
            file = io.BytesIO()
            torch.save([first[0].state_dict(), first[1].state_dict()], file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            second = self.start()
            second[0].load_state_dict(saved[0])
            second[1].load_state_dict(saved[1])
            self.go(second, stop, self.steps)
            self.same(
                f"a run resumed at step {stop} must end in the same weights bit by bit (is state outside init()?)",
                second,
                exact=True,
            )
        return stops

    def end(self) -> None:
        model, _ = self.run()
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        last = [layer.weight_pattern.tensor().to_dense() for layer in layers]
        finalize(model)
        for layer, want in zip(layers, last, strict=True):
            claim(layer.weight.sparse_layout == self.layout, f"the finalized weight must be stored in {self.layout}")
            claim(
                torch.equal(layer.weight.to_dense(), want),
                "the finalized weight must be the trained one in its last mask",
            )
