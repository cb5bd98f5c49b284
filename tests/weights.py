"""Random sparse weights and models and their dense copies, for the tests of tensors, operators and gradients."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import ODD
from torch import nn

import sten

LAYOUTS = ODD
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)

# of a batch of three sequences of four tokens: what to ignore
PADDING = torch.tensor([[False, False, False, True], [False, False, False, False], [False, True, True, True]])


def make(layout, shape=(7, 5), dtype=torch.float32, seed=0):
    """A random sparse weight and the same as a dense tensor."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = layout.mask(dense.abs(), None if layout.rate is not None else 0.6)
    w = sten.from_dense(dense.to(dtype), layout, mask)
    return w, dense.masked_fill(~mask, 0).to(dtype)


def stored(w):
    """Raises unless the parts of `w` are well formed."""
    return w.sparse_layout.validate(w.parts, w.stored_shape)


def one_sentence(error):
    """Whether the message of what `pytest.raises` caught is a line of one or two sentences."""
    text = str(error.value)
    return text and "\n" not in text.strip() and text.count(". ") <= 1


def encoders(layout, batch_first, norm_first=False, activation="relu"):
    """A transformer encoder with sparse weights, and the same with dense ones."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=batch_first, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)
    for p in dense.parameters():
        nn.init.normal_(p, std=0.3)
    sparse = copy.deepcopy(dense)
    for name, p in list(sparse.named_parameters()):
        if p.dim() == 2:
            mask = layout.mask(p.detach().abs(), 0.5 if layout.rate is None else None)
            owner, _, last = name.rpartition(".")
            setattr(sparse.get_submodule(owner), last, nn.Parameter(sten.from_dense(p.detach(), layout, mask)))
            dense.get_parameter(name).data.mul_(mask)
    return sparse, dense
