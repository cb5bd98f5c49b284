"""Sensitivity: the knapsack against exhaustion, budgets, measured errors against dense PyTorch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sten.conversion import knapsack as solver
from sten.conversion.knapsack import knapsack

numbers = st.one_of(st.integers(0, 9).map(float), st.floats(0, 10))
items = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=200)
@given(items, st.floats(0, 40))
def test_knapsack_is_exact(problem, budget):
    costs, errors = ([[pair[part] for pair in item] for item in problem] for part in (0, 1))
    every = [
        (sum(costs[i][k] for i, k in enumerate(c)), sum(errors[i][k] for i, k in enumerate(c)))
        for c in itertools.product(*(range(len(item)) for item in problem))
    ]
    fitting = [error for cost, error in every if cost <= budget]
    if not fitting:
        with pytest.raises(ValueError, match="budget"):
            knapsack(costs, errors, budget)
        return
    found = knapsack(costs, errors, budget)
    assert found.cost <= budget and found.error == pytest.approx(min(fitting), rel=1e-9, abs=1e-9)
    assert found.bound <= found.error + 1e-9
    assert found.cost == pytest.approx(sum(costs[i][k] for i, k in enumerate(found.chosen)))


def test_knapsack_of_many_items(monkeypatch):
    """Thinned out, the result is still within the budget and near the bound."""
    random = np.random.default_rng(0)
    costs, errors = random.random((200, 8)) * random.lognormal(size=(200, 1)), random.random((200, 8))
    budget = float(costs.mean(1).sum()) * 0.7
    best = knapsack(costs, errors, budget)
    assert best.cost <= budget and best.error <= best.bound * 1.01
    monkeypatch.setattr(solver, "STATES", 50)
    rough = knapsack(costs, errors, budget)
    assert rough.cost <= budget and best.error <= rough.error <= rough.bound * 1.05
