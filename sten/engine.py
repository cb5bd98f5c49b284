"""Engine: acts on what sparsifiers decide, through the optimizer's public step hooks; the training loop stays as it is.

Around each optimizer step, in this order:

    before   gradients are complete: what the method adds to them; a tick that replaces the step
    after    a tick that follows the step; masks enforced; the next step prepared if it needs a dense gradient

A tick asks the method about every weight, computes every change, and only then writes: an error leaves all as it was. A
step that GradScaler skips neither ticks nor counts.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .allocation import Allocation
from .sparsifiers import DenseWeightMethod, Edit, Sparsifier, View
from .targets import Target
from .training.distributed import agreed, ranks, sharded
from .training.emptiness import can_empty, emptiness, say_empty
from .training.gather import Gather
from .training.idle import served
from .training.pattern import holders
from .training.site import Site

ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """Trains some weights of a model under one optimizer by one method. Made by `sten.sparsify` and `sten.attach`.

    Attributes:
        step: optimizer steps done.
        ticks: ticks done.
        sites: the weights.
    """

    def __init__(self, method: Sparsifier, sites: list[Site], optimizer: Optimizer, spread: Allocation | None) -> None:
        expect(method, sites, optimizer)
        self.method, self.sites, self.spread = method, sites, spread
        self.step = self.ticks = 0
        self.owed: int | None = None  # the step of a tick that could not happen when it was due
        self.generator = torch.Generator().manual_seed(method.seed + 1)
        self.gather = Gather(method, sites)
        self.running = self.prepared = False
        self.backwards = self.passes = 0
        self.handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        if self.gather.window:
            self.handles.append(sites[0].param.register_post_accumulate_grad_hook(_counter(self)))
        ENGINES.add(self)
        for site in sites:
            served(site.holder)
            site.warned = can_empty(site.holder.spec) and emptiness(site.mask, site.holder.spec) is not None
        with torch.no_grad():
            self.prepare_next()

    def close(self, sites: list[Site]) -> None:
        """Let go of these weights; the last one ends the engine."""
        self.sites = [site for site in self.sites if site not in sites]
        if not self.sites:
            self.gather.close()
            for handle in self.handles:
                handle.remove()
            ENGINES.discard(self)

    # hooks

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict):
        self.running = self.prepared = False
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._prepare(optimizer)
            return None

        @functools.wraps(closure)
        def complete():
            loss = closure()
            if not self.prepared:
                self._prepare(optimizer)
            return loss

        return ((args[0], complete, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": complete})

    @torch.no_grad()
    def _prepare(self, optimizer: Optimizer) -> None:
        """Gradients are complete."""
        self.prepared = True
        found = getattr(optimizer, "found_inf", None)  # a fused optimizer under GradScaler skips inside its step
        self.running = found is None or not bool(found)
        if not self.running:
            return
        self.passes, self.backwards = self.backwards, 0
        scale = getattr(optimizer, "grad_scale", None)
        self._add_grads(scale)
        if self.method.optimizer is not None:
            masks = {site.param: site.stored(site.mask, {}) for site in self.sites}
            optimizer.steer(masks, *self.method.strength(self.step))
        if "momentum" in self.method.needs:
            self.gather.average(optimizer)
        if self.method.replaces_step and self.due(self.step + 1) and self._tick(self.step + 1, optimizer):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if not self.running:
            return
        self.running = False
        self.step += 1
        if not self.method.replaces_step and self.due(self.step):
            self._tick(self.step, optimizer)
        if getattr(self.method, "zero_pruned", False):
            for site in self.sites:
                site.enforce()
        self.prepare_next()

    def _add_grads(self, scale: Tensor | None) -> None:
        """What the method adds to the masters' gradients; in the units that they have now."""
        if not isinstance(self.method, DenseWeightMethod) or type(self.method).grad is DenseWeightMethod.grad:
            return
        for site in self.sites:
            grad = site.param.grad
            more = None if grad is None else self.method.grad(site.view(step=self.step + 1))
            if more is not None:
                grad.add_(site.stored(more if scale is None else more * scale, {}))

    def prepare_next(self) -> None:
        """Tell the masters how many steps are done, and catch dense gradients if a coming tick wants them."""
        for site in self.sites:
            if site.master:
                site.holder.clock.fill_(self.step)
        if self.gather.window and any(self.due(self.step + i) for i in range(1, self.gather.window + 1)):
            self.gather.open(self._decide if self.passes == 1 and self.owed is None else None)
        else:
            self.gather.close()

    # ticks

    def due(self, step: int) -> bool:
        """Whether the method acts at this step."""
        schedule = self.method.schedule
        return schedule is not None and (schedule.due(step) or step == self.owed)

    @torch.no_grad()
    def _decide(self, site: Site, grad: Tensor) -> Edit:
        return self.method.update(site.view(step=self.step + 1, grad=grad, generator=self.generator))

    def _tick(self, step: int, optimizer: Optimizer) -> bool:
        """Ask, compute all, write all; False if nothing was written."""
        trouble = self.gather.trouble(self.sites[0].param.device) if self.gather.window else None
        self.owed = step + 1 if trouble == "late" else None
        if trouble == "infinite":
            warnings.warn(f"sten: a gradient is not finite: the tick of step {step} is skipped.", stacklevel=5)
        if trouble is not None:
            return False
        views = Views(self, step, optimizer)
        counts = self.method.allocate(views, self.spread)
        commits, empty = [], {}
        for site in self.sites:
            edit = self.gather.edits.get(site) or self._ask(views, site, counts)
            if edit is None:
                continue
            edit = checked(edit, site, self.method)
            commits.append(site.rewrite(edit, optimizer))
            if edit.mask is not None and not site.warned and (what := emptiness(edit.mask, site.holder.spec)):
                site.warned, empty[site.name] = True, what
        kept = [(site, twin, twin.spec.unpack(twin.parts, twin.shape)) for site in self.sites for twin in site.twins()]
        for commit in commits:
            commit()
        for site, twin, dense in kept:
            twin.follow(site.holder, dense)
        self.gather.forget()
        self.ticks += 1
        say_empty(empty, stacklevel=5 + self.method.replaces_step)
        return True

    def _ask(self, views: Views, site: Site, counts: dict[str, int] | None) -> Edit | None:
        view = views.of(site, None if counts is None else counts[site.name])
        needed = [getattr(view, name) for name in ("grad", "momentum") if name in self.method.needs]
        if any(x is None for x in needed):
            warnings.warn(
                f"sten: no gradient reached {site.name} on the tick of step {views.step}: its mask stays.", stacklevel=6
            )
            return None
        return self.method.update(view)


