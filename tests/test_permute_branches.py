"""permute: branches that the example does not take, and optimizers that have state."""

from __future__ import annotations

import copy

import pytest
import torch
from permuted import mlp, uneven
from torch import nn

import sten


class Branches(nn.Module):
    """An MLP whose hidden channels are read by another layer where a batch is large, or in training."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.kind = nn.Linear(8, 32), nn.Linear(32, 8), kind
        self.other = nn.Parameter(torch.randn(8, 32)) if kind == "parameter" else nn.Linear(32, 8)

    def forward(self, x):
        h = self.up(x).relu()
        if len(x) > 4 if self.kind != "training" else self.training:
            return h @ self.other.T if self.kind == "parameter" else self.other(h)
        return self.down(h)


def outputs(model, kind):
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    model.train(kind == "training")
    with torch.no_grad():
        return torch.cat([model(x[:3]), model(x)])


@pytest.mark.parametrize("kind", ["size", "training", "parameter"])
def test_a_branch_that_the_example_does_not_take(kind):
    torch.manual_seed(0)
    model = nn.Sequential(uneven(Branches(kind)), nn.Identity())
    before = outputs(model, kind)
    report = sten.permute(model, sten.NM(2, 4), example=torch.randn(3, 8))
    torch.testing.assert_close(outputs(model, kind), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    [row] = [row for row in report.rows if row.name == "0.down.weight"]
    name = "0.other" if kind == "parameter" else "0.other.weight"
    assert row.columns == f"stay: the example did not use {name}, which may read it"
    if kind != "training":  # an example that takes the branch
        report = sten.permute(model, sten.NM(2, 4), example=torch.randn(8, 8))
        torch.testing.assert_close(outputs(model, kind), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert(), Expert()])

    def forward(self, x):
        return self.experts[int(x.sum() > 0)](x)


def test_an_expert_without_tokens_leaves_the_others_free():
    torch.manual_seed(0)
    model, x = uneven(Experts()), torch.rand(4, 8)
    with torch.no_grad():
        before = [model(x), model(-x)]
    report = sten.permute(model, sten.NM(2, 4), example=x)
    remarks = {row.name: row.columns for row in report.rows}
    assert remarks["experts.1.down.weight"] == "permuted" and "did not" in remarks["experts.0.down.weight"]
    with torch.no_grad():
        for got, want in zip((model(x), model(-x)), before, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


class Long(Expert):
    """A branch without weights, for more rows than the example of permute has."""

    def forward(self, x):
        h = self.up(x).relu()
        return self.down(h.flip(-1) if len(x) > 2 else h)


def test_the_first_batch_is_compared_as_a_whole():
    torch.manual_seed(0)
    model = uneven(nn.Sequential(Long()))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="nothing was changed"):
        sten.permute(model, sten.NM(2, 4), calibration=[torch.randn(3, 12, 8)])
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    report = sten.permute(model, sten.NM(2, 4), calibration=[torch.randn(2, 12, 8)])
    assert "permuted" in str(report)


# ---- state of optimizers

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "two": lambda params: [torch.optim.Adam(params[:2], lr=1e-2), torch.optim.SGD(params[2:], lr=1e-2, momentum=0.9)],
}


def step(model, optimizers, x):
    for one in optimizers:
        one.zero_grad()
    model(x).square().mean().backward()
    for one in optimizers:
        one.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_moves_along(kind):
    """Training goes on as that of a model that was not permuted."""
    models, runs, xs = [], [], torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(0))
    for permuted in (False, True):
        model, _ = mlp()
        made = OPTIMIZERS[kind](list(model.parameters()))
        optimizers = made if isinstance(made, list) else [made]
        for x in xs[:3]:
            step(model, optimizers, x)
        if permuted:
            assert "permuted" in str(sten.permute(model, sten.NM(2, 4), example=xs[0], optimizer=made))
        for x in xs[3:]:
            step(model, optimizers, x)
        models.append(model)
        runs.append(optimizers)
    y, z = (model(xs[0]).detach() for model in models)
    torch.testing.assert_close(z, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    sums = [sorted(float(t.sum()) for o in run for s in o.state.values() for t in s.values()) for run in runs]
    assert sums[1] == pytest.approx(sums[0], rel=1e-2, abs=1e-5)


def test_state_that_cannot_move_is_refused():
    for make in (lambda p: torch.optim.Adafactor(p, lr=1e-2), lambda p: torch.optim.LBFGS(p)):
        model, x = mlp()
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(TypeError, match="Expected another optimizer"):
            sten.permute(model, sten.NM(2, 4), example=x, optimizer=make(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_state_is_restored_after_an_error():
    torch.manual_seed(0)
    model = uneven(nn.Sequential(Long()))
    optimizer = torch.optim.Adam(model.parameters())
    step(model, [optimizer], torch.randn(2, 12, 8))
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="nothing was changed"):
        sten.permute(model, sten.NM(2, 4), calibration=[torch.randn(3, 12, 8)], optimizer=optimizer)
    for key, slots in optimizer.state_dict()["state"].items():
        assert all(torch.equal(slots[name], state[key][name]) for name in slots)
