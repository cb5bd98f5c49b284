"""Allocation: exact sums, hand-computed shares."""

import pytest
import torch

import sten
from sten.sparsifiers.allocation import proportional

SHAPES = {"wide": (16, 16), "narrow": (2, 16), "conv": (8, 4, 3, 3)}


def test_uniform():
    assert sten.Uniform(0.9).assign(SHAPES, None) == {"wide": 26, "narrow": 3, "conv": 29}


def test_erk_by_hand():
    # density is eps * (16 + 16) / 256 = eps / 8 and eps * 18 / 32; the budget 144 = eps * (32 + 18), so eps = 2.88,
    # more than 1 / .5625: narrow is dense (32), wide gets the other 112
    assert sten.ERK(0.5).assign({"wide": (16, 16), "narrow": (2, 16)}, None) == {"wide": 112, "narrow": 32}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_erk_and_global_are_exact_in_sum(sparsity):
    total = 16 * 16 + 2 * 16 + 8 * 4 * 9
    counts = sten.ERK(sparsity).assign(SHAPES, None)
    assert sum(counts.values()) == round((1 - sparsity) * total)
    assert all(0 <= counts[name] <= torch.Size(shape).numel() for name, shape in SHAPES.items())
    scores = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    counts = sten.Global(sparsity).assign(SHAPES, scores.get)
    assert sum(counts.values()) == round((1 - sparsity) * total)


def test_global_floor():
    scores = {"a": torch.tensor([[9.0, 8, 7, 6]]), "b": torch.tensor([[5.0, 4, 3, 2]])}
    shapes = {"a": (1, 4), "b": (1, 4)}
    assert sten.Global(0.5).assign(shapes, scores.get) == {"a": 4, "b": 0}
    assert sten.Global(0.5, floor=0.25).assign(shapes, scores.get) == {"a": 3, "b": 1}
    with pytest.raises(ValueError, match="floor"):
        sten.Global(0.5, floor=1.7)


def test_ties_go_to_the_first_weight():
    scores = {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    assert sten.Global(0.25).assign({"a": (2, 2), "b": (2, 2)}, scores.get) == {"a": 4, "b": 2}


def test_proportional_by_hand():
    caps = {"a": 4, "b": 9, "c": 9}
    assert proportional({"a": 3.0, "b": 1.0, "c": 0.0}, 4, caps) == {"a": 3, "b": 1, "c": 0}
    assert proportional({"a": 3.0, "b": 1.0, "c": 0.0}, 8, caps) == {"a": 4, "b": 4, "c": 0}
    assert proportional({"a": 0.0, "b": 0.0, "c": 0.0}, 6, caps) == {"a": 2, "b": 2, "c": 2}
    assert proportional({"a": 1.0, "b": 0.0, "c": 0.0}, 9, caps) == {"a": 4, "b": 3, "c": 2}
    assert proportional({"a": 1.0, "b": 1.0, "c": 1.0}, 99, caps) == caps
    assert proportional({"a": 1.0, "b": 1.0, "c": 1.0}, 0, caps) == {"a": 0, "b": 0, "c": 0}