def _counter(engine: Engine):
    """A hook that counts backward passes, without keeping the engine alive as long as the model."""
    weak = weakref.ref(engine)

    def count(param: Tensor) -> None:
        engine = weak()
        if engine is not None:
            engine.backwards += 1

    return count


class Views(Mapping):
    """The Views of a tick by name, each made when it is read, so that one weight is dense at a time."""

    def __init__(self, engine: Engine, step: int, optimizer: Optimizer) -> None:
        self.engine, self.step, self.optimizer = engine, step, optimizer
        self.sites = {site.name: site for site in engine.sites}

    def of(self, site: Site, count: int | None = None) -> View:
        gather, needs = self.engine.gather, self.engine.method.needs
        more = {"sparsity": 1 - count / max(site.size, 1)} if count is not None else {}
        return site.view(
            step=self.step,
            generator=self.engine.generator,
            grad=gather.take(site, self.optimizer) if "grad" in needs else None,
            momentum=gather.momentum(site, self.optimizer) if "momentum" in needs else None,
            **more,
        )

    def __getitem__(self, name: str) -> View:
        return self.of(self.sites[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def checked(edit: Edit, site: Site, method: Sparsifier) -> Edit:
    """The same edit on every rank; TypeError if its masks are not bool."""
    for name in ("mask", "fresh"):
        given = getattr(edit, name)
        if given is not None and given.dtype != torch.bool:
            raise TypeError(f"{method} answered a {given.dtype} {name} for {site.name}: masks are bool.")
    if edit.mask is None or ranks() == 1:
        return edit
    return Edit(agreed(edit.mask), edit.value, edit.fresh, edit.state)


def expect_method(method: Sparsifier | None, targets: list[Target], optimizers: Iterable[Optimizer]) -> None:
    """Raise, in one sentence, if the method cannot train weights in these layouts, or not with these optimizers."""
    if method is not None and method.resizes and ranks() > 1:
        raise ValueError(
            f"{type(method).__name__} changes the shapes of its parameters, which DDP cannot follow: use sten.RigL."
        )
    for target in targets if method is not None else ():
        try:
            method.check(target.layout)
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
        if any(target.tensor is site.param for engine in ENGINES for site in engine.sites):
            raise ValueError(
                f"{target.name} is trained by an engine already: sten.finalize the model before a second one."
            )
    for optimizer in optimizers if method is not None else ():
        if method.optimizer not in (None, type(optimizer).__name__):
            kind = type(method).__name__
            raise TypeError(f"{kind} is defined for sten.optim.{method.optimizer}; got {type(optimizer).__name__}.")


def expect(method: Sparsifier, sites: list[Site], optimizer: Optimizer) -> None:
    """Raise TypeError or ValueError, in one sentence, if this method cannot train these weights with this optimizer."""
    expect_method(method, [], [optimizer])
    for site in sites:
        if any(site.param is other.param for engine in ENGINES for other in engine.sites):
            raise ValueError(
                f"{site.name} is trained by an engine already: sten.finalize the model before a second one."
            )
        if sharded(site.param) and not site.master:
            raise TypeError(
                f"{site.name} is compressed and cannot be sharded by FSDP: use DDP, or a method with a dense master."
            )


def sites_of(model: nn.Module) -> list[Site]:
    """The weights of a model under a dynamic method, each once."""
    found = {}
    for _, module, name, holder in holders(model):
        if holder.method is not None:
            found.setdefault(id(holder), Site(module, name, holder))
    return list(found.values())


def start(model: nn.Module, optimizers: list[Optimizer]) -> None:
    """An engine for each method and optimizer that the model's waiting weights ask for; all or nothing."""
    groups: dict[tuple[int, Sparsifier], list[Site]] = {}
    known = {id(site.holder) for engine in ENGINES for site in engine.sites}
    sites = sites_of(model)
    for site in [site for site in sites if id(site.holder) not in known] or sites:
        owner = next(
            (i for i, o in enumerate(optimizers) for g in o.param_groups for p in g["params"] if p is site.param), None
        )
        if owner is None and site.param.requires_grad:
            raise ValueError(
                f"{site.name} is not in the optimizer: make the optimizer from this model's parameters first."
            )
        if owner is not None:
            groups.setdefault((owner, site.about.sparsifier), []).append(site)
    for (owner, method), sites in groups.items():
        expect(method, sites, optimizers[owner])
    for (owner, method), sites in groups.items():
        Engine(method, sites, optimizers[owner], sites[0].about.spread)


def follow(average: nn.Module, model: nn.Module) -> nn.Module:
    """Keep a running average of a model's weights (`torch.optim.swa_utils.AveragedModel`, an EMA) in its patterns.

    Averages are taken slot by slot, so when a tick moves the pattern of a compressed weight, the average must move with
    it: entries that stay keep their average, new ones start at zero. Dense masters need no call.

    Args:
        average: a deep copy of the model, or a wrapper with one as its `module`; returned.
        model: the model that an engine trains.

    Raises:
        ValueError: `average` is no copy of the model.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> model = sten.sparsify(model, sten.CSR(), sten.SET(100, every=10), sparsity=0.75, optimizer=optimizer)
        >>> average = sten.follow(torch.optim.swa_utils.AveragedModel(model), model)
    """
    copy = average.module if isinstance(average, torch.optim.swa_utils.AveragedModel) else average
    twins = {site.name: site.holder for site in sites_of(copy)}
    ours = [site for engine in ENGINES for site in engine.sites if any(site.module is m for m in model.modules())]
    if not ours or any(site.name not in twins or twins[site.name] is site.holder for site in ours):
        raise ValueError("follow takes a deep copy of the model that an engine trains, or an AveragedModel of it.")
    for site in ours:
        if not site.master:
            site.copies.append(weakref.ref(twins[site.name]))
    return average


def stop(model: nn.Module) -> None:
    """End the training of all of a model's weights."""
    held = {id(site.holder) for site in sites_of(model) if served(site.holder) is None}
    for engine in list(ENGINES):
        plan, ours = engine.method.schedule, any(id(site.holder) in held for site in engine.sites)
        if ours and plan is not None and plan.include_stop and engine.step < plan.stop:
            kind, end = type(engine.method).__name__, f"ends at step {plan.stop}, but training ended at {engine.step}"
            warnings.warn(f"sten: {kind} {end}: the sparsity that was asked for is not reached.", stacklevel=4)
        engine.close([site for site in engine.sites if id(site.holder) in held])
