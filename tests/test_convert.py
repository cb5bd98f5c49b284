"""sparsify and its siblings: signatures, identity, optimizers step by step, allocation, ties, forms, state_dicts."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from masked import expect_close, grads, masked_twin, masks, sparse_weights, state
from torch import nn
from torch.nn.utils import clip_grad_norm_, prune

import sten
from sten.layouts import BSR, CSR, NM, GroupedNM, Masked, VectorNM

LAYOUTS = [Masked(), CSR(), BSR((4, 4)), NM(2, 4), VectorNM(1, 4, 8), GroupedNM(1, 4, 4)]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def rate(layout) -> float | None:
    return 0.7 if layout.rate is None else None


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    return (model(batch(step)) - 1).square().mean()


def test_signatures():
    names = ["model", "layout", "sparsifier", "sparsity", "weights", "optimizer", "calibration"]
    for function in (sten.sparsify, sten.plan):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names
        assert [p.default for p in parameters.values()][1:] == [NM(2, 4), sten.Magnitude(), None, None, None, None]
    expected = {
        sten.attach: ["model", "optimizer"],
        sten.trainable: ["model"],
        sten.finalize: ["model", "layout"],
        sten.densify: ["model"],
        sten.summary: ["model"],
        sten.save: ["model", "path"],
        sten.load: ["model", "path"],
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
    assert model[0].sparse_weight.values is params[0] and type(params[0]) is nn.Parameter
    sten.finalize(model)
    assert model[0].weight is params[0] and type(model[0]) is nn.Linear
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
    sten.sparsify(model, optimizer=opt)
    assert {id(p) for p in before} == {id(p) for p in model.parameters()}
    loss_of(model, 1).backward()
    opt.step()
    sten.finalize(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert loss.item() > 0


def test_a_graph_that_still_needs_its_weights_keeps_them():
    """A loss that never saw backward holds the old weights: it stays right, and the optimizer gets the new Parameters."""
    model = mlp()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    opt.step()
    opt.zero_grad()
    pending = loss_of(model, 1)
    wanted = torch.autograd.grad(loss_of(copy.deepcopy(model), 1), [])if False else None
    x = batch(1).requires_grad_()
    pending = model(x).sum()
    expected = copy.deepcopy(model)(x.detach().requires_grad_()).sum().detach()
    sten.sparsify(model, optimizer=opt)
    held = {id(p) for g in opt.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()} and wanted is None
    pending.backward()
    assert x.grad.isfinite().all() and torch.equal(pending.detach(), expected)
    opt.zero_grad()
    loss_of(model, 2).backward()
    opt.step()


# optimizers, step by step


FORMS = [
    (torch.optim.SGD, dict(lr=0.1)),
    (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.01)),
    (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    (torch.optim.Adam, dict(lr=0.01, weight_decay=0.01, amsgrad=True)),
    (torch.optim.AdamW, dict(lr=0.01)),
    (torch.optim.RMSprop, dict(lr=0.01, momentum=0.9, centered=True)),
    (torch.optim.Adagrad, dict(lr=0.01)),
    (torch.optim.Adadelta, dict(lr=1.0, eps=1e-3)),
]
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
OPTIMIZERS = [(cls, {**kwargs, "foreach": foreach}) for cls, kwargs in FORMS for foreach in (False, True)]
OPTIMIZERS += [(cls, {**kwargs, "fused": True}) for cls, kwargs in FORMS if cls in FUSED]
every_optimizer = pytest.mark.parametrize(
    "cls, kwargs", [pytest.param(c, k, id=f"{c.__name__}-{'-'.join(f'{a}={b}' for a, b in k.items())}") for c, k in OPTIMIZERS]
)


def train(model: nn.Module, opt, steps: range, clip: float | None = 0.05) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(model, step).backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        opt.step()


def mask_slots(opt, twin: nn.Module, model: nn.Module) -> None:
    """What sparsify in mid-training does to the dense twin's optimizer."""
    for name, mask in masks(model).items():
        for slot in opt.state.get(twin.get_parameter(name), {}).values():
            if slot.shape == mask.shape:
                slot.mul_(mask)


