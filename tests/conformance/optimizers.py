"""The optimizers of optim_db, with their schedulers: four steps on sparse weights against their dense twins.

The dense twin gets the gradient at the pattern; so its numbers off the pattern stay zero, or the act has no right value
and must be refused.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sten

from .classify import Verdict, is_refusal, line, same, unequal
from .database import optim_db
from .forms import ALL, FEW, Form
from .operators import Attempt

STEPS = 4
SHAPES = [(8, 12), (7, 5)]


def optimizer_units() -> dict[str, Callable[[], Iterator[Attempt]]]:
    """The attempts of every optimizer, by its name."""
    return {info.optim_cls.__name__: functools.partial(attempts, info) for info in optim_db}


def attempts(info: Any) -> Iterator[Attempt]:
    """Every setting, implementation and scheduler; finalized weights in every form, trainable ones in few layouts."""
    if info.only_supports_sparse_grads:
        return
    name = info.optim_cls.__name__
    for number, (kind, kwargs, scheduler) in enumerate(settings(info)):
        for form in ALL if number == 0 else FEW:
            for trainable in (False, True) if not form.transposed else (False,):
                play = functools.partial(judge, info.optim_cls, kwargs, scheduler, form, trainable, kind == "resume")
                case = f"setting {number}/{'trainable' if trainable else 'finalized'}"
                yield Attempt(name, kind, case, str(form), play)


def settings(info: Any) -> Iterator[tuple[str, dict, list]]:
    """(kind, keyword arguments, makers of schedulers)."""
    kinds = [option.kwargs for option in info.optim_inputs_func(device="cpu")]
    if info.optim_cls is torch.optim.LBFGS:  # few inner steps say the same
        kinds = [{"max_iter": 4, **kwargs} for kwargs in kinds]
    for kwargs in kinds:
        yield "step", kwargs, []
    for option in info.supported_impls:
        yield option, {**kinds[0], option: True}, []
    for makers in info.scheduler_inputs:
        yield "scheduler", {"lr": 0.01, **kinds[0]}, list(makers)
    yield "resume", kinds[0], []


def judge(cls: Any, kwargs: dict, makers: list, form: Form, trainable: bool, resume: bool) -> Verdict:
    """The weights after the steps, of a model with sparse weights and of its dense twin."""
    dense, masks = model(form)
    sparse = copy.deepcopy(dense)
    for layer, twin in zip(sparse, dense, strict=True):
        layer.weight = nn.Parameter(form.store(twin.weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trained(dense, masks, cls, kwargs, makers, resume)
        except Exception as error:
            return Verdict("skipped", line(error))
        try:
            trained(sten.trainable(sparse) if trainable else sparse, None, cls, kwargs, makers, resume)
        except Exception as error:
            return Verdict("refused" if is_refusal(error) else "crash", line(error))
        for want, got, mask in zip(dense, sparse, masks, strict=True):
            if not same(want.weight, got.weight):
                inside = same(want.weight.masked_fill(~mask, 0), got.weight)
                where = " off the pattern" if inside else ""
                return Verdict("documented" if inside else "wrong", unequal(want.weight, got.weight) + where)
    return Verdict("right")


def model(form: Form) -> tuple[nn.Sequential, list[Tensor]]:
    """Layers with zeros off a pattern, and their masks."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(columns, rows, bias=False, dtype=torch.float64) for rows, columns in SHAPES))
    masks = []
    for layer in layers:
        stored = form.store(layer.weight)
        layer.weight.data.copy_(stored.to_dense())
        masks.append(stored.mask())
    return layers, masks


def trained(layers: nn.Sequential, masks: list[Tensor] | None, cls, kwargs: dict, makers: list, resume: bool) -> None:
    """Steps of the optimizer; with `resume`, halfway with the state of a new one."""
    optimizer = cls(layers.parameters(), **kwargs)
    schedulers = [make(optimizer) for make in makers]
    torch.manual_seed(1)
    batches = [[torch.randn(3, columns, dtype=torch.float64) for _, columns in SHAPES] for _ in range(STEPS)]
    for number, batch in enumerate(batches):
        optimizer.step(functools.partial(closure, layers, batch, masks, optimizer))
        for scheduler in schedulers:
            metric = (1.0,) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else ()
            scheduler.step(*metric)
        if resume and number == 1:
            state, optimizer = copy.deepcopy(optimizer.state_dict()), cls(layers.parameters(), **kwargs)
            optimizer.load_state_dict(state)


def closure(layers: nn.Sequential, batch: list[Tensor], masks: list[Tensor] | None, optimizer) -> Tensor:
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = sum((layer(x) - 1).square().mean() for layer, x in zip(layers, batch, strict=True))
    loss.backward()
    if masks is not None:
        for layer, mask in zip(layers, masks, strict=True):
            layer.weight.grad.masked_fill_(~mask, 0)
    return loss
