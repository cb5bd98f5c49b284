"""Distillation: a sparse student learns what its dense teacher computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calibration.data import MASKS, on_device
from ..conversion.structure import blocks
from ..sparsifiers.reconstruct import hidden, relative_errors
from ..training.distill import kl_divergence


class Distillation:
    """The loss of a student against a teacher, a function of one batch, for a training loop of your own.

    The sum of these terms, each a mean over what counts, times its weight; a term of weight 0 is not computed:

    - `kl`: T^2 KL(teacher / T || student / T) of the outputs' logits. Padding (`attention_mask`) does not count, nor
      do positions whose label is -100; the label of a position is the next one's in models that generate text.
    - `embedding`: of outputs without logits but with `last_hidden_state`, as encoders have them: the relative error
      |y - z|^2 / |z|^2 of each token, plus 1 - cosine of the means over the tokens of each sequence.
    - `features`: the relative error of each token in the output of each block, as a mean over the blocks.
    - `task`: the student's own loss, which it computes from the labels in the batch.

    Args:
        student: the model that trains, in any form; in the mode (train or eval) that it is in.
        teacher: mostly `copy.deepcopy(model)` from before `sten.sparsify`; a module is put into eval mode. Or, without
            `features`, a function of a batch that returns such outputs. It may lie on another device.
        temperature: T.

    A batch is a tensor or a tuple, for `model(*batch)`, or a dictionary, for `model(**batch)`; it is moved to the
    models' devices. Outputs are a tensor of logits, or have `logits` or `last_hidden_state`.

    Sources: https://arxiv.org/abs/1503.02531 (logits); https://arxiv.org/abs/2310.06927 (SquareHead: features, which it
    divides by the norm of the whole batch; here each token by its own, since some are ten times as long).

    Example:
        >>> import copy, torch, sten
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> student = sten.sparsify(copy.deepcopy(teacher), sten.NM(2, 4))
        >>> loss = sten.Distillation(student, teacher)
        >>> loss(torch.randn(3, 8)).backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Callable[..., Any],
        kl: float = 1.0,
        embedding: float = 1.0,
        features: float = 0.0,
        task: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        if teacher is student:
            raise ValueError(
                "Expected a teacher beside the student, got one model twice; copy.deepcopy it before sten.sparsify."
            )
        if isinstance(teacher, nn.Module):
            theirs = {id(p) for p in teacher.parameters()}
            shared = [name for name, p in student.named_parameters() if p.requires_grad and id(p) in theirs]
            if shared:
                raise ValueError(
                    f"Expected a teacher with parameters of its own, got {shared[0]}, which the student trains; "
                    "copy.deepcopy the model before sten.sparsify."
                )
        if min(kl, embedding, features, task) < 0 or not temperature > 0 or max(kl, embedding, features, task) == 0:
            raise ValueError(
                "Expected weights of terms >= 0, not all 0, and a positive temperature, got "
                f"{kl=}, {embedding=}, {features=}, {task=}, {temperature=}."
            )
        self.student, self.teacher = student, teacher
        self.kl, self.embedding, self.features, self.task = kl, embedding, features, task
        self.temperature = temperature
        self.blocks: list[tuple[nn.Module, nn.Module]] = []
        if features:
            self.blocks = _paired_blocks(student, teacher)
        inner = student.module if isinstance(student, nn.parallel.DistributedDataParallel) else student
        self.decodes = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
        self.next_token = bool(getattr(inner, "can_generate", lambda: False)()) and not self.decodes

    def __call__(self, batch: Any) -> Tensor:
        """The loss of a batch, differentiable by the student's parameters."""
        if isinstance(self.teacher, nn.Module):
            self.teacher.eval()
        with torch.no_grad():
            theirs, their_features = _run(self.teacher, batch, [block for _, block in self.blocks])
        ours, our_features = _run(self.student, batch, [block for block, _ in self.blocks])
        masks = _token_masks(batch)
        terms = []
        if self.features:
            pairs = zip(our_features, their_features, strict=True)
            errors = [relative_errors(y, z.to(y.device), _on(masks, y)).mean() for y, z in pairs]
            terms.append(self.features * torch.stack([e.to(errors[-1].device) for e in errors]).mean())
        if self.task:
            terms.append(self.task * _loss_of(ours))
        if self.kl or self.embedding:
            terms += self._of_outputs(ours, theirs, masks[1:] if self.decodes else masks, batch)
        if not terms:
            raise ValueError("Expected outputs for a term of weight > 0, got none; set kl=, embedding= or features=.")
        return sum(term.to(terms[-1].device) for term in terms)

    def _of_outputs(self, ours: Any, theirs: Any, masks: list[Tensor | None], batch: Any) -> list[Tensor]:
        """The term of the logits, or of the last hidden state."""
        student, teacher = _logits(ours), _logits(theirs)
        if student is not None and teacher is not None:
            teacher = _like(teacher, student)
            known = self._known(student, masks, batch)
            return [self.kl * kl_divergence(student, teacher, known, self.temperature)] if self.kl else []
        student, teacher = _field(ours, "last_hidden_state"), _field(theirs, "last_hidden_state")
        if student is None or teacher is None:
            if self.features or self.task:
                return []
            raise ValueError(
                f"Expected outputs with logits or last_hidden_state, got {type(ours).__name__} of the student and "
                f"{type(theirs).__name__} of the teacher; return one of these, or use features= alone."
            )
        teacher, tokens = _like(teacher, student), _on(masks, student)
        cosine = F.cosine_similarity(_pooled(student, tokens), _pooled(teacher, tokens), dim=-1)
        error = relative_errors(student, teacher, tokens).mean()
        return [self.embedding * (error + 1 - cosine.mean())] if self.embedding else []

    def _known(self, logits: Tensor, masks: list[Tensor | None], batch: Any) -> Tensor | None:
        """The positions of logits that count; None: all."""
        known = _on(masks, logits)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if labels is not None and labels.shape == logits.shape[:-1]:
            counts = labels.to(logits.device) != -100
            if self.next_token:
                counts = F.pad(counts[..., 1:], (0, 1))
            known = counts if known is None else known & counts
        return known


