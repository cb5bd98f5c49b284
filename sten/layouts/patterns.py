"""The n-subsets of range(m) in revolving-door order, which GroupedNM numbers: as a tuple, and by arithmetic."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.cache
def patterns(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """All n-subsets of range(m), ascending inside, in revolving-door order: neighbours differ in one exchange.

    Source: Nijenhuis and Wilf, Combinatorial Algorithms; A(m, n) = A(m-1, n), reversed A(m-1, n-1) with m-1 appended.
    """
    if n == 0 or n == m:
        return (tuple(range(n)),)
    return patterns(n, m - 1) + tuple((*p, m - 1) for p in reversed(patterns(n - 1, m - 1)))


def revolving_door(n: int, m: int, device: torch.device) -> Tensor:
    """All n-subsets of range(m) in revolving-door order, (C(m, n), n), by arithmetic: no tensor is made of numbers.

    Source: Knuth 7.2.1.3; the subsets whose highest element is x come after those of lower ones, in reverse.
    """
    rank, columns = torch.arange(math.comb(m, n), device=device), []
    for k in range(n, 0, -1):
        reached = [(rank >= math.comb(row, k)).long() for row in range(k, m)]
        columns.append(sum(reached, torch.full_like(rank, k - 1)))
        rank = sum((r * math.comb(row, k - 1) for row, r in enumerate(reached, k)), -rank)
    return torch.stack(columns[::-1], 1)
