"""Weights with statistics of their inputs, and the rules of one-shot methods in float64, straight from the papers.

A helper of the tests, not a test.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import sten


def inputs(columns: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """Correlated inputs of unequal size and of a mean that is not zero, float64."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random, dtype=torch.float64) / columns**0.5
    mix += torch.eye(columns, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=random, dtype=torch.float64) @ mix
    return (x + torch.randn(columns, generator=random)) * (0.3 + torch.rand(columns, generator=random))


def view_of(layout, shape=(24, 32), sparsity=0.5, seed=0, dtype=torch.float32, x=None, **fields):
    """A random weight in a View with all statistics."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    x = inputs(weight.flatten(1).shape[1], seed=seed) if x is None else x
    mean = {"x_norm": x.square().mean(0).sqrt(), "x_gram": x.T @ x / len(x), "x_mean": x.mean(0)}
    stats = {name: t.float() for name, t in {**mean, "x_var": x.var(0, correction=0)}.items()}
    stats["tokens"] = torch.tensor(len(x))
    return sten.extend.View("w", weight, layout, None if layout.rate else sparsity, stats=stats, **fields)


def error(view, edit) -> Tensor:
    """The squared error of every output, mean over tokens, float64."""
    value = view.weight.masked_fill(~edit.mask, 0) if edit.value is None else edit.value
    d = (view.weight - value).double().flatten(1)
    return ((d @ view.stats["x_gram"].double()) * d).sum(1)


def damped(view, damping=0.01) -> Tensor:
    gram = view.stats["x_gram"].double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def sparse_gpt(weight: Tensor, hessian: Tensor, choose) -> tuple[Tensor, Tensor]:
    """Algorithm 1: column by column, every later column at once. `choose(j, w, cost)` gives the mask of a span or None.

    `cost` is w^2 / [U_jj]^2 of the present weights.
    """
    w, mask = weight.double().clone(), torch.zeros_like(weight, dtype=torch.bool)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for j in range(w.shape[1]):
        chosen = choose(j, (w / factor.diagonal()) ** 2)
        if chosen is not None:
            mask[:, j : j + chosen.shape[1]] = chosen
        missing = torch.where(mask[:, j], 0.0, w[:, j] / factor[j, j])
        w[:, j:] -= missing.unsqueeze(1) * factor[j, j:]
    return w.masked_fill(~mask, 0), mask


def least_squares(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The best values of every row on its support, by a direct solver."""
    out = torch.zeros_like(weight, dtype=torch.float64)
    for row, (w, kept) in enumerate(zip(weight.double(), mask, strict=True)):
        at = kept.nonzero().flatten()
        if len(at):
            out[row, at] = torch.linalg.solve(hessian[at][:, at], (hessian @ w)[at])
    return out


def masks_of_a_row(columns: int, n: int, m: int):
    """All n:m masks of one row."""
    group = [[i in kept for i in range(m)] for kept in itertools.combinations(range(m), n)]
    for parts in itertools.product(group, repeat=columns // m):
        yield torch.tensor([on for part in parts for on in part])
