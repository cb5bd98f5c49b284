"""The multiple-choice knapsack: one candidate of each item, with the least total error, within a budget of cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STATES = (
    20000  # partial choices that are kept after each item; more are thinned out, and `bound` says what that may cost
)


@dataclass(frozen=True)
class Selection:
    """A choice of candidates.

    Attributes:
        chosen: the candidate of each item.
        cost, error: their sums; the cost is at most the budget.
        bound: no choice within the budget has a lower error than this.
    """

    chosen: list[int]
    cost: float
    error: float
    bound: float


def knapsack(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float) -> Selection:
    """The candidates with the least total error whose total cost is at most `budget`.

    Dynamic programming over the partial choices that no other one beats in both cost and error, without those that
    cannot lead to a better end than a choice that is known, by a Lagrangian bound. Exact, unless more than `STATES` of
    them are left; then the result is at most `error - bound` from the best.

    Raises:
        ValueError: the cheapest candidates together cost more than the budget.

    Source: Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11 (dominance; the Lagrangian bound).
    """
    items = [(np.asarray(c, np.float64), np.asarray(e, np.float64)) for c, e in zip(costs, errors, strict=True)]
    least = sum(float(c.min()) for c, _ in items)
    if least > budget:
        raise ValueError(f"Expected a budget of at least {least:g}, what the cheapest candidates cost, got {budget:g}.")
    price, bound, known = _price(items, budget)
    # of the items from i on: the least cost, and the least error + price * cost
    cheapest = np.cumsum([0.0, *(float(c.min()) for c, _ in items[::-1])])[::-1]
    priced = np.cumsum([0.0, *(float((e + price * c).min()) for c, e in items[::-1])])[::-1]
    highest = sum(float(e[k]) for (_, e), k in zip(items, known, strict=True))
    slack = 1e-12 * max(1.0, abs(highest))
    cost, error, steps = np.zeros(1), np.zeros(1), []
    for i, (c, e) in enumerate(items):
        total, wrong = (cost[:, None] + c).ravel(), (error[:, None] + e).ravel()
        fits = total + cheapest[i + 1] <= budget
        fits &= wrong + priced[i + 1] - price * (budget - total) <= highest + slack
        index = np.flatnonzero(fits)
        index = index[np.lexsort((wrong[index], total[index]))]
        lower = np.minimum.accumulate(np.concatenate([[np.inf], wrong[index]]))
        index = _thinned(index[wrong[index] < lower[:-1]], total)
        steps.append((index // len(c), index % len(c)))
        cost, error = total[index], wrong[index]
        if not len(index):
            break
    chosen = known
    if len(cost) and float(error.min()) <= highest:
        state, chosen = int(error.argmin()), []
        for parent, candidate in reversed(steps):
            chosen.append(int(candidate[state]))
            state = int(parent[state])
        chosen = chosen[::-1]
    sums = [sum(float(pair[part][k]) for pair, k in zip(items, chosen, strict=True)) for part in (0, 1)]
    return Selection(chosen, sums[0], sums[1], min(bound, sums[1]))


def _thinned(index: np.ndarray, total: np.ndarray) -> np.ndarray:
    """At most STATES of the choices, evenly by cost: of those in one interval the dearest, which has the least error,
    and always the cheapest."""
    if len(index) <= STATES:
        return index
    low, high = total[index[0]], total[index[-1]]
    interval = ((total[index] - low) / (high - low) * (STATES - 2)).astype(np.int64)
    last = np.append(interval[1:] != interval[:-1], True)
    last[0] = True
    return index[last]


def _price(items: list[tuple[np.ndarray, np.ndarray]], budget: float) -> tuple[float, float, list[int]]:
    """The price of a unit of cost for which the choice of least error + price * cost just fits, the lower bound of the
    error that it proves, and a choice that fits."""

    def at(price: float) -> tuple[list[int], float, float]:
        # of candidates that are equally good, the cheapest
        chosen = [int(np.lexsort((c, e + price * c))[0]) for c, e in items]
        cost = sum(float(c[k]) for (c, _), k in zip(items, chosen, strict=True))
        value = sum(float((e + price * c).min()) for c, e in items)
        return chosen, cost, value - price * budget

    chosen, cost, bound = at(0.0)
    if cost <= budget:
        return 0.0, bound, chosen
    chosen = [int(np.lexsort((e, c))[0]) for c, e in items]  # the cheapest of each, which fits
    spread = max(float(np.ptp(e)) for _, e in items) or 1.0
    unit = min((float(d) for c, _ in items for d in np.diff(np.unique(c)) if d > 0), default=1.0)
    # at this price the cheapest candidate of each item is the best, up to differences that are nearly none
    low, high = 0.0, 2 * spread / max(unit, 1e-9 * max(float(c.max()) for c, _ in items))
    price, best = 0.0, bound
    for _ in range(100):
        middle = (low + high) / 2
        found, cost, bound = at(middle)
        if bound > best:
            best, price = bound, middle
        if cost <= budget:
            high, chosen = middle, found
        else:
            low = middle
    return price, best, _filled(items, chosen, budget)


def _filled(items: list[tuple[np.ndarray, np.ndarray]], chosen: list[int], budget: float) -> list[int]:
    """The choice with what is left of the budget spent where a unit of cost takes away the most error."""
    chosen = list(chosen)
    left = budget - sum(float(c[k]) for (c, _), k in zip(items, chosen, strict=True))
    while True:
        best, where = 0.0, None
        for i, (c, e) in enumerate(items):
            more, less = c - c[chosen[i]], e[chosen[i]] - e
            gain = np.where((more <= left) & (less > 0), less / np.maximum(more, 1e-300), -1.0)
            k = int(gain.argmax())
            if gain[k] > best:
                best, where = float(gain[k]), (i, k, float(more[k]))
        if where is None:
            return chosen
        i, k, more = where
        chosen[i], left = k, left - more
