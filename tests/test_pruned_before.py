"""Calibrated methods on weights that were pruned before: nothing comes back, and counts are exact."""

from __future__ import annotations

import pytest
import torch
from cases import SMALL
from one_shot_views import damped, error, least_squares, view_of
from torch import nn
from torch.nn.utils import prune

import sten
from sten.layouts import BSR, CSR, NM, GroupedNM, Masked, VectorNM

pytestmark = pytest.mark.filterwarnings("ignore:sten. the masks leave rows empty")
UPDATES = [
    sten.SparseGPT(), sten.ADMM(), sten.LeastSquares(), sten.chain(sten.Wanda(), sten.SparseGPT()),
    sten.chain(sten.Wanda(), sten.Reconstruct(steps=4)), sten.chain(sten.Wanda(), sten.SparseSwaps(), sten.ADMM()),
]  # fmt: skip
EARLIER = ["prune", "csr", "trainable"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def pruned(earlier: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model of which a third is left, in rows and groups unequally many, and where."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    masks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            odds = torch.rand(len(layer.weight), 1) * 0.6
            masks[name] = torch.rand(layer.weight.shape) < odds
            prune.custom_from_mask(layer, "weight", masks[name])
    if earlier != "prune":
        sten.sparsify(model, CSR(), sparsifier=None)
    return sten.trainable(model) if earlier == "trainable" else model, masks


@pytest.mark.parametrize("method", UPDATES, ids=str)
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_nothing_comes_back(layout, method):
    model, masks = pruned(EARLIER[SMALL.index(layout) % len(EARLIER)])
    dense = {name: model.get_submodule(name).weight.detach() for name in masks}
    dense = {name: w.to_dense() if isinstance(w, sten.SparseTensor) else w for name, w in dense.items()}
    x = torch.randn(2, 64, 16)
    sten.sparsify(model, layout, method, None if layout.rate else 0.8, calibration=[x])
    for name, left in masks.items():
        w = model.get_submodule(name).weight.detach().to_dense()
        assert not bool((w != 0)[~left].any()), name
        assert bool((w != 0).any()) and not torch.equal(w, dense[name])


class Everywhere(sten.extend.PatternMethod):
    """A user's method that gives values to all entries."""

    def update(self, view):
        mask = view.layout.mask(torch.rand(view.weight.shape), view.sparsity)
        return sten.extend.Edit(mask=mask, value=torch.ones_like(view.weight))


@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_nothing_comes_back_by_a_users_method(layout):
    model, masks = pruned("csr")
    sten.sparsify(model, layout, Everywhere(), None if layout.rate else 0.5)
    for name, left in masks.items():
        w = model.get_submodule(name).weight.detach()
        want = (w.mask() & left).float()
        assert torch.equal(w.to_dense(), want) and bool(want.any())


@pytest.mark.parametrize(
    "layout", [NM(2, 4), CSR(), BSR((4, 4)), VectorNM(2, 4, 4), GroupedNM(2, 4, 1), NM(8, 16)], ids=str
)
def test_values_are_the_best_of_what_is_left(layout):
    """LeastSquares is what a direct solver finds; SparseGPT makes up for what is dropped and for what is not left."""
    left = torch.rand(24, 32, generator=torch.Generator().manual_seed(3)) < 0.4
    units = layout.unit_entries(layout.unit_totals(left.float()) > 0, (24, 32))
    view = view_of(layout, sparsity=0.6, allowed=units, left=left)
    view.weight.mul_(left)
    edit = sten.LeastSquares(iterations=200).update(view)
    want = least_squares(view.weight, edit.mask & left, damped(view))
    torch.testing.assert_close(edit.value.double(), want, atol=1e-4, rtol=1e-3)
    gpt = sten.SparseGPT().update(view)
    best = error(view, sten.extend.Edit(mask=gpt.mask, value=least_squares(view.weight, gpt.mask & left, damped(view))))
    plain = error(view, sten.extend.Edit(mask=gpt.mask, value=view.weight.masked_fill(~gpt.mask, 0)))
    assert not bool(gpt.value[~left].any())
    assert best.sum() <= error(view, gpt).sum() < plain.sum()


# ---- counts of rows


def rule(score, allowed, count):
    """Entry after entry: from the row that has the fewest, the best that is allowed; at the end the best rows first."""
    mask = torch.zeros_like(allowed)
    while int(mask.sum()) < count:
        free = allowed & ~mask
        if not bool(free.any()):
            break
        rows = free.any(1).nonzero().flatten()
        fewest = int(mask.sum(1)[rows].min())
        rows = [int(r) for r in rows if int(mask[r].sum()) == fewest]
        best = {r: score[r].masked_fill(~free[r], -1).max() for r in rows}
        row = max(rows, key=lambda r: best[r])
        mask[row, score[row].masked_fill(~free[row], -1).argmax()] = True
    return mask


@pytest.mark.parametrize("sparsity", [0.95, 0.8, 0.7, 0.55, 0.3, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_wanda_by_row(seed, sparsity):
    random = torch.Generator().manual_seed(seed)
    left = torch.rand(13, 21, generator=random) < torch.rand(13, 1, generator=random)
    for layout in (CSR(), Masked()):
        view = view_of(layout, (13, 21), sparsity, seed, allowed=left, left=left)
        view.weight.mul_(left)
        mask = sten.Wanda().update(view).mask
        count = round((1 - sparsity) * 13 * 21)
        assert int(mask.sum()) == count and int((mask & left).sum()) == min(count, int(left.sum()))
        if count <= int(left.sum()):
            assert torch.equal(mask, rule(view.weight.abs() * view.stats["x_norm"], left, count))
        else:  # filled up evenly
            more, room = (mask & ~left).sum(1), (~left).sum(1)
            assert bool(((more >= more.max() - 1) | (more == room)).all())


@pytest.mark.parametrize("earlier", EARLIER)
def test_wanda_keeps_its_count_after_an_earlier_pruning(earlier):
    model, masks = pruned(earlier)
    sten.sparsify(model, CSR(), sten.Wanda(), 0.8, calibration=[torch.randn(2, 64, 16)])
    for name, left in masks.items():
        w = model.get_submodule(name).weight.detach()
        nonzero = w.to_dense() != 0
        assert int(nonzero.sum()) == int(w.mask().sum()) == round(0.2 * left.numel())
        rows, most = nonzero.sum(1), int(nonzero.sum(1).max())
        assert bool(((rows >= most - 1) | (rows == left.sum(1))).all())  # equal, but where a row had fewer
