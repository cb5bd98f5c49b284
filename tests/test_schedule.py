"""Schedules, by hand."""

import math

import pytest
import torch

from sten.sparsifiers.schedule import Constant, Cosine, Cubic, Exponential, Linear

CURVES = [Linear(0.2, 0.9, 3, 11), Cubic(0.2, 0.9, 3, 11), Cosine(0.2, 0.9, 3, 11)]


@pytest.mark.parametrize("plan", CURVES, ids=lambda p: type(p).__name__)
def test_values_at_and_beyond_both_ends(plan):
    assert [plan.value(t) for t in (0, 3)] == [0.2, 0.2]
    assert [plan.value(t) for t in (11, 500)] == pytest.approx([0.9, 0.9], abs=1e-12)
    values = [plan.value(t) for t in range(3, 12)]
    assert values == sorted(values)


def test_values_by_hand():
    assert Linear(1.0, 0.0, 0, 4).value(1) == 0.75
    assert Cubic(0.0, 0.8, 0, 4).value(2) == pytest.approx(0.8 * (1 - 0.5**3))
    assert Cubic(0.5, 0.9, 0, 4).value(1) == pytest.approx(0.9 + (0.5 - 0.9) * 0.75**3)
    assert Cosine(0.3, 0.0, 0, 750).value(250) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert Exponential(1.0, 0.0, 10, 50, rate=0.1).value(20) == pytest.approx(math.exp(-1))
    assert [Exponential(1.0, 0.0, 10, 50, rate=0.1).value(t) for t in (0, 10, 50, 51)] == [1.0, 1.0, 0.0, 0.0]
    assert Constant(0.3, every=7).value(10**9) == 0.3


@pytest.mark.parametrize(
    "plan", [*CURVES, Exponential(1.0, 0.0, 3, 11, rate=0.3), Constant(0.3)], ids=lambda p: type(p).__name__
)
def test_a_tensor_gives_the_same_number(plan):
    for step in range(15):
        assert float(torch.as_tensor(plan.value(torch.tensor(step)))) == pytest.approx(plan.value(step), abs=1e-6)


def test_due():
    assert [t for t in range(20) if Constant(0.0, start=4, stop=15, every=5).due(t)] == [4, 9, 14]
    assert [t for t in range(20) if Linear(0.0, 1.0, 4, 15, 5, include_stop=True).due(t)] == [4, 9, 14, 15]
    assert [t for t in range(5) if Constant(0.0).due(t)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [{"start": 5, "stop": 4}, {"every": 0}, {"start": -1}, {"start": 0.5}])
def test_invalid_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="0 <= start <= stop and every >= 1"):
        Linear(0.0, 1.0, **bad)


def test_schedules_compare_by_value():
    assert Linear(0.0, 1.0, 2, 5) == Linear(0.0, 1.0, 2, 5) and len({Cosine(1.0, 0.0), Cosine(1.0, 0.0)}) == 1
