"""A short run of the fuzzer; `make fuzz` is the long one. A failure is repeated by its number: fuzzing.trial(n)."""

from __future__ import annotations

import fuzzing
import pytest


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_mutations(first, one_thread):
    counts, failures, _ = fuzzing.work(first, 50)
    assert not failures and sum(counts.values()) == 50
    assert sum(number for (_, outcome), number in counts.items() if outcome == "refused") >= 25


@pytest.mark.parametrize("number", [62, 140, 194, 563, 569, 972, 2011, 2082, 2124, 2155, 2994, 101158, 125251, 132253])
def test_mutations_that_once_failed(number, one_thread):
    """Shapes of dense weights, optimizer slots without a step, an order of rows that is none, parts given twice."""
    fuzzing.trial(number)
