"""distill: a training loop for a sparse student and its dense teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from ..calibration.progress import Progress
from ..conversion.api import attach
from ..conversion.reparametrize import move
from ..conversion.select import Target, sparse_weights
from ..training.inference_mode import ordinary_tensors
from ..training.weights import dynamic_weights
from .distillation import Distillation

Model = TypeVar("Model", bound=nn.Module)


@ordinary_tensors
def distill(
    student: Model,
    teacher: Callable[..., Any],
    batches: Iterable,
    optimizer: Optimizer | None = None,
    *,
    steps: int | None = None,
    lr: float = 1e-4,
    kl: float = 1.0,
    embedding: float = 1.0,
    features: float = 0.0,
    task: float = 0.0,
    temperature: float = 1.0,
    max_grad_norm: float = 1.0,
    callback: Callable[[int, float], None] | None = None,
    progress: bool | None = None,
) -> Model:
    """Train a sparse model, in its fixed pattern, towards a dense teacher, in place; the student is returned.

    What requires a gradient trains: `p.requires_grad_(False)` freezes a parameter, and with `sten.add_adapters` the
    adapters alone train. Weights in any layout train as their stored values; afterwards they have the form that they
    came in. `sten.Distillation` has the loss, its terms, and what a batch is, for a loop of your own: with another
    trainer, gradient accumulation, autocast, several processes, `sten.save_run` and `load_run`.

    Args:
        student, teacher, kl, embedding, features, task, temperature: as of `sten.Distillation`.
        batches: one is read a step. A list or a DataLoader is read again from its start where `steps` are more.
        optimizer: made from the student's parameters, or the one of `sten.sparsify`; called again with it, distill
            goes on. Default: AdamW without weight decay, whose learning rate rises over the first tenth of the steps
            and then falls linearly to 0, with float32 copies of float16 and bfloat16 parameters.
        steps: optimizer steps; None: one for each batch.
        lr: of the default optimizer. 1e-4 to 3e-4 is usual for a few hundred steps.
        max_grad_norm: the norm to which gradients are clipped.
        callback: called after each step with the steps done and the loss before it.
        progress: whether to show a progress bar (by tqdm); None: where tqdm is installed and stderr is a terminal.

    Raises:
        ValueError, TypeError: one sentence that says what was wrong; nothing was changed.
        ValueError: batches that end too early. RuntimeError: gradients that are not finite. The student has the weights
            of the last good step.

    Example:
        >>> import copy, torch, sten
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> student = sten.sparsify(copy.deepcopy(teacher), sten.NM(2, 4))
        >>> student = sten.distill(student, teacher, [torch.randn(16, 8)], steps=20, lr=1e-3)
        >>> student[0].weight.sparse_layout
        NM(n=2, m=4)
    """
    loss_of = Distillation(student, teacher, kl, embedding, features, task, temperature)
    steps = _expect_steps(batches, steps)
    sparse = sparse_weights(student)
    if not sparse:
        raise ValueError(
            "Expected a student with sparse weights, got none; call sten.sparsify first, and mind the order of the "
            "arguments: sten.distill(student, teacher, batches)."
        )
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("Expected a student with parameters that require a gradient, got none; see requires_grad_.")
    dynamic = dynamic_weights(student)
    if optimizer is None and dynamic:
        raise ValueError(
            f"Expected optimizer= for a student that {dynamic[0].method} trains, got None; pass the optimizer given to "
            "sten.sparsify, or call sten.finalize first."
        )
    finalized = [t for t in sparse if t.weight is None and not t.why and t.tensor.requires_grad and not _recurrent(t)]
    untrained = {target.name for target in sparse if target.weight is None}
    bar = Progress(steps, progress, "distill", "step")
    try:
        if optimizer is None:
            for target in finalized:
                move(target, target.stored, [], trainable=True)
            optimizer = _AdamW([p for p in student.parameters() if p.requires_grad], lr, steps)
        else:
            attached = all(w.engine is not None and w.engine.acts_in(optimizer) for w in dynamic)
            if not attached or (finalized and not dynamic):
                attach(student, optimizer)
        _train(loss_of, batches, optimizer, steps, max_grad_norm, callback, bar)
    finally:
        bar.close()
        for target in sparse_weights(student):
            if target.name in untrained and target.weight is not None:
                move(target, target.stored, [])
    return student


def _train(
    loss_of: Distillation,
    batches: Iterable,
    optimizer: Optimizer | _AdamW,
    steps: int | None,
    max_grad_norm: float,
    callback: Callable[[int, float], None] | None,
    bar: Progress,
) -> None:
    for step, batch in enumerate(_repeated(batches, steps), 1):
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        norm = clip_grad_norm_(loss_of.student.parameters(), max_grad_norm)  # read anew: some methods resize them
        if not bool(norm.isfinite()):
            optimizer.zero_grad()
            raise RuntimeError(
                f"Expected finite gradients, got a norm of {float(norm)} at step {step} (loss {float(loss.detach())}); "
                "use a lower lr=, or look for NaN in the batch."
            )
        optimizer.step()
        bar.done()
        if callback is not None:
            callback(step, float(loss.detach()))
    optimizer.zero_grad()


class _AdamW:
    """AdamW without weight decay and, if the number of steps is known, with a learning rate that rises and falls.

    Of parameters in half precision it keeps float32 copies: most steps are smaller than what they could add.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, steps: int | None) -> None:
        half = (torch.float16, torch.bfloat16)
        self.copies = {p: nn.Parameter(p.detach().float()) for p in params if p.dtype in half}
        self.params = params
        self.inner = torch.optim.AdamW([self.copies.get(p, p) for p in params], lr, weight_decay=0.0)
        rise = 1 if steps is None else max(1, steps // 10)

        def factor(step: int) -> float:
            return 1.0 if steps is None else min((step + 1) / rise, (steps - step) / (steps - rise + 1))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.inner, factor)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p, copy in self.copies.items():
            copy.grad = None if p.grad is None else p.grad.float()
        self.inner.step()
        for p, copy in self.copies.items():
            p.copy_(copy)
        self.schedule.step()


def _expect_steps(batches: Iterable, steps: int | None) -> int | None:
    """How many steps there will be; None if only the end of `batches` tells."""
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"Expected a positive number of steps or None, got {steps!r}.")
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"Expected batches in a list, a DataLoader or the like, got {type(batches).__name__}.")
    count = len(batches) if hasattr(batches, "__len__") else None
    if count == 0:
        raise ValueError("Expected batches to train with, got none.")
    return count if steps is None else steps


def _repeated(batches: Iterable, steps: int | None) -> Iterator:
    done = 0
    while True:
        before = done
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return
        if steps is None and done:
            return
        if done == before:
            raise ValueError(
                f"Expected batches for {'a' if steps is None else steps} steps, got {done} from what can be read only "
                "once; pass a list or a DataLoader, or a lower steps=."
            )


def _recurrent(target: Target) -> bool:
    """Whether a weight lies in a fused recurrent layer, where it has no trainable form and trains as it is."""
    return any(isinstance(module, nn.RNNBase) for module, _ in target.owners)
