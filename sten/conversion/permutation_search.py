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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layouts.base import Layout

SWEEPS = 60
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


def group_size(layout: Layout, shape: Sequence[int], dim: int) -> tuple[int, int] | None:
    """(n, m) if the layout keeps n of every m consecutive rows (dim 0) or inputs (dim 1) of a weight; else None."""
    rate, size = layout.rate, min(shape[dim], PROBED)
    if rate is None:
        return None
    small = (min(shape[0], PROBED), min(shape[1], PROBED), *shape[2:])
    mask = layout.mask(torch.rand(small, generator=torch.Generator().manual_seed(0))).movedim(dim, 0).flatten(1)
    for m in range(2, min(LARGEST_GROUP, size // 2) + 1):
        counts = mask[: size // m * m].view(size // m, m, -1).sum(1)
        if 0 < round(rate * m) < m and bool((counts == round(rate * m)).all()):
            return round(rate * m), m
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
        self.height = vector_height(scored.layout, (min(shape[0], 4096), min(shape[1], m), *shape[2:])) if scored.dim else 1
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


def search(problem: list[Scored], group: Tensor, starts: Sequence[Callable[[], Tensor]] = ()) -> Tensor:
    """The best order found: slot s gets channel order[s]. No weight keeps less than in the present order.

    Args:
        problem: the weights, whose scores are each divided by their sum here, so that all count alike.
        group: (K,) channels of one group exchange places among each other only.
    """
    identity = torch.arange(len(group), device=group.device)
    totals = [max(float(s.score.sum(dtype=torch.float64)), 1e-300) for s in problem]
    problem = [Scored(s.score / t, s.layout, s.sparsity, s.dim, s.at) for s, t in zip(problem, totals, strict=True)]
    rules = [rule for s in problem if (rule := _rule(s)) is not None]
    if not rules:
        return identity
    before = [s.kept(identity) for s in problem]
    best, best_gain = identity, 1e-7
    for start in (identity, _by_size(problem, group)):
        order = _improved(rules, group, start)
        after = [s.kept(order) for s in problem]
        gain = sum(after) - sum(before)
        if gain > best_gain and all(a >= b for a, b in zip(after, before, strict=True)):
            best, best_gain = order, gain
    return best


def _rule(scored: Scored) -> _Groups | _Masked | None:
    """How exchanges are judged; None where the order does not matter."""
    score, dim = scored.score, scored.dim
    size = group_size(scored.layout, tuple(score.shape), dim)
    if size is not None:
        groups = _Groups(scored, *size)
        return groups if groups.fits else _Masked(scored)
    shape = (min(score.shape[0], PROBED), min(score.shape[1], PROBED), *score.shape[2:])
    probe = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(1))
    here = scored.mask(probe).index_select(dim, order)
    return None if bool((scored.mask(probe.index_select(dim, order)) == here).all()) else _Masked(scored)


def _by_size(problem: list[Scored], group: Tensor) -> Tensor:
    """Channels by their score, the largest first, within each group's slots: what blocks keep lies together then."""
    size = sum(s.score.movedim(s.dim, 0).flatten(1).sum(1)[s.at].sum(1) for s in problem)
    by_size = torch.argsort(size, descending=True)
    order = torch.empty_like(by_size)
    order[torch.argsort(group, stable=True)] = by_size[torch.argsort(group[by_size], stable=True)]
    return order


def _improved(rules: list, group: Tensor, order: Tensor) -> Tensor:
    units = torch.stack([torch.arange(len(group)), *(r.group[:, 0].cpu() for r in rules if isinstance(r, _Groups))])
    units = [column.tolist() for column in units]
    for _ in range(SWEEPS):
        gain = sum(rule.gains(rule.scored.arranged(order)) for rule in rules)
        gain.masked_fill_(group[:, None] != group[None, :], -torch.inf)  # slots keep their group
        value, partner = gain.topk(min(PARTNERS, len(group)), dim=1)
        least = 1e-6 * len(rules) / len(group)
        slot, rank = (value > least).nonzero(as_tuple=True)
        best = torch.argsort(value[slot, rank], descending=True)
        pairs = torch.stack([slot, partner[slot, rank]])[:, best].T.tolist()
        used = [set() for _ in units]
        chosen = []
        for p, q in pairs:
            if not any(u[p] in taken or u[q] in taken for u, taken in zip(units, used, strict=True)):
                for u, taken in zip(units, used, strict=True):
                    taken |= {u[p], u[q]}
                chosen.append((p, q))
        if not chosen:
            break
        p, q = torch.tensor(chosen, device=order.device).T
        order = order.clone()
        order[p], order[q] = order[q], order[p]
    return order
