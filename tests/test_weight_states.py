"""States of a weight: finalized or frozen while others train, loaded while it trains, on meta, and running averages."""

import copy

import pytest
import torch
from torch import nn
from training_models import OPTIMIZERS, dense_weights, engine_of, loss_of, masks, mlp, sparse, train

import sten
from sten.layouts import BSR, CSR, NM, Masked

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_layer_finalized_while_the_others_train():
    model, optimizer, engine = sparse(sten.RigL(24, every=4))
    train(model, optimizer, 5)
    sten.finalize(model[0])
    train(model, optimizer, 4, first=5)
    assert [weight.name for weight in engine.weights] == ["2.weight"] and engine.updates == 2
    train(model, optimizer, 2, first=9)
    assert engine.backward_passes == 1  # counted at a weight that the engine has
    loss_of(model, 11).backward()
    assert list(engine.gradients.collectors) == engine.weights  # the next step is a mask update
    assert model[0].weight.cache.dense_gradient is None


def test_a_layer_frozen_before_attach_keeps_its_mask():
    model = sten.sparsify(mlp(), CSR(), sten.RigL(24, every=4), 0.75)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model[0].weight.requires_grad_(False)
    sten.attach(model, optimizer)
    before = masks(model)
    train(model, optimizer, 4)
    assert engine_of(model).updates == 1
    assert [torch.equal(a, b) for a, b in zip(before, masks(model), strict=True)] == [True, False]


def test_a_state_dict_loaded_into_a_running_model_brings_its_mask():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = pytest.importorskip("transformers").pytorch_utils.Conv1D(8, 16)

        def forward(self, x):
            return self.conv(x)

    model = Transposed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sten.sparsify(model, CSR(), sten.Gradual(1, 9, every=4), 0.75, optimizer=optimizer)
    train(model, optimizer, 3)
    saved = copy.deepcopy(model.state_dict())
    train(model, optimizer, 8)
    assert int(model.conv._parameters["weight"].count_nonzero()) == 32
    model.load_state_dict(saved)
    train(model, optimizer, 1, first=3)
    assert int(model.conv._parameters["weight"].count_nonzero()) == 128


@pytest.mark.parametrize("method", [sten.SET(24, every=4), sten.Gradual(2, 14, 4), sten.SRSTE()], ids=str)
def test_a_model_on_the_meta_device_takes_a_state_dict_by_assignment(method):
    layout = NM(2, 4) if isinstance(method, sten.SRSTE) else CSR()
    model, optimizer, _ = sparse(method, layout)
    train(model, optimizer, 5)
    state = copy.deepcopy(model.state_dict())
    other = sten.sparsify(mlp(), layout, method, None if layout.rate else 0.75).to("meta")
    other.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in other.state_dict().values())
    second = OPTIMIZERS["momentum"](other.parameters())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    sten.attach(other, second)
    train(model, optimizer, 5, first=5)
    train(other, second, 5, first=5)
    assert all(map(torch.equal, dense_weights(model), dense_weights(other)))


@pytest.mark.cell("SWA", form="trainable")
@pytest.mark.parametrize("layout", [CSR(), BSR((4, 4)), Masked()], ids=str)
def test_an_average_follows_the_pattern(layout):
    model, optimizer, engine = sparse(sten.RigL(24, every=3), layout)
    average = sten.follow(torch.optim.swa_utils.AveragedModel(model), model)
    sums, mask = [torch.zeros(32, 16), torch.zeros(8, 32)], masks(model)
    for step in range(10):
        train(model, optimizer, 1, first=step)
        now = masks(model)
        sums = [s * m for s, m in zip(sums, now, strict=True)]  # a dropped entry loses its average
        average.update_parameters(model)
        sums = [(s * step + w) / (step + 1) for s, w in zip(sums, dense_weights(model), strict=True)]
    assert engine.updates == 3 and not torch.equal(mask[0], now[0])
    for have, want, m in zip(dense_weights(average.module), sums, now, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
        assert not have[~m].any()
    with pytest.raises(ValueError, match="deep copy"):
        sten.follow(mlp(), model)


@pytest.mark.cell("SWA", form="dense weight", layout="CSR")
def test_an_average_of_dense_weights_needs_no_call():
    model, optimizer, _ = sparse(sten.Gradual(2, 8, 3))
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(10):
        train(model, optimizer, 1, first=step)
        average.update_parameters(model)
    assert torch.equal(masks(average.module)[0], masks(model)[0])
    assert sten.finalize(average.module)[0].weight.density == 0.25


def by_parameters(average, model):
    """An average as Hugging Face's EMA: of the Parameters alone."""
    with torch.no_grad():
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.lerp_(p, 0.1)


def by_state_dict(average, model):
    """An average as timm's: of whatever the state dict has, masks and counts included."""
    with torch.no_grad():
        for a, p in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            a.copy_(0.9 * a + 0.1 * p)


DENSE = [
    (sten.Gradual(2, 11, 3), CSR()), (sten.Gradual(2, 11, 3), BSR((4, 4))), (sten.Gradual(2, 11, 3), Masked()),
    (sten.BlockPruneGrow(2, 11, 3), BSR((4, 4))), (sten.SRSTE(), NM(2, 4)), (sten.DecayingMask(12), NM(2, 4)),
    (sten.Transposable(refresh=3), NM(2, 4)), (sten.BiMask(refresh=3), NM(2, 4)),
]  # fmt: skip


@pytest.mark.parametrize("average_by", [by_parameters, by_state_dict])
@pytest.mark.parametrize("case", DENSE, ids=lambda c: f"{type(c[0]).__name__}-{type(c[1]).__name__}")
@pytest.mark.parametrize("late", [False, True])
def test_an_average_of_a_dense_weight_ends_as_sparse_as_the_model(case, average_by, late):
    method, layout = case
    model, optimizer, _ = sparse(method, layout, 0.75, "adamw")
    average = copy.deepcopy(model)
    if not late:
        sten.follow(average, model)
    for step in range(14):
        train(model, optimizer, 1, first=step)
        average_by(average, model)
        if late and step == 6:
            sten.follow(average, model)
    if not isinstance(method, (sten.SRSTE, sten.DecayingMask)):  # those take the mask of the weight as it is
        pairs = list(zip(masks(average), masks(model), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs if not isinstance(method, sten.BiMask))
        assert torch.equal(average[0].weight_pattern.mask, model[0].weight_pattern.mask)
    want = sten.finalize(model)[0].weight.density
    x = torch.randn(3, 16)
    before = average(x).detach()
    assert sten.finalize(average)[0].weight.density == want < 1
    if not isinstance(method, sten.BiMask):
        torch.testing.assert_close(average(x).detach(), before)