def _paired_blocks(student: nn.Module, teacher: Any) -> list[tuple[nn.Module, nn.Module]]:
    """The blocks of student and teacher, in order."""
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"Expected a teacher that is an nn.Module for features=, got {type(teacher).__name__}.")
    ours, theirs = ([module for _, module in blocks(model)] for model in (student, teacher))
    if not ours or len(ours) != len(theirs):
        raise ValueError(
            f"Expected equally many blocks in student and teacher for features=, got {len(ours)} and {len(theirs)}; "
            "leave features= out."
        )
    return list(zip(ours, theirs, strict=True))


def _run(model: Callable, batch: Any, inside: list[nn.Module]) -> tuple[Any, list[Tensor]]:
    """The outputs of a model, and those of some modules in it."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for block in inside:
            handle = block.register_forward_hook(lambda module, args, output: found.append(hidden(output)))
            stack.callback(handle.remove)
        device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
        batch = on_device(dict(batch) if isinstance(batch, Mapping) else batch, device)
        if isinstance(batch, dict):
            return model(**batch), found
        return (model(*batch) if isinstance(batch, (tuple, list)) else model(batch)), found


def _field(output: Any, name: str) -> Tensor | None:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _logits(output: Any) -> Tensor | None:
    return output if isinstance(output, Tensor) else _field(output, "logits")


def _loss_of(output: Any) -> Tensor:
    loss = None if isinstance(output, Tensor) else _field(output, "loss")
    if loss is None:
        raise ValueError("Expected the student's outputs to have a loss for task=, got none; put labels in the batch.")
    return loss


def _like(teacher: Tensor, student: Tensor) -> Tensor:
    """The teacher's tensor on the student's device; ValueError if the shapes differ."""
    if teacher.shape != student.shape:
        raise ValueError(
            f"Expected a teacher's output of shape {tuple(student.shape)}, the student's, got {tuple(teacher.shape)}."
        )
    return teacher.to(student.device)


def _token_masks(batch: Any) -> list[Tensor | None]:
    """Of a batch, which tokens are not padding, bool: of the input, and of the decoder's; None: all."""
    found = [batch.get(name) if isinstance(batch, Mapping) else None for name in MASKS]
    return [mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None for mask in found]


def _on(masks: list[Tensor | None], y: Tensor) -> Tensor | None:
    """The mask for the tokens of an output, on its device; None if there is none of its shape."""
    fitting = (mask.to(y.device) for mask in masks if mask is not None and mask.shape == y.shape[:-1])
    return next(fitting, None)


def _pooled(y: Tensor, tokens: Tensor | None) -> Tensor:
    """The mean over the tokens of each sequence, in float32 or more."""
    y = y if y.dtype == torch.float64 else y.float()
    if tokens is None:
        return y.mean(-2)
    weight = tokens.unsqueeze(-1).to(y.dtype)
    return (y * weight).sum(-2) / weight.sum(-2).clamp(min=1)