def slots(model: nn.Module, opt) -> dict[str, torch.Tensor]:
    """Every slot by parameter and name, dense."""
    found = {}
    names = {id(p): (n, None) for n, p in model.named_parameters()}
    for name, w in sparse_weights(model).items():
        holder = model.get_submodule(name.rpartition(".")[0])._modules.get("sparse_weight")
        if holder is not None:
            names[id(holder.values)] = name, w
    for param, own in opt.state.items():
        name, w = names[id(param)]
        for key, slot in own.items():
            slot = w.with_values(slot) if w is not None and slot.shape == param.shape else slot
            found[f"{name}/{key}"] = slot.to_dense() if isinstance(slot, sten.SparseTensor) else slot.clone()
    return found


@every_optimizer
@pytest.mark.parametrize("layout", [CSR(), NM(2, 4), GroupedNM(1, 4, 4)], ids=str)
def test_every_optimizer_equals_masked_dense(cls, kwargs, layout):
    """Sparsified in mid-training, trained on, finalized and trained again: state goes along in both directions."""
    model = mlp()
    opt = cls(model.parameters(), **kwargs)
    train(model, opt, range(2))
    twin = copy.deepcopy(model)
    sten.sparsify(model, layout=layout, sparsity=rate(layout), optimizer=opt)
    twin = masked_twin(twin, model)
    other = cls(twin.parameters(), **kwargs)
    other.load_state_dict(dense_state_dict(model, opt, other))
    for step in range(2, 4):
        train(model, opt, range(step, step + 1))
        train(twin, other, range(step, step + 1))
        expect_close(grads(model), grads(twin))
        expect_close(state(model), state(twin))
    sten.finalize(model)
    assert all(s.shape in ((), p.shape) for p, own in opt.state.items() for s in own.values())
    expect_close(slots(model, opt), slots(twin, other))
    sten.attach(model, opt)
    train(model, opt, range(4, 6))
    train(twin, other, range(4, 6))
    expect_close(state(model), state(twin))
    expect_close(slots(model, opt), slots(twin, other))


def dense_state_dict(model: nn.Module, opt, other) -> dict:
    """The sparse optimizer's state as the dense twin's."""
    dense = slots(model, opt)
    saved = other.state_dict()
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    found = {i: {k.split("/")[1]: t for k, t in dense.items() if k.startswith(n + "/")} for i, n in enumerate(names)}
    return {**saved, "state": {i: own for i, own in found.items() if own}}


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@every_layout
def test_a_sparse_parameter_trains_by_itself(cls, layout):
    """A hand-made nn.Parameter(SparseTensor), without sten.sparsify."""
    torch.manual_seed(0)
    dense = torch.randn(8, 12)
    w = nn.Parameter(sten.from_dense(dense, layout, layout.mask(dense.abs(), rate(layout))))
    twin = nn.Parameter(w.to_dense().detach().clone())
    twin.register_hook(lambda grad: grad * w.mask())
    opt, other = cls([w], lr=0.1), cls([twin], lr=0.1)
    for step in range(3):
        for one, o in ((w, opt), (twin, other)):
            o.zero_grad()
            (nn.functional.linear(batch(step), one) - 1).square().mean().backward()
            o.step()
        torch.testing.assert_close(w.to_dense(), twin)


def test_slots_are_repacked_both_ways():
    model = mlp()
    opt = torch.optim.AdamW(model.parameters())
    train(model, opt, range(2))
    before = slots(model, opt)
    sten.sparsify(model, layout=CSR(), sparsity=0.5, optimizer=opt)
    mask = masks(model)
    want = {k: t * mask[k.split("/")[0]] if k.split("/")[0] in mask and t.dim() else t for k, t in before.items()}
    expect_close(slots(model, opt), want, 0, 0)
    assert all(s.shape in ((), p.shape) for p, own in opt.state.items() for s in own.values())
    sten.densify(model)
    expect_close(slots(model, opt), want, 0, 0)
    assert all(type(s) is torch.Tensor for own in opt.state.values() for s in own.values())


def test_the_gradient_goes_along():
    """sparsify between backward and step: the step is that of the masked dense model."""
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model, 0).backward()
    twin = copy.deepcopy(model)
    sten.sparsify(model, optimizer=opt)
    other = torch.optim.SGD(twin.parameters(), 0.1)
    opt.step()
    other.step()
    expect_close(state(model), {n: t * masks(model).get(n, 1) for n, t in state(twin).items()})


