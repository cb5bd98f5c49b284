"""What makes mask updates fast does not change them: the cached mask of a forward pass, selection, moved slots."""

import copy
import io

import pytest
import torch
from torch import nn
from training_models import dense_weights, loss_of, sparse, train

import sten
from sten.layouts import CSR, NM, FanIn
from sten.layouts.topk import edge_by_topk, top, top_of_groups
from sten.sparsifiers.topk import _edge, highest
from sten.training.trained_weight import optimizer_slots


def slots_of(weight, optimizer):
    return optimizer_slots(weight.param, optimizer).values()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 5, 16, 17, 40])
def test_highest_equals_a_sort(dtype, count):
    torch.manual_seed(count)
    for score in (torch.randn(6, 17), torch.randint(3, (6, 17)).float(), torch.zeros(6, 17)):
        score[0, 3], score[1, 2], score[2, :9], score[3, 1:8] = torch.nan, torch.inf, -torch.inf, torch.nan
        score = score.to(dtype)
        assert torch.equal(highest(score, count), top_of_groups(score, count))
        assert torch.equal(highest(score.flatten(), count), top(score, count).flatten())
        assert torch.equal(highest(score.t(), min(count, 6)), top_of_groups(score.t().contiguous(), min(count, 6)))
        if 0 < count < 17:  # the code of both devices
            clean = torch.nan_to_num(score, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            assert torch.equal(_edge(clean, count), edge_by_topk(clean, count))
    assert highest(torch.ones(0), 3).shape == (0,)


class Counts(NM):
    """NM that counts its masks."""

    masks = 0

    def mask(self, score, sparsity=None):
        Counts.masks += 1
        return super().mask(score, sparsity)


def test_srste_makes_one_mask_a_forward_pass():
    model, optimizer, _ = sparse(sten.SRSTE(0.1), Counts(2, 4))
    Counts.masks = 0
    train(model, optimizer, 3)
    assert Counts.masks == 6  # two weights
    train(model, optimizer, 1, microbatches=4)
    assert Counts.masks == 6 + 8


@pytest.mark.parametrize("how", ["weights", "functional", "no forward"])
def test_a_mask_of_other_weights_is_not_used(how):
    """decay * (1 - M) * w with the M of the weights at the step, not of an earlier forward pass."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    sten.sparsify(model, NM(2, 4), sten.SRSTE(decay=0.5), optimizer=optimizer)
    param, other = model[0]._parameters["weight"], torch.randn(4, 8)
    model(torch.ones(1, 8)).sum().backward()
    if how == "weights":
        with torch.no_grad():
            param.copy_(other)
    elif how == "functional":
        torch.func.functional_call(model, {"0.weight": other.requires_grad_()}, (torch.ones(1, 8),))
    else:
        optimizer.step()
        param.grad.fill_(1.0)
    param.grad.zero_()
    before = param.detach().clone()
    optimizer.step()
    want = torch.where(NM(2, 4).mask(before.abs()), before, 0.5 * before)
    torch.testing.assert_close(param.detach(), want)


def test_the_cache_of_a_forward_pass_is_neither_copied_nor_used_twice():
    model, optimizer, engine = sparse(sten.SRSTE(0.1), NM(2, 4))
    loss_of(model, 0).backward()
    weight = engine.weights[0]
    assert set(weight.forward_cache[2]) == {"mask"}
    assert copy.deepcopy(model)[0].weight_pattern.forward_cache is None
    assert torch.optim.swa_utils.AveragedModel(model).module[0].weight_pattern.forward_cache is None
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)[0].weight_pattern.forward_cache is None
    optimizer.step()
    assert weight.forward_cache is None
    with torch.no_grad():
        loss_of(model, 0)
    assert weight.forward_cache is None


def test_fresh_entries_and_new_values_of_a_compressed_weight():
    model, optimizer, engine = sparse(sten.SET(24, every=20), optimizer="adam")
    train(model, optimizer, 3)
    weight = engine.weights[0]
    slots = [weight.dense(t) for t in slots_of(weight, optimizer)]
    w, mask, fresh = weight.dense(weight.param), weight.active(), torch.rand(32, 16) < 0.5
    weight.change(sten.extend.Edit(fresh=fresh), optimizer)()
    assert torch.equal(weight.active(), mask) and torch.equal(weight.dense(weight.param), w * ~fresh)
    for have, want in zip((weight.dense(t) for t in slots_of(weight, optimizer)), slots, strict=True):
        assert torch.equal(have, want * ~fresh)
    mask = CSR().mask(torch.rand(32, 16), 0.75)
    weight.change(sten.extend.Edit(mask=mask, value=torch.ones(32, 16)), optimizer)()
    assert torch.equal(dense_weights(model)[0], mask.float())


def test_an_ablated_neuron_grows_again_from_zero():
    model, optimizer, engine = sparse(sten.SRigL(60, every=20), FanIn(), optimizer="adam")
    train(model, optimizer, 2)
    weight = engine.weights[0]
    mask = weight.active()
    w, slots = weight.dense(weight.param), [weight.dense(t) for t in slots_of(weight, optimizer)]
    without, other = mask.clone(), mask.clone()
    without[5] = False
    weight.change(sten.extend.Edit(mask=without), optimizer)()
    weight.change(sten.extend.Edit(mask=other), optimizer)()
    other[5] = False
    assert torch.equal(weight.dense(weight.param), w * other)
    for have, want in zip((weight.dense(t) for t in slots_of(weight, optimizer)), slots, strict=True):
        assert torch.equal(have, want * other)
