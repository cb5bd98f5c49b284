"""Which order of channels lets a layout keep the most: a local search by exchanges, for any layout.

A problem is an order of K channels among K slots, and the scores of the weights that have them as rows or columns. What
an exchange of two slots gains is computed for all pairs at once, (K, K):

- where the layout keeps n of every m consecutive rows or columns (NM, VectorNM, GroupedNM): exactly. Of a group without
  its member p, let `a` be the sum of the n - 1 highest and `b` the next one; with q in p's place it keeps
  sum(a + max(b, q)) = sum(a) + (sum(b) + sum(q) + |b - q|_1) / 2, which is one matrix of distances;
- elsewhere (rows of a VectorNM, blocks): under the present mask, which is a lower bound, as the mask is chosen anew
  after the exchanges: the alternation of k-means.

In a sweep the best exchanges that do not touch each other's groups are made together, so what is kept never falls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layouts.base import Layout

SWEEPS, ATTEMPTS = 60, 4
ENOUGH = 2e-3  # a sweep that gains less than this part of all gains is the last
WORK = {"cpu": 2**28}  # of one matrix of distances: slots * slots * features; more features than that are left out
PARTNERS = 8  # of each slot, the best ones that are looked at in a sweep
LARGEST_GROUP = 64
PROBED = 256  # rows and columns of the random scores by which the groups of a layout are found


@dataclass
class Scored:
    """A weight that is going to be sparse: the score of each entry, in its layout's orientation, and what is kept.

    `at[c, k]` is the k-th place of channel c along `dim`.
    """

    score: Tensor
    layout: Layout
    sparsity: float | None
    dim: int
    at: Tensor

    def arranged(self, order: Tensor) -> Tensor:
        """The scores with channel `order[s]` in slot s."""
        index = torch.arange(self.score.shape[self.dim], device=self.at.device)
        index[self.at] = self.at[order]
        return self.score.index_select(self.dim, index)

    def mask(self, score: Tensor) -> Tensor:
        return self.layout.mask(score, self.sparsity)

    def kept(self, order: Tensor) -> float:
        score = self.arranged(order)
        return float(score.masked_fill(~self.mask(score), 0).sum(dtype=torch.float64))


def group_size(layout: Layout, shape: Sequence[int]) -> tuple[int, int, int] | None:
    """(n, m, dim) if the layout keeps n of every m consecutive rows (dim 0) or inputs (dim 1) of a weight; else None.

    The smallest m, found by the mask of random scores.
    """
    rate = layout.rate
    if rate is None:
        return None
    small = (min(shape[0], PROBED), min(shape[1], PROBED), *shape[2:])
    mask = layout.mask(torch.rand(small, generator=torch.Generator().manual_seed(0)))
    for m in range(2, LARGEST_GROUP + 1):
        for dim in (1, 0):
            size = small[dim]
            if not 0 < round(rate * m) < m or size < 2 * m:
                continue
            groups = mask.movedim(dim, 0).flatten(1)[: size // m * m].view(size // m, m, -1)
            if bool((groups.sum(1) == round(rate * m)).all()):
                return round(rate * m), m, dim
    return None


def vector_height(layout: Layout, shape: Sequence[int]) -> int:
    """How many consecutive rows are kept or dropped together, in the first column."""
    first = torch.zeros(tuple(shape), dtype=torch.float32)
    first[(0,) * len(shape)] = 1
    unit = layout.unit_entries(layout.unit_totals(first) > 0, tuple(shape))
    return int(unit.flatten(1).any(1).sum())


class _Groups:
    """The gains of exchanges where n of every m places along one dimension are kept."""

    def __init__(self, scored: Scored, n: int, m: int) -> None:
        self.scored, self.n, self.m = scored, n, m
        shape = scored.score.shape
        self.height = (
            vector_height(scored.layout, (min(shape[0], 4096), min(shape[1], m), *shape[2:])) if scored.dim else 1
        )
        self.group = scored.at // m
        # slots of one group have all their places in common groups
        same = [column.unique(return_inverse=True)[1] for column in self.group.T]
        self.fits = all(bool((other == same[0]).all()) for other in same)

    def features(self, score: Tensor) -> Tensor:
        """(places, features): what is kept or dropped together, by place along the dimension."""
        if self.scored.dim == 1:
            tail = -len(score) % self.height
            score = torch.cat([score, score.new_zeros(tail, *score.shape[1:])]) if tail else score
            score = score.view(-1, self.height, *score.shape[1:]).sum(1)
        return score.movedim(self.scored.dim, 0).flatten(1)

    def gains(self, score: Tensor) -> Tensor:
        x, n, m = self.features(score), self.n, self.m
        most = max(32, WORK.get(x.device.type, 2**36) // len(self.scored.at) ** 2)
        if x.shape[1] > most:
            x = x[:, x.sum(0).topk(most).indices]
        size = len(x)
        groups = torch.cat([x, x.new_full((-size % m, x.shape[1]), -1)]).view(-1, m, x.shape[1])
        best = groups.topk(min(n + 1, m), dim=1).values
        whole, nth, following = best[:, :n].sum(1), best[:, n - 1], best[:, n]
        gain = x.new_zeros(len(self.scored.at), len(self.scored.at))
        for at in self.scored.at.T:
            group = at // m
            q = x[at]
            inside = q >= nth[group]
            a = torch.where(inside, whole[group] - q, whole[group] - nth[group]).sum(1)
            b = torch.where(inside, following[group], nth[group])
            part = a + (b.sum(1)) / 2 - whole[group].sum(1)
            gain += part[:, None] + (q.sum(1)[None] + torch.cdist(b, q, p=1)) / 2
        gain = gain + gain.T
        return gain.masked_fill_(self.group[:, None, 0] == self.group[None, :, 0], 0)


class _Masked:
    """The gains of exchanges under the present mask."""

    def __init__(self, scored: Scored) -> None:
        self.scored = scored

    def gains(self, score: Tensor) -> Tensor:
        dim = self.scored.dim
        mask = self.scored.mask(score).movedim(dim, 0).flatten(1)[self.scored.at].flatten(1)
        x = score.movedim(dim, 0).flatten(1)[self.scored.at].flatten(1)
        new = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        new[1:] = (mask[1:] != mask[:-1]).any(1)  # slots of one block have the same mask: computed once
        value = (x @ mask[new].to(x.dtype).T)[:, new.cumsum(0) - 1]
        own = value.diagonal()
        return value + value.T - own[:, None] - own[None, :]


def search(problem: list[Scored], group: Tensor) -> Tensor:
    """The best order found: slot s gets channel order[s]. No weight keeps less than in the present order.

    Args:
        problem: the weights. The scores of each are divided by their sum, so that all count alike; a weight that would
            keep less counts more in the next attempt.
        group: (K,) channels of one group exchange places among each other only.
    """
    identity = torch.arange(len(group), device=group.device)
    factors = [1 / max(float(s.score.sum(dtype=torch.float64)), 1e-30) for s in problem]
    before = [s.kept(identity) for s in problem]
    for _ in range(ATTEMPTS):
        scaled = [dataclasses.replace(s, score=s.score * f) for s, f in zip(problem, factors, strict=True)]
        rules = [rule for s in scaled if (rule := _rule(s)) is not None]
        order = _improved(rules, group) if rules else identity
        less = [s.kept(order) < kept for s, kept in zip(problem, before, strict=True)]
        if not any(less):
            return order
        factors = [f * 4 if falls else f for f, falls in zip(factors, less, strict=True)]
    return identity


def _rule(scored: Scored) -> _Groups | _Masked | None:
    """How exchanges are judged; None where the order does not matter."""
    score, dim = scored.score, scored.dim
    found = group_size(scored.layout, tuple(score.shape))
    if found is not None and found[2] == dim:
        groups = _Groups(scored, *found[:2])
        return groups if groups.fits else _Masked(scored)
    shape = (min(score.shape[0], PROBED), min(score.shape[1], PROBED), *score.shape[2:])
    probe = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(1))
    here = scored.mask(probe).index_select(dim, order)
    return None if bool((scored.mask(probe.index_select(dim, order)) == here).all()) else _Masked(scored)


def _improved(rules: list[_Groups | _Masked], group: Tensor) -> Tensor:
    order = torch.arange(len(group), device=group.device)
    units = [order, *(rule.group[:, 0] for rule in rules if isinstance(rule, _Groups))]
    units = [unit.tolist() for unit in units]
    total = 0.0
    for _ in range(SWEEPS):
        gain = sum(rule.gains(rule.scored.arranged(order)) for rule in rules)
        gain.masked_fill_(group[:, None] != group[None, :], -torch.inf)  # slots keep their group
        value, partner = gain.topk(min(PARTNERS, len(group)), dim=1)
        chosen, more = _disjoint(value, partner, units)
        total += more
        if more <= ENOUGH * total:
            break
        p, q = torch.tensor(chosen, device=order.device).T
        order = order.index_copy(0, torch.cat([p, q]), order[torch.cat([q, p])])
    return order


def _disjoint(value: Tensor, partner: Tensor, units: list[list[int]]) -> tuple[list[tuple[int, int]], float]:
    """Exchanges of which no two touch one unit, the best first, and the sum of what they gain."""
    slot, rank = (value > 1e-6 / len(value)).nonzero(as_tuple=True)  # of weights whose scores sum to 1
    value, partner = value[slot, rank], partner[slot, rank]
    best = torch.argsort(value, descending=True, stable=True)
    used: list[set[int]] = [set() for _ in units]
    chosen, total = [], 0.0
    for p, q, gain in zip(slot[best].tolist(), partner[best].tolist(), value[best].tolist(), strict=True):
        if not any(unit[p] in taken or unit[q] in taken for unit, taken in zip(units, used, strict=True)):
            for unit, taken in zip(units, used, strict=True):
                taken |= {unit[p], unit[q]}
            chosen.append((p, q))
            total += gain
    return chosen, total