def test_parameter_groups_and_schedulers_survive():
    model = mlp()
    decay, rest = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.5}], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    sten.sparsify(model, optimizer=opt)
    assert [[id(p) for p in g["params"]] for g in opt.param_groups] == [[id(p) for p in ps] for ps in (decay, rest)]
    train(model, opt, range(2))
    schedule.step()
    assert opt.param_groups[0]["lr"] < 0.1 and opt.param_groups[0]["weight_decay"] == 0.1


def test_several_optimizers():
    model = mlp()
    opts = [torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9), torch.optim.AdamW(model[2].parameters())]
    sten.sparsify(model, optimizer=opts)
    loss_of(model, 0).backward()
    for opt in opts:
        opt.step()
    assert opts[0].state[model[0].sparse_weight.values]["momentum_buffer"].shape == model[0].sparse_weight.values.shape
    assert opts[1].state[model[2].sparse_weight.values]["exp_avg"].shape == model[2].sparse_weight.values.shape


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    """Scaled float16-style training on the CPU, with one step of infinities that must be skipped."""
    model = mlp()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    dense = copy.deepcopy(model)
    sten.sparsify(model, layout=CSR(), sparsity=0.7, optimizer=opt)
    twin = masked_twin(dense, model)
    other = torch.optim.AdamW(twin.parameters(), lr=0.01, fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(4):
        for one, o, scaler in ((model, opt, scalers[0]), (twin, other, scalers[1])):
            o.zero_grad()
            factor = torch.inf if step == 1 else 1.0
            scaler.scale(loss_of(one, step) * factor).backward()
            if not fused:
                scaler.unscale_(o)
                clip_grad_norm_(one.parameters(), 0.05)
            scaler.step(o)
            scaler.update()
        expect_close(state(model), state(twin))
        assert scalers[0].get_scale() == scalers[1].get_scale()


def test_autocast_trains():
    model = mlp()
    opt = torch.optim.AdamW(model.parameters())
    dense = copy.deepcopy(model)
    sten.sparsify(model, optimizer=opt)
    twin = masked_twin(dense, model)
    with torch.autocast("cpu", dtype=torch.bfloat16), sten.strict():
        losses = [loss_of(one, 0) for one in (model, twin)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
    expect_close(grads(model), grads(twin), rtol=5e-2, atol=2e-2)
    opt.step()


def test_adamw_memory_follows_density():
    """Values, pattern, gradient and both moments of a 90 % CSR weight take at most 0.15 of dense."""
    model = nn.Linear(768, 768, bias=False)
    opt = torch.optim.AdamW(model.parameters())
    sten.sparsify(model, layout=CSR(), sparsity=0.9, optimizer=opt)
    model(torch.randn(4, 768)).sum().backward()
    opt.step()
    tensors = [*model.parameters(), *model.buffers(), *[p.grad for p in model.parameters()]]
    tensors += [t for own in opt.state.values() for t in own.values()]
    assert sum(t.numel() * t.element_size() for t in tensors) <= 0.15 * 4 * 768 * 768 * 4


def test_attach_to_an_optimizer_made_later():
    model = sten.sparsify(mlp(), layout=CSR(), sparsity=0.7)
    twin = masked_twin(sten.densify(copy.deepcopy(model)), model)
    opt, other = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin))
    assert sten.attach(model, opt) is model
    train(model, opt, range(3))
    train(twin, other, range(3))
    expect_close(state(model), state(twin))
    sten.attach(model, opt)  # again, on the trainable form: nothing changes
    sten.finalize(model)
    expect_close(slots(model, opt), slots(twin, other))


