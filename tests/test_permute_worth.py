"""permute counts rows by what their channels are worth to the layers that read them."""

from __future__ import annotations

import copy

import pytest
import torch
from permuted import hugging_face, mlp
from torch import nn

import sten

BLOCKS = sten.BSR((8, 8))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(24, 64), nn.Linear(24, 64), nn.Linear(64, 24)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def gated(scaled: bool) -> tuple[Gated, torch.Tensor]:
    """The same function; `scaled`: rows of up are smaller by powers of two, and columns of down larger."""
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(256, 24)
    sizes = torch.randn(64).mul(1.5).round().exp2() if scaled else torch.ones(64)
    with torch.no_grad():
        model.up.weight.div_(sizes[:, None])
        model.up.bias.div_(sizes)
        model.down.weight.mul_(sizes)
    return model, x


@torch.no_grad()
def lost(model: nn.Module, x: torch.Tensor) -> float:
    """The error of the whole model's output, pruned."""
    y = model(x)
    pruned = sten.sparsify(copy.deepcopy(model), BLOCKS, sten.Wanda(), sparsity=0.3, calibration=[x])
    return float((pruned(x) - y).norm() / y.norm())


def test_the_order_does_not_depend_on_how_channels_are_scaled():
    (plain, x), (scaled, _) = gated(False), gated(True)
    before = plain.gate.weight.detach().clone()
    reports = [sten.permute(model, BLOCKS, 0.3, calibration=[x]) for model in (plain, scaled)]
    assert torch.equal(plain.gate.weight, scaled.gate.weight)  # which is not scaled: it tells the order
    assert not torch.equal(plain.gate.weight, before)
    for a, b in zip(*(report.rows for report in reports), strict=True):
        assert (a.kept_before, a.kept_after) == pytest.approx((b.kept_before, b.kept_after), rel=1e-5)
        assert a.kept_after > a.kept_before


@pytest.mark.filterwarnings("ignore:sten. the masks leave rows empty")
@pytest.mark.parametrize("scaled", [False, True])
def test_blocks_of_a_permuted_model_lose_less_of_its_output(scaled):
    """Sorted by their own scores, the rows of up made it worse where they are scaled: 0.58 to 0.62."""
    model, x = gated(scaled)
    before = lost(model, x)
    sten.permute(model, BLOCKS, 0.3, calibration=[x])
    assert lost(model, x) < 0.9 * before


@pytest.mark.parametrize("measured", [True, False])
def test_the_score_by_hand(measured):
    """Rows of a channel sum to the score of the columns that read it. Where the input of those was not measured, the
    rows' own sum stands for its mean square."""
    model, _ = mlp()
    x = torch.randn(200, 12)
    first, second = model[0].weight.detach().square(), model[3].weight.detach().square()
    score = first
    if measured:
        score = first * x.square().mean(0)
        read = (second * model[:3](x).detach().square().mean(0)).sum(0)
    else:
        read = second.sum(0) * first.sum(1)
    score = score / score.sum(1, keepdim=True) * read[:, None]
    mask = sten.BSR((4, 4)).mask(score, 0.5)
    more = {"calibration": [x]} if measured else {"example": x}
    row = sten.permute(model, sten.BSR((4, 4)), 0.5, weights=["0", "3"], **more).rows[0]
    assert row.kept_before == pytest.approx(float(score[mask].sum() / score.sum()), rel=1e-4)
    assert row.kept_after > row.kept_before


def test_of_fused_rows_those_that_stay_count_as_before():
    """The weights of the rows that move leave their sum as it is."""
    pytest.importorskip("transformers")
    model, example = hugging_face("gpt2")
    w, o = (getattr(model.h[0].attn, name).weight.detach().square() for name in ("c_attn", "c_proj"))
    w, own = w.T.clone(), w.T[64:].sum(1)  # queries, keys, values
    read = o.sum(1) * own
    w[64:] *= (read / read.sum() * own.sum() / own)[:, None]
    mask = sten.BSR((4, 4)).mask(w, 0.5)
    names = ["h.0.attn.c_attn", "h.0.attn.c_proj"]
    row = sten.permute(model, sten.BSR((4, 4)), 0.5, names, example=example).rows[0]
    assert row.name == "h.0.attn.c_attn.weight" and row.kept_after > row.kept_before
    assert row.kept_before == pytest.approx(float(w[mask].sum() / w.sum()), rel=1e-4)


def test_nothing_that_reads_or_makes_is_worth_anything():
    """Layers of zeros and channels without a signal: no division by zero."""
    for zero in ("up", "down", "x"):
        model, x = gated(False)
        with torch.no_grad():
            (x if zero == "x" else getattr(model, zero).weight).zero_()
            model.up.weight[:5] = 0
        y = model(x)
        report = sten.permute(model, BLOCKS, 0.3, calibration=[x])
        torch.testing.assert_close(model(x), y)
        assert all(0 <= row.kept_before <= row.kept_after <= 1 for row in report.rows)
