"""The search for an order: what exchanges gain, by trying each, and that no weight keeps less."""

from __future__ import annotations

import pytest
import torch
from cases import COPIES, SMALL, silent_copies

import sten
from sten.conversion.permutation_search import Scored, _Groups, _Masked, _rule, group_size, search


def scores(rows, columns, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=random).square()


def exchanged(scored, p, q):
    order = torch.arange(len(scored.at))
    order[p], order[q] = q, p
    return order


@pytest.mark.parametrize("places", [(24, 0, 1), (22, 0, 1), (24, 4, 1), (24, 0, 2)], ids=str)
@pytest.mark.parametrize(
    "layout", [sten.NM(2, 4), sten.NM(1, 3), sten.VectorNM(2, 4, 4), sten.VectorNM(1, 4, 64)], ids=str
)
def test_what_an_exchange_gains(layout, places):
    """Also where the sizes divide nothing, other columns lie between, or a channel has several places."""
    width, start, several = places
    at = torch.arange(start, width).view(several, -1).T
    scored = Scored(scores(10, width), layout, None, 1, at)
    rule = _rule(scored)
    identity = torch.arange(len(at))
    gains = rule.gains(scored.arranged(identity))
    before = scored.kept(identity)
    for p in range(len(at)):
        for q in range(len(at)):
            gained = scored.kept(exchanged(scored, p, q)) - before
            if isinstance(rule, _Groups):
                assert float(gains[p, q]) == pytest.approx(gained, abs=1e-4)
            else:
                assert float(gains[p, q]) <= gained + 1e-4


@pytest.mark.parametrize("layout", [sten.BSR((4, 4)), sten.VectorNM(2, 4, 4), sten.BSR((3, 5))], ids=str)
def test_under_the_present_mask_a_gain_is_a_lower_bound(layout):
    scored = Scored(scores(24, 20), layout, None if layout.rate else 0.5, 0, torch.arange(24)[:, None])
    rule, identity = _rule(scored), torch.arange(24)
    assert isinstance(rule, _Masked)
    gains, before = rule.gains(scored.arranged(identity)), scored.kept(identity)
    for p in range(24):
        for q in range(24):
            assert float(gains[p, q]) <= scored.kept(exchanged(scored, p, q)) - before + 1e-5


def test_groups_are_found_from_masks():
    shape = (64, 96)
    assert group_size(sten.NM(2, 4), shape) == (2, 4, 1) and group_size(sten.NM(16, 32), shape) == (16, 32, 1)
    assert group_size(sten.VectorNM(1, 8, 32), shape) == (1, 8, 1)
    assert group_size(sten.GroupedNM(1, 4, 4), shape) == (1, 4, 0)
    assert group_size(sten.NM(2, 4), (16, 12, 3, 3)) == (2, 4, 1)
    assert [group_size(layout, shape) for layout in (sten.CSR(), sten.BSR((4, 4)), sten.FanIn())] == [None] * 3
    assert [_rule(Scored(scores(*shape), layout, 0.5, d, torch.arange(shape[d])[:, None]))
            for layout in (sten.CSR(), sten.Masked(), sten.FanIn()) for d in (0, 1)] == [None] * 6  # fmt: skip


@silent_copies
@pytest.mark.parametrize("layout", [*SMALL, *COPIES], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_weight_keeps_less_and_groups_stay(layout, seed):
    sparsity = None if layout.rate else 0.6
    at = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:32, None].sort(0).values
    problem = [
        Scored(scores(40, 24, seed), layout, sparsity, 0, at),
        Scored(scores(24, 40, seed + 9), layout, sparsity, 1, at),
    ]
    group = torch.arange(32) % 2
    order = search(problem, group)
    assert torch.equal(order.sort().values, torch.arange(32)) and torch.equal(group[order], group)
    for scored in problem:
        assert scored.kept(order) >= scored.kept(torch.arange(32)) - 1e-9
        outside = torch.ones(40, dtype=torch.bool)
        outside[at] = False
        index = torch.arange(40)
        index[at] = at[order]
        assert torch.equal(index[outside], torch.arange(40)[outside])
