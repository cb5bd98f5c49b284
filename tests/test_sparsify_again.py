"""sparsify of weights that are sparse already: another layout or sparsity, from the present numbers, in every form."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from cases import SMALL
from masked import expect_close, masked_twin, slots, sparse_weights, state
from small import loss_of, mlp, rate, train
from torch import nn

import sten
from sten.layouts import BSR, CSR, NM, FanIn, GroupedNM, Masked, VectorNM

pytestmark = pytest.mark.filterwarnings("ignore:sten. the masks leave rows empty")
STARTS = [(Masked(), sten.Magnitude()), (CSR(), sten.SET(40, every=2)), (NM(2, 4), sten.SRSTE(decay=1e-3))]
STARTS += [(BSR((4, 4)), sten.Magnitude()), (FanIn(), sten.RigL(40, every=2)), (CSR(), sten.Gradual(1, 5, every=1))]
STARTS += [(VectorNM(2, 4, 4), sten.Static()), (GroupedNM(2, 4, 1), sten.STE())]
each_start = pytest.mark.parametrize("first, method", STARTS, ids=str)


def half(layout) -> float | None:
    return 0.5 if layout.rate is None else None


def kept(numbers: torch.Tensor, present: torch.Tensor, layout) -> torch.Tensor:
    """The mask that the layout chooses of dense numbers, with what is gone below all else."""
    units = layout.unit_entries(layout.unit_totals(present.float()) > 0, tuple(numbers.shape))
    return layout.mask(numbers.abs().masked_fill(~units, -torch.inf), rate(layout))


@pytest.mark.parametrize("second", SMALL, ids=str)
@each_start
def test_one_shot(first, method, second):
    model = mlp()
    sten.sparsify(model, first, sten.Magnitude(), half(first))
    before, present = state(model), {name: w.mask() for name, w in sparse_weights(model).items()}
    sten.sparsify(model, second, sparsity=rate(second))
    for name, w in sparse_weights(model).items():
        want = kept(before[name], present[name], second)
        assert w.sparse_layout == second and isinstance(w, sten.SparseTensor)
        assert torch.equal(w.mask(), want) and torch.equal(w.to_dense(), before[name] * want)
    assert isinstance(model[0].weight, nn.Parameter)


@pytest.mark.parametrize("second", SMALL, ids=str)
@each_start
def test_in_training(first, method, second):
    """Numbers, gradients and optimizer state follow, the old method ends, and training goes on as the masked twin's."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sten.sparsify(model, first, method, half(first), optimizer=optimizer)
    train(model, optimizer, range(3), clip=None)
    finalized = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gradual has not reached its end
        sten.finalize(finalized)
    numbers, moments, params = state(finalized), slots(model, optimizer), set(map(id, model.parameters()))
    engine = model[0].weight_pattern.engine
    old = None if engine is None else weakref.ref(engine)
    del engine
    sten.sparsify(model, second, sparsity=rate(second), optimizer=optimizer)
    gc.collect()
    assert old is None or old() is None  # its hooks are removed
    assert set(map(id, model.parameters())) <= params
    for name, w in sparse_weights(model).items():
        want = kept(numbers[name], sparse_weights(finalized)[name].mask(), second)
        assert w.sparse_layout == second and torch.equal(w.mask(), want)
        assert torch.equal(w.to_dense(), numbers[name] * want)
        got = slots(model, optimizer)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(got[f"{name}/{key}"], moments[f"{name}/{key}"] * want)
    twin = masked_twin(mlp(), model)
    twin.load_state_dict(state(model))
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    have = slots(model, optimizer)
    for name, param in twin.named_parameters():
        other.state[param] = {k.rpartition("/")[2]: v.clone() for k, v in have.items() if k.startswith(name + "/")}
    train(model, optimizer, range(3, 6), clip=None)
    for step in range(3, 6):
        other.zero_grad()
        loss_of(twin, step).backward()
        other.step()
    expect_close(state(model), state(twin))


def test_50_to_90_percent_by_globs_and_defaults():
    for how in ({}, {"weights": "*"}, {"weights": "0.*"}, {"weights": nn.Linear}, {"layout": {"0.weight": CSR()}}):
        model = sten.sparsify(mlp(), CSR(), sparsity=0.5)
        left = model[0].weight.mask()
        sten.sparsify(model, **{"layout": CSR(), **how}, sparsity=0.9)
        assert model[0].weight.density == 0.1 and not (model[0].weight.mask() & ~left).any(), how
        assert model[2].weight.density == (0.5 if "0" in str(how.values()) else 0.1), how


def test_random_does_not_bring_pruned_entries_back():
    model = sten.sparsify(mlp(), CSR(), sparsity=0.5)
    left = model[0].weight.mask()
    sten.sparsify(model, CSR(), sten.Random(), sparsity=0.8)
    assert not (model[0].weight.mask() & ~left).any() and model[0].weight.density == 0.2


