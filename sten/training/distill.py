"""Losses between a sparse model and its dense teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 24  # logits whose float32 copies exist at once: 64 MiB each


def kl_divergence(logits: Tensor, teacher: Tensor, known: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """The mean over positions of T^2 KL(teacher / T || student / T), in float32 or more.

    Positions are taken in chunks, which backward computes again, so that of a large vocabulary no copy of all logits is
    made beside the gradient.

    Args:
        logits, teacher: (..., classes).
        known: (...) bool, the positions that count; None: all.
        temperature: T; the factor T^2 keeps gradients of one size.
    """
    logits, teacher = logits.flatten(0, -2), teacher.detach().flatten(0, -2)
    known = torch.ones_like(logits[:, 0], dtype=torch.bool) if known is None else known.flatten()
    size = max(1, CHUNK // logits.shape[1])
    pieces = list(zip(logits.split(size), teacher.split(size), known.split(size), strict=True))
    if len(pieces) == 1:
        total = _divergence(*pieces[0], temperature)
    else:
        total = sum(checkpoint(_divergence, *piece, temperature, use_reentrant=False) for piece in pieces)
    return total / known.sum().clamp(min=1)


def _divergence(logits: Tensor, teacher: Tensor, known: Tensor, temperature: float) -> Tensor:
    """The sum over the positions that count."""
    student, teacher = (F.log_softmax(_wide(t[known]) / temperature, -1) for t in (logits, teacher))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def distill_loss(
    logits: Tensor, target: Tensor, teacher: Tensor, eta: float = 1 / 3, temperature: float = 1.0
) -> Tensor:
    """eta * T^2 KL(teacher / T || student / T) + (1 - eta) * cross-entropy, a mean over positions.

    Args:
        logits: (..., classes) of the model that is trained.
        target: (...) class numbers; -100 is ignored in both terms.
        teacher: (..., classes) logits of a frozen dense model, mostly the one that training started from.
        eta: weight of the teacher; 1/3 is cited for language models.
        temperature: T, by which both logits are divided in the first term; there is none in the source.

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
    distance = kl_divergence(logits, teacher, target != -100, temperature)
    return eta * distance + (1 - eta) * F.cross_entropy(_wide(logits.flatten(0, -2)), target.flatten())
