"""sparsify and its siblings: signatures, identity, allocation, the choice of weights, ties, plan."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from masked import expect_close, masked_twin, slots, sparse_weights, state
from small import batch, every_layout, loss_of, mlp, rate, train
from torch import nn
from torch.nn.utils import prune

import sten
from sten.layouts import CSR, NM, GroupedNM


def test_signatures():
    names = ["model", "layout", "sparsifier", "sparsity", "weights", "optimizer", "calibration"]
    for function in (sten.sparsify, sten.plan):
        parameters = list(inspect.signature(function).parameters.values())
        assert [p.name for p in parameters[: len(names)]] == names
        defaults = [None, sten.Magnitude(), None, None, None, None, *(["weight", None] if len(parameters) > 7 else [])]
        assert [p.default for p in parameters][1:] == defaults
    expected = {
        sten.attach: ["model", "optimizer"],
        sten.trainable: ["model"],
        sten.finalize: ["model", "layout"],
        sten.densify: ["model"],
        sten.summary: ["model"],
        sten.save: ["model", "path"],
        sten.load: ["model", "path", "assign", "mmap"],
    }
    for function, arguments in expected.items():
        assert list(inspect.signature(function).parameters) == arguments, function.__name__


# identity


@every_layout
def test_parameters_keep_identity_through_every_form(layout):
    model = mlp()
    params, dense = list(model.parameters()), copy.deepcopy(model)
    params[0].note = "mine"
    sten.sparsify(model, layout=layout, sparsity=rate(layout))
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert isinstance(model[0].weight, sten.SparseTensor) and isinstance(model[0].weight, nn.Parameter)
    sten.trainable(model)
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}
    assert model[0]._parameters["weight"] is params[0] and type(params[0]) is nn.Parameter
    sten.finalize(model)
    assert model[0].weight is params[0] and isinstance(model[0], nn.Linear)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    sten.densify(model)
    assert model[0].weight is params[0] and type(params[0]) is nn.Parameter and params[0].note == "mine"
    assert torch.equal(model[0].weight != 0, model[0].weight == dense[0].weight)


def test_identity_with_a_used_graph_alive():
    """`loss` of the last step is kept, as in every training loop; its graph is spent but alive."""
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    before = list(model.parameters())
    loss = loss_of(model, 0)
    loss.backward()
    opt.step()
    sten.sparsify(model, layout=sten.NM(2, 4), optimizer=opt)
    assert {id(p) for p in before} == {id(p) for p in model.parameters()}
    loss_of(model, 1).backward()
    opt.step()
    sten.finalize(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert loss.item() > 0


def test_a_graph_that_still_needs_its_weights_keeps_them():
    """A loss that never saw backward holds the old weights: it stays right; the optimizer gets the new Parameters."""
    model = mlp()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    opt.step()
    opt.zero_grad()
    x = batch(1).requires_grad_()
    pending = model(x).sum()
    expected = copy.deepcopy(model)(x.detach().requires_grad_()).sum().detach()
    sten.sparsify(model, layout=sten.NM(2, 4), optimizer=opt)
    held = {id(p) for g in opt.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    pending.backward()
    assert x.grad.isfinite().all() and torch.equal(pending.detach(), expected)
    opt.zero_grad()
    loss_of(model, 2).backward()
    opt.step()


# finalize in another layout


def test_finalize_in_another_layout():
    model = mlp()
    opt = torch.optim.AdamW(model.parameters())
    sten.sparsify(model, layout=NM(1, 4), optimizer=opt)
    train(model, opt, range(2))
    want, moments = state(model), slots(model, opt)
    sten.finalize(model, layout=CSR())
    assert model[0].weight.sparse_layout == CSR()
    expect_close(state(model), want, 0, 0)
    expect_close(slots(model, opt), moments, 0, 0)


# other sources of masks


def test_torch_prune_is_taken_over():
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "weight", 0.3)  # a PruningContainer
    prune.l1_unstructured(model[2], "weight", 0.6)
    model(batch(0))
    want, kept = [model[i].weight.detach().clone() for i in (0, 2)], [model[i].weight_mask.bool() for i in (0, 2)]
    original = model[0].weight_orig
    sten.sparsify(model, layout=CSR(), sparsifier=None, optimizer=opt)
    for i, dense, mask in zip((0, 2), want, kept, strict=True):
        assert torch.equal(model[i].weight.mask(), mask) and torch.equal(model[i].weight.to_dense(), dense)
        assert not model[i]._forward_pre_hooks and not list(model[i]._buffers)
    assert model[0]._parameters["weight"] is original
    train(model, opt, range(1))
    sten.densify(model)
    assert isinstance(model[0].weight, nn.Parameter) and set(model.state_dict()) == set(mlp().state_dict())


def test_torch_ao_pruning_is_taken_over():
    from torch.ao.pruning import WeightNormSparsifier

    model = mlp()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    want = [model[i].weight.detach().clone() for i in (0, 2)]
    kept = [model[i].parametrizations.weight[0].mask.bool() for i in (0, 2)]
    sten.sparsify(model, layout=NM(2, 4), sparsifier=None)
    for i, dense, mask in zip((0, 2), want, kept, strict=True):
        assert torch.equal(model[i].weight.mask(), mask) and torch.equal(model[i].weight.to_dense(), dense)
        assert not nn.utils.parametrize.is_parametrized(model[i])


def test_pruned_entries_are_not_revived():
    """A sparsifier that goes further keeps off what an earlier pruning masked out."""
    model = nn.Linear(8, 8)
    prune.custom_from_mask(model, "weight", torch.rand(8, 8) > 0.5)
    mask = model.weight_mask.bool()
    sten.sparsify(model, layout=CSR(), sparsifier=sten.Random(), sparsity=0.75)
    assert model.weight.density == 0.25 and not (model.weight.mask() & ~mask).any()


def test_none_keeps_the_non_zeros():
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight.mul_(torch.rand(4, 8) > 0.7)
    want = model.weight.detach().clone()
    sten.sparsify(model, layout={"weight": CSR()}, sparsifier=None)
    assert torch.equal(model.weight.to_dense(), want) and torch.equal(model.weight.mask(), want != 0)


# allocation


def test_allocation_counts_are_exact():
    def sizes(spread):
        model = sten.sparsify(nn.Sequential(nn.Linear(30, 17), nn.Linear(17, 5)), layout=CSR(), sparsity=spread)
        return [len(m.weight.parts["values"]) for m in model]

    assert sizes(0.9) == sizes(sten.Uniform(0.9)) == [round(0.1 * 510), round(0.1 * 85)]
    assert sum(sizes(sten.Global(0.83))) == sum(sizes(sten.ERK(0.83))) == round(0.17 * 595)
    wide, narrow = sizes(sten.ERK(0.83))
    assert narrow / 85 > wide / 510


def test_ties_go_by_index():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for layer in model:
        nn.init.constant_(layer.weight, -1.0)
    sten.sparsify(model, layout=CSR(), sparsity=sten.Global(0.75))
    kept = torch.cat([layer.weight.mask().flatten() for layer in model])
    assert kept.tolist() == [True] * 6 + [False] * 18
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 2.0)
    assert sten.sparsify(model, layout=NM(1, 4)).weight.mask()[:, 0].all()


def test_random_is_reproducible():
    one, two, other = (sten.sparsify(mlp(), CSR(), sten.Random(seed=s), 0.5) for s in (1, 1, 2))
    assert torch.equal(one[0].weight.mask(), two[0].weight.mask())
    assert not torch.equal(one[0].weight.mask(), other[0].weight.mask())


# choice of weights


def test_weights_by_pattern():
    def chosen(**kwargs):
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 8), nn.Linear(8, 8))
        return sorted(sparse_weights(sten.sparsify(model, **{"layout": NM(2, 4), **kwargs})))

    assert chosen() == ["1.weight", "2.weight"]
    assert chosen(weights="*") == ["0.weight", "1.weight", "2.weight"]
    assert chosen(weights="re:[02].*") == ["0.weight", "2.weight"]
    assert chosen(weights=["0.weight", "2.*"]) == ["0.weight", "2.weight"]
    assert chosen(weights=lambda name, module, attribute: isinstance(module, nn.Conv2d)) == ["0.weight"]
    assert chosen(layout={"1.weight": None, "*": NM(2, 4)}) == ["2.weight"]
    assert chosen(layout={"0.weight": NM(1, 4), "*": NM(2, 4)}) == ["0.weight", "1.weight", "2.weight"]


def test_layouts_by_pattern():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    sten.sparsify(model, layout={"0.*": CSR(), "re:1\\..*": GroupedNM(1, 4, 2), "*": NM(2, 4)}, sparsity=0.75)
    assert [m.weight.sparse_layout for m in model] == [CSR(), GroupedNM(1, 4, 2), NM(2, 4)]
    assert model[0].weight.density == 0.25


def test_the_model_is_the_layer():
    layer = nn.Linear(8, 4)
    assert sten.sparsify(layer, layout=sten.NM(2, 4)) is layer and isinstance(layer.weight, sten.SparseTensor)
    opt = torch.optim.SGD(layer.parameters(), 0.1)
    sten.attach(layer, opt)
    layer(torch.ones(1, 8)).sum().backward()
    opt.step()
    assert set(layer.state_dict()) == {"bias", "weight", "weight_pattern.index"}
    assert set(sten.finalize(layer).state_dict()) == {"weight", "bias"}


def test_conv1d_is_stored_transposed():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(8, 12)
    dense = layer.weight.detach().clone()
    sten.sparsify(layer, layout=NM(1, 4))
    w = layer.weight
    assert w.shape == (12, 8) and w.transposed and w.stored_shape == (8, 12)
    assert torch.equal(w.mask().sum(0), torch.full((8,), 3)) and torch.equal(w.to_dense(), dense * w.mask())
    x = torch.randn(3, 12)
    with sten.strict():
        torch.testing.assert_close(layer(x), x @ w.to_dense() + layer.bias)


# ties


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index):
        return self.head(torch.tanh(self.body(self.embed(index))))


def test_tied_to_a_non_target_is_skipped():
    model = sten.sparsify(Tied(), layout=sten.NM(2, 4))
    assert list(sparse_weights(model)) == ["body.weight"] and model.head.weight is model.embed.weight
    assert "tied" in {r.name: r.why for r in sten.summary(model).rows}["head.weight"]
    with pytest.raises(ValueError, match=r"tied to embed\.weight"):
        sten.sparsify(Tied(), layout=sten.NM(2, 4), weights=["head.weight"])


@every_layout
def test_ties_stay_ties_in_every_form(layout):
    torch.manual_seed(0)
    dense = Tied()
    model = copy.deepcopy(dense)
    opt = torch.optim.AdamW(model.parameters(), eps=1e-3)
    sten.sparsify(model, layout=layout, sparsity=rate(layout), weights="*", optimizer=opt)
    twin = masked_twin(dense, model)
    other = torch.optim.AdamW(twin.parameters(), eps=1e-3)
    assert model.head.weight_pattern is model.embed.weight_pattern
    assert len(list(model.parameters())) == len(list(dense.parameters()))
    index = torch.tensor([[1, 2, 3], [3, 3, 9]])
    for _ in range(2):
        for one, o in ((model, opt), (twin, other)):
            o.zero_grad()
            one(index).square().mean().backward()
            o.step()
        expect_close(state(model), state(twin))
    clone = copy.deepcopy(model)
    assert clone.head.weight_pattern is clone.embed.weight_pattern
    sten.finalize(model)
    assert model.head.weight is model.embed.weight
    assert copy.deepcopy(model).head.weight is not model.head.weight
    sten.densify(model)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(index), twin(index))


# plan


def test_plan_changes_nothing_and_tells_the_truth():
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    before, types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    plan = sten.plan(model, layout=CSR(), sparsity=sten.ERK(0.8), optimizer=opt)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [type(m) for m in model.modules()] == types and not any(
        "_sten" in k for m in model.modules() for k in vars(m)
    )
    sten.sparsify(model, layout=CSR(), sparsity=sten.ERK(0.8))
    for row, done in zip(plan.rows, sten.summary(model).rows, strict=True):
        assert row == done


def test_plan_raises_what_sparsify_raises():
    for kwargs in (
        {},
        {"layout": CSR()},
        {"layout": CSR(), "sparsity": 0.5, "calibration": [1]},
        {"layout": NM(2, 4), "weights": "nothing"},
        {"layout": NM(2, 4), "sparsity": 0.9},
    ):
        with pytest.raises(ValueError) as planned:
            sten.plan(mlp(), **kwargs)
        with pytest.raises(ValueError) as done:
            sten.sparsify(mlp(), **kwargs)
        assert str(planned.value) == str(done.value)


# autocast


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("act", [lambda model: sten.sparsify(model, NM(2, 4)), lambda model: sten.finalize(model)])
def test_conversions_inside_autocast(act, grad):
    """Autocast's cache refers to the weights that a call has cast: they may become other objects all the same."""
    model = mlp()
    x = torch.randn(4, model[0].in_features)
    if act.__code__.co_names[-1] == "finalize":
        sten.trainable(sten.sparsify(model, NM(2, 4)))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        model(x)
        act(model)
    assert isinstance(model[0].weight, sten.SparseTensor)
    torch.testing.assert_close(model(x), sten.densify(copy.deepcopy(model))(x))