def test_none_keeps_the_pattern():
    model = sten.sparsify(mlp(), NM(2, 4))
    want, mask = model[0].weight.to_dense(), model[0].weight.mask()
    sten.sparsify(model, CSR(), None)
    assert torch.equal(model[0].weight.to_dense(), want) and torch.equal(model[0].weight.mask(), mask)


@pytest.mark.parametrize("then", [sten.RigL(40, every=2), sten.Gradual(2, 6, every=2), sten.SRSTE()], ids=str)
@each_start
def test_another_method_takes_over(first, method, then):
    """In every form before; also on a weight that a method of dense weights trains then."""
    for form in ("finalized", "trainable", "trained"):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if form == "trained":
            sten.sparsify(model, first, method, half(first), optimizer=optimizer)
            train(model, optimizer, range(3))
        else:
            sten.sparsify(model, first, sten.Magnitude(), half(first))
            model = sten.trainable(model) if form == "trainable" else model
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sten.sparsify(model, CSR(), then, 0.75, optimizer=optimizer)
        assert model[0].weight_pattern.method == then and model[0].weight_pattern.engine is not None
        if form == "trained":
            assert any(slot.abs().sum() > 0 for name, slot in slots(model, optimizer).items() if "0.weight" in name)
        train(model, optimizer, range(8))
        sten.finalize(model)
        assert model[0].weight.sparse_layout == CSR() and model[0].weight.density == 0.25


def test_rigl_goes_on_at_a_higher_sparsity():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sten.sparsify(model, CSR(), sten.RigL(40, every=2), sparsity=0.5, optimizer=optimizer)
    train(model, optimizer, range(3))
    sten.sparsify(model, CSR(), sten.RigL(80, every=3), sparsity=0.9, optimizer=optimizer)
    engine = model[0].weight_pattern.engine
    assert engine.step == 0 and len(optimizer._optimizer_step_post_hooks) == 1
    train(model, optimizer, range(7))
    assert engine.updates == 2 and sten.finalize(model)[0].weight.density == 0.1


def test_one_of_two_weights_leaves_its_engine():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sten.sparsify(model, CSR(), sten.SET(40, every=2), sparsity=0.5, optimizer=optimizer)
    engine = model[0].weight_pattern.engine
    sten.sparsify(model, CSR(), sparsity=0.9, weights="2", optimizer=optimizer)
    assert model[2].weight_pattern.engine is None and engine.weights == [model[0].weight_pattern]
    train(model, optimizer, range(5))
    assert engine.updates == 2
    assert {n: w.density for n, w in sparse_weights(model).items()} == {"0.weight": 0.5, "2.weight": 0.1}


def test_a_trainable_weight_stays_trainable_and_its_optimizer_follows():
    """Without optimizer=: those that sten knows of."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sten.sparsify(model, CSR(), sparsity=0.5, optimizer=optimizer)
    train(model, optimizer, range(2))
    moments = slots(model, optimizer)["0.weight/exp_avg"]
    sten.sparsify(model, CSR(), sparsity=0.9)
    assert model[0]._parameters["weight"].shape == (24, 1)
    assert torch.equal(slots(model, optimizer)["0.weight/exp_avg"], moments * model[0].weight.mask())
    train(model, optimizer, range(2))


def test_ties_and_transposes():
    from transformers.pytorch_utils import Conv1D

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Conv1D(8, 12), Conv1D(8, 12)
            self.two.weight = self.one.weight

    model = Tied()
    dense = model.one.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters())
    sten.sparsify(model, CSR(), sparsity=0.5, optimizer=optimizer)
    half = model.one.weight.detach().to_dense()
    sten.sparsify(model, NM(1, 4), optimizer=optimizer)
    assert torch.equal(half != 0, half == dense) and model.one.weight_pattern is model.two.weight_pattern
    sten.finalize(model)
    w = model.one.weight
    assert model.two.weight is w and w.transposed and w.shape == (12, 8) and w.stored_shape == (8, 12)
    assert torch.equal(w.to_dense(), half * w.mask()) and torch.equal(w.mask().sum(0), torch.full((8,), 3))


def test_a_refusal_changes_nothing():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sten.sparsify(model, CSR(), sten.RigL(40, every=2), sparsity=0.5, optimizer=optimizer)
    before, engine = state(model), model[0].weight_pattern.engine
    for layout, method, sparsity in ((NM(2, 4), sten.Magnitude(), 0.9), (CSR(), sten.SRigL(40, every=4), 0.9)):
        with pytest.raises(ValueError, match="Expected"):
            sten.sparsify(model, layout, method, sparsity, optimizer=optimizer)
        expect_close(state(model), before, 0, 0)
        assert model[0].weight_pattern.engine is engine and len(engine.weights) == 2
    plan = sten.plan(model, CSR(), sparsity=0.9)
    assert plan.rows[0].shape == (20, 12) and model[0].weight_pattern.engine is engine
