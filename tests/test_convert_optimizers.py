"""Optimizers under sparsify, attach and finalize: step by step the masked dense model."""

from __future__ import annotations

import copy

import pytest
import torch
from masked import expect_close, grads, masked_twin, masks, slots, state
from small import batch, every_layout, loss_of, mlp, rate, train
from torch import nn
from torch.nn.utils import clip_grad_norm_

import sten
from sten.layouts import CSR, NM, GroupedNM

FORMS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {"lr": 0.01}),
    (torch.optim.Adadelta, {"lr": 1.0, "eps": 1e-3}),
]
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
OPTIMIZERS = [(cls, {**kwargs, "foreach": foreach}) for cls, kwargs in FORMS for foreach in (False, True)]
OPTIMIZERS += [(cls, {**kwargs, "fused": True}) for cls, kwargs in FORMS if cls in FUSED]
every_optimizer = pytest.mark.parametrize(
    "cls, kwargs",
    [pytest.param(c, k, id=f"{c.__name__}-{'-'.join(f'{a}={b}' for a, b in k.items())}") for c, k in OPTIMIZERS],
)


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
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), 0.1)
    for one in (model, twin):
        loss_of(one, 0).backward()
    sten.sparsify(model, layout=sten.NM(2, 4), optimizer=opt)
    opt.step()
    other.step()
    expect_close(state(model), {n: t * masks(model).get(n, 1) for n, t in state(twin).items()})


def test_parameter_groups_and_schedulers_survive():
    model = mlp()
    decay, rest = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    opt = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.5}], lr=0.1
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    sten.sparsify(model, layout=sten.NM(2, 4), optimizer=opt)
    assert [[id(p) for p in g["params"]] for g in opt.param_groups] == [[id(p) for p in ps] for ps in (decay, rest)]
    train(model, opt, range(2))
    schedule.step()
    assert opt.param_groups[0]["lr"] < 0.1 and opt.param_groups[0]["weight_decay"] == 0.1


def test_several_optimizers():
    model = mlp()
    opts = [torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9), torch.optim.AdamW(model[2].parameters())]
    sten.sparsify(model, layout=sten.NM(2, 4), optimizer=opts)
    loss_of(model, 0).backward()
    for opt in opts:
        opt.step()
    first, last = (model[i]._parameters["weight"] for i in (0, 2))
    assert opts[0].state[first]["momentum_buffer"].shape == first.shape
    assert opts[1].state[last]["exp_avg"].shape == last.shape


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
    sten.sparsify(model, layout=sten.NM(2, 4), optimizer=opt)
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
    model = sten.trainable(sten.sparsify(mlp(), layout=sten.NM(2, 4)))
    opt = torch.optim.AdamW(model.parameters())
    sten.attach(model, opt)
    train(model, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    sten.attach(sten.finalize(model), opt)
    assert all(
        torch.equal(saved["state"][i][k], t) for i, own in opt.state_dict()["state"].items() for k, t in own.items()
    )


def test_frozen_weights_stay_frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    sten.sparsify(model, layout=sten.NM(2, 4), optimizer=opt)
    assert not model[0]._parameters["weight"].requires_grad
    loss_of(model, 0).backward()
    assert model[0]._parameters["weight"].grad is None
    assert not sten.finalize(model)[0].weight.requires_grad and not sten.densify(model)[0].weight.requires_grad
