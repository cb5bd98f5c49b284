"""ADMM and LeastSquares: the weights of a fixed mask that come closest to the dense outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..layouts.checks import expect_whole
from .calibration import Refinement, filled, float32_update, input_gram, starting_mask
from .sparsifier import Edit, View


@dataclass(frozen=True)
class WeightUpdate(Refinement):
    """Values v on a mask that lower (w - v) H (w - v)^T of every row, H = mean of x x^T + damping * mean(diag H) * I.

    w is the dense weight. The mask is that of the method before in a chain, else Wanda's.
    """

    iterations: int = 20
    damping: float = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"x_gram"})

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_whole(self, "iterations", 1)
        kind = type(self).__name__
        if not 0 < self.damping < math.inf:
            raise ValueError(f"Expected a finite damping > 0 for {kind}, got {self.damping!r}.")

    @float32_update
    def update(self, view: View) -> Edit:
        mask, gram = starting_mask(view), input_gram(view)
        mean = gram.diagonal().mean()
        gram = gram + torch.diag(torch.where(mean > 0, self.damping * mean, 1.0).expand(len(gram)))
        # One scale for all columns, as in the source: H gets a unit diagonal, which preconditions it.
        scale = gram.diagonal().sqrt()
        kept = filled(view, mask).flatten(1)
        start = view.previous.value if view.previous is not None and view.previous.value is not None else view.weight
        dense, start = (t.flatten(1).float() * scale for t in (view.weight, start))
        value = self.solve(gram / scale / scale.unsqueeze(1), dense, start * kept, kept) / scale
        return Edit(mask=mask, value=value.view(view.weight.shape).to(view.weight.dtype))

    def solve(self, gram: Tensor, dense: Tensor, start: Tensor, kept: Tensor) -> Tensor:
        """The values (rows, columns), zero where not kept, for an H of unit diagonal."""
        raise NotImplementedError


@dataclass(frozen=True)
class ADMM(WeightUpdate):
    """Update the weights of a fixed mask by the alternating direction method of multipliers.

    With the inputs scaled to unit norm and rho = 1: v = (H + rho I)^-1 (H w + rho (z - u)); z = mask * (v + u);
    u = u + v - z. One factorization serves all rows and iterations; 20 iterations come within a few percent of
    `sten.LeastSquares`, whose error they approach.

    Source: Boza, Fast and Effective Weight Update for Pruned Large Language Models,
    https://arxiv.org/abs/2401.02938, section 3 and algorithm 1.

    Example:
        >>> import torch, sten
        >>> stats = {"x_gram": torch.tensor([[1.0, 0.5], [0.5, 1.0]]), "tokens": torch.tensor(64)}
        >>> view = sten.extend.View("w", torch.tensor([[2.0, 1.0]]), sten.NM(1, 2), stats=stats)
        >>> sten.ADMM().update(view).value.round(decimals=1)
        tensor([[2.5000, 0.0000]])
    """

    def solve(self, gram: Tensor, dense: Tensor, start: Tensor, kept: Tensor) -> Tensor:
        lower = torch.linalg.cholesky(gram + torch.eye(len(gram), device=gram.device))
        inverse, target = torch.cholesky_inverse(lower), dense @ gram
        z, u = start, torch.zeros_like(start)
        for _ in range(self.iterations):
            v = (target + z - u) @ inverse
            u = u + v
            z = u * kept
            u = u - z
        return z


@dataclass(frozen=True)
class LeastSquares(WeightUpdate):
    """The best weights of a fixed mask: least squares by conjugate gradients, all rows together.

    Each row solves H_SS v = (H w)_S for its own support S; the error falls with every iteration, and 10 to 20 suffice.
    It starts from the weights of the method before in a chain.

    Source: Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952.

    Example:
        >>> import torch, sten
        >>> stats = {"x_gram": torch.tensor([[1.0, 0.5], [0.5, 1.0]]), "tokens": torch.tensor(64)}
        >>> view = sten.extend.View("w", torch.tensor([[2.0, 1.0]]), sten.NM(1, 2), stats=stats)
        >>> sten.LeastSquares().update(view).value.round(decimals=1)
        tensor([[2.5000, 0.0000]])
    """

    def solve(self, gram: Tensor, dense: Tensor, start: Tensor, kept: Tensor) -> Tensor:
        value = start
        rest = ((dense - value) @ gram) * kept
        step, power = rest, rest.square().sum(1, keepdim=True)
        for _ in range(self.iterations):
            image = (step @ gram) * kept
            curve = (step * image).sum(1, keepdim=True)
            length = torch.where(curve > 0, power / curve, 0.0)
            value, rest = value + length * step, rest - length * image
            before, power = power, rest.square().sum(1, keepdim=True)
            step = rest + torch.where(before > 0, power / before, 0.0) * step
        return value
