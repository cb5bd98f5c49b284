"""The small model in each form of its weights, and the dense model of the same weights. A helper, not a test."""

from __future__ import annotations

import pytest
import torch
from compatibility import FORMS
from small import mlp, rate
from torch import nn

import sten

every_form = pytest.mark.parametrize("form", FORMS)


def sparse(layout, form):
    if form == "dense weight":
        method = sten.Gradual(1, 2) if layout.rate is None else sten.STE()
        return sten.sparsify(mlp(), layout, method, rate(layout))
    model = sten.sparsify(mlp(), layout, sparsity=rate(layout))
    return sten.trainable(model) if form == "trainable" else model


def dense_of(model):
    """A dense model with the weights that `model` computes with."""
    dense = mlp()
    with torch.no_grad():
        for ours, theirs in zip(model, dense, strict=True):
            if isinstance(ours, nn.Linear):
                theirs.weight.copy_(ours.weight.to_dense())
                theirs.bias.copy_(ours.bias)
    return dense