def test_trainable_before_the_optimizer():
    model = sten.trainable(sten.sparsify(mlp()))
    opt = torch.optim.AdamW(model.parameters())
    sten.attach(model, opt)
    train(model, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    sten.attach(sten.finalize(model), opt)
    assert all(torch.equal(saved["state"][i][k], t) for i, own in opt.state_dict()["state"].items() for k, t in own.items())


def test_frozen_weights_stay_frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    sten.sparsify(model, optimizer=opt)
    assert not model[0].sparse_weight.values.requires_grad
    loss_of(model, 0).backward()
    assert model[0].sparse_weight.values.grad is None
    assert not sten.finalize(model)[0].weight.requires_grad and not sten.densify(model)[0].weight.requires_grad


# finalize in another layout


def test_finalize_in_another_layout():
    model = mlp()
    opt = torch.optim.AdamW(model.parameters())
    sten.sparsify(model, layout=NM(1, 4), optimizer=opt)
    train(model, opt, range(2))
    want, moments = state(model), slots(model, opt)
    sten.finalize(model, layout=CSR())
    assert model[0].weight.spec == CSR()
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
    assert model[0].sparse_weight.values is original
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
        assert type(model[i]) is nn.Linear


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
        return sorted(sparse_weights(sten.sparsify(model, **kwargs)))

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
    assert [m.weight.spec for m in model] == [CSR(), GroupedNM(1, 4, 2), NM(2, 4)]
    assert model[0].weight.density == 0.25


def test_the_model_is_the_layer():
    layer = nn.Linear(8, 4)
    assert sten.sparsify(layer) is layer and isinstance(layer.weight, sten.SparseTensor)
    opt = torch.optim.SGD(layer.parameters(), 0.1)
    sten.attach(layer, opt)
    layer(torch.ones(1, 8)).sum().backward()
    opt.step()
    assert set(layer.state_dict()) == {"bias", "weight.values", "weight.index"}
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
    model = sten.sparsify(Tied())
    assert list(sparse_weights(model)) == ["body.weight"] and model.head.weight is model.embed.weight
    assert "tied" in {r.name: r.why for r in sten.summary(model).rows}["head.weight"]
    with pytest.raises(ValueError, match="tied to embed.weight"):
        sten.sparsify(Tied(), weights=["head.weight"])


@every_layout
def test_ties_stay_ties_in_every_form(layout):
    torch.manual_seed(0)
    dense = Tied()
    model = copy.deepcopy(dense)
    opt = torch.optim.AdamW(model.parameters(), eps=1e-3)
    sten.sparsify(model, layout=layout, sparsity=rate(layout), weights="*", optimizer=opt)
    twin = masked_twin(dense, model)
    other = torch.optim.AdamW(twin.parameters(), eps=1e-3)
    assert model.head.sparse_weight is model.embed.sparse_weight
    assert len(list(model.parameters())) == len(list(dense.parameters()))
    index = torch.tensor([[1, 2, 3], [3, 3, 9]])
    for _ in range(2):
        for one, o in ((model, opt), (twin, other)):
            o.zero_grad()
            one(index).square().mean().backward()
            o.step()
        expect_close(state(model), state(twin))
    clone = copy.deepcopy(model)
    assert clone.head.sparse_weight is clone.embed.sparse_weight
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
    assert [type(m) for m in model.modules()] == types and not any("_sten" in k for m in model.modules() for k in vars(m))
    sten.sparsify(model, layout=CSR(), sparsity=sten.ERK(0.8))
    for row, done in zip(plan.rows, sten.summary(model).rows, strict=True):
        assert row == done


def test_plan_raises_what_sparsify_raises():
    for kwargs in (dict(layout=CSR()), dict(calibration=[1]), dict(weights="nothing"), dict(sparsity=0.9)):
        with pytest.raises(ValueError) as planned:
            sten.plan(mlp(), **kwargs)
        with pytest.raises(ValueError) as done:
            sten.sparsify(mlp(), **kwargs)
        assert str(planned.value) == str(done.value)


# densify, copies, state_dicts


@every_layout
@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_densify_round_trip(layout, form):
    model = sten.sparsify(mlp(), layout=layout, sparsity=rate(layout))
    model = sten.trainable(model) if form == "trainable" else model
    want, x = state(model), batch(0)
    y = model(x)
    sten.densify(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear] and type(model[0].weight) is nn.Parameter
    expect_close(state(model), want, 0, 0)
    torch.testing.assert_close(model(x), y)
    sten.sparsify(model, layout=layout, sparsifier=None)
    expect_close(state(model), want, 0, 0)


def in_form(model: nn.Module, form: str) -> nn.Module:
    model = copy.deepcopy(model)
    return {"dense": sten.densify, "finalized": sten.finalize, "trainable": sten.trainable}[form](model)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", ["dense", "finalized", "trainable"])
@pytest.mark.parametrize("source", ["dense", "finalized", "trainable"])
@pytest.mark.parametrize("layout", [CSR(), NM(2, 4), GroupedNM(1, 4, 4)], ids=str)
def test_state_dicts_in_every_direction(layout, source, target, assign):
    """Loaded numbers arrive; a sparse weight stays sparse. Parts in a dense model are unexpected keys."""
    model = sten.sparsify(mlp(), layout=layout, sparsity=rate(layout))
    given = in_form(model, source)
    into = in_form(model, target)
    with torch.no_grad():
        for p in into.parameters():
            p.mul_(3)
    if source == "trainable" and target == "dense":
        with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight\.values"):
            into.load_state_dict(given.state_dict(), assign=assign)
        return
    result = into.load_state_dict(given.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    expect_close(state(into), state(given), 0, 0)
    if target != "dense":
        assert set(sparse_weights(into)) == {"0.weight", "2.weight"}
    loss_of(into, 0).backward()


@pytest.mark.parametrize("target", ["finalized", "trainable"])
@pytest.mark.parametrize("source", ["finalized", "trainable"])
@pytest.mark.parametrize("layout", [CSR(), NM(2, 4)], ids=str)
def test_another_pattern_is_loaded(layout, source, target):
    """A checkpoint brings its own pattern, of another size, too."""
    given = in_form(sten.sparsify(mlp(), layout=layout, sparsity=rate(layout)), source)
    other = sten.sparsify(mlp(), layout=layout, sparsifier=sten.Random(3), sparsity=0.5 if layout == CSR() else None)
    into = in_form(other, target)
    into.load_state_dict(given.state_dict())
    expect_close(state(into), state(given), 0, 0)
    assert all(torch.equal(m, masks(given)[n]) for n, m in masks(into).items())
    loss_of(into, 0).backward()


@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_dense_state_with_entries_off_the_pattern_is_refused(form):
    into = in_form(sten.sparsify(mlp()), form)
    want = state(into)
    with pytest.raises(RuntimeError, match=r"0\.weight: load_state_dict would write .* off the pattern"):
        into.load_state_dict(mlp().state_dict())
    expect_close({n: t for n, t in state(into).items() if "weight" in n}, {n: t for n, t in want.items() if "weight" in n})


@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_strict_names_what_is_missing(form):
    into = in_form(sten.sparsify(mlp()), form)
    key = r"0\.weight" if form == "finalized" else r"0\.weight\.values"
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
        into.load_state_dict({k: v for k, v in into.state_dict().items() if not k.startswith("0.weight")})
    into.load_state_dict({}, strict=False)


@pytest.mark.parametrize("form", ["finalized", "trainable"])
@every_layout
def test_copies_and_pickles_of_modules(layout, form):
    model = in_form(sten.sparsify(mlp(), layout=layout, sparsity=rate(layout)), form)
    x = batch(0)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert torch.equal(twin(x), model(x)) and set(sparse_weights(twin)) == {"0.weight", "2.weight"}
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not torch.equal(twin(x), model(x))
        loss_of(twin, 0).backward()
        sten.densify(twin)
    assert isinstance(copies[0][0], nn.Linear)


@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_state_dict_through_a_file(form):
    model = in_form(sten.sparsify(mlp(), layout=GroupedNM(1, 4, 4)), form)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    into = in_form(sten.sparsify(mlp(), layout=GroupedNM(1, 4, 4), sparsifier=sten.Random()), form)
    into.load_state_dict(torch.load(buffer, weights_only=True))
    expect_close(state(into), state(model), 0, 0)


@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_averaged_model(form):
    model = in_form(sten.sparsify(mlp(), layout=CSR(), sparsity=0.7), form)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    first = state(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    averaged.update_parameters(model)
    expect_close(state(averaged.module), {n: 2 * t for n, t in first.items()})


@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_functional_call(form):
    model = in_form(sten.sparsify(mlp()), form)
    changed = {n: (p * 2).detach() for n, p in model.named_parameters()}
    x = batch(0)
    got = torch.func.functional_call(model, changed, (x,))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_modules_move_and_convert(form):
    model = in_form(sten.sparsify(mlp(), layout=CSR(), sparsity=0.7), form)
    y = model(batch(0))
    torch.testing.assert_close(model.double()(batch(0).double()), y.double(), rtol=1e-4, atol=1e-5)
    assert model.bfloat16()(batch(0).bfloat16()).dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert set(sparse_weights(model)) == {"0.weight", "2.weight"}
