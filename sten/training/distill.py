"""The distillation loss of CAST."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def distill_loss(logits: Tensor, target: Tensor, teacher: Tensor, eta: float = 1 / 3) -> Tensor:
    """eta * KL(teacher || student) + (1 - eta) * cross-entropy, a mean over positions; no temperature.

    Args:
        logits: (..., classes) of the model that is trained.
        target: (...) class numbers; -100 is ignored in both terms.
        teacher: (..., classes) logits of a frozen dense model, mostly the one that training started from.
        eta: weight of the teacher; 1/3 is cited for language models.

    Source: https://arxiv.org/abs/2509.25996, equation 13, read through a reproduction's citations.

    Example:
        >>> import torch, sten
        >>> logits = torch.zeros(2, 3)
        >>> round(float(sten.distill_loss(logits, torch.tensor([0, 1]), logits, eta=0.5)), 4)  # half of log 3
        0.5493
    """
    if logits.shape != teacher.shape or logits.shape[:-1] != target.shape:
        raise ValueError(
            "Expected teacher logits of the student's shape and a target without the last dimension, got "
            f"{tuple(logits.shape)}, {tuple(teacher.shape)} and {tuple(target.shape)}."
        )
    logits, teacher, target = logits.flatten(0, -2), teacher.detach().flatten(0, -2), target.flatten()
    known = target != -100
    student = F.log_softmax(logits, -1)
    each = F.kl_div(student, F.log_softmax(teacher, -1), log_target=True, reduction="none").sum(-1)
    distance = torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)
    return eta * distance + (1 - eta) * F.nll_loss(student, target)
