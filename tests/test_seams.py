"""What PyTorch's training tools do with each form: the same as with the dense weight that it computes with."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from forms import FORMS, dense_of, every_form, sparse
from small import batch, every_layout, mlp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import sten

pytestmark = pytest.mark.filterwarnings("ignore:sten. the masks leave rows empty", "ignore:.*lr_scheduler.step")


def close(got, want, tolerance=1e-4):
    got, want = (t.to_dense() if isinstance(t, sten.SparseTensor) else t for t in (got, want))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def expect_gradients(model, dense, tolerance=1e-4):
    """Those of the dense weights, at the pattern."""
    for ours, theirs in zip(model, dense, strict=True):
        if isinstance(ours, nn.Linear):
            kept = ours.weight.mask() if isinstance(ours.weight, sten.SparseTensor) else ours.weight != 0
            close(ours.bias.grad, theirs.bias.grad, tolerance)
            close(ours.weight.grad.to_dense() * kept, theirs.weight.grad * kept, tolerance)


@pytest.mark.cell("autocast")
@every_layout
@every_form
def test_autocast(layout, form):
    model = sparse(layout, form)
    dense = dense_of(model)
    for each in (model, dense):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(batch(0))
        assert y.dtype is torch.bfloat16
        y.float().square().mean().backward()
    close(model(batch(0)), dense(batch(0)), 2e-2)
    expect_gradients(model, dense, 2e-2)


@pytest.mark.cell("GradScaler")
@every_layout
@every_form
def test_grad_scaler(layout, form):
    """A scaled step is the plain one; a step with an infinite gradient is left out."""
    model = sparse(layout, form)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, plain)]
    if form == "dense weight":
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            sten.attach(each, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(model(batch(step)).square().mean() * factor).backward()
        scaler.step(optimizers[0])
        scaler.update()
        if factor == 1.0:
            plain(batch(step)).square().mean().backward()
            optimizers[1].step()
        close(model(batch(9)), plain(batch(9)))
    assert scaler.get_scale() == 512.0


@pytest.mark.cell("checkpointing")
@every_layout
@every_form
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(layout, form, reentrant):
    model = sparse(layout, form)
    dense, inputs = dense_of(model), [batch(0).requires_grad_() for _ in range(2)]
    for each, x in zip((model, dense), inputs, strict=True):
        checkpoint(each, x, use_reentrant=reentrant).square().mean().backward()
    close(inputs[0].grad, inputs[1].grad)
    expect_gradients(model, dense)


@pytest.mark.cell("hooks")
@every_layout
@every_form
def test_hooks(layout, form):
    """Of modules: inputs, outputs and their gradients; of the Parameter: once for each backward pass."""
    model = sparse(layout, form)
    dense, seen = dense_of(model), {0: [], 1: []}
    for number, each in enumerate((model, dense)):
        note = seen[number]
        each[2].register_forward_pre_hook(lambda module, args, note=note: note.append(args[0]))
        each[2].register_forward_hook(lambda module, args, out, note=note: note.append(out))
        each[2].register_full_backward_hook(lambda module, into, out, note=note: note.extend((into[0], out[0])))
        param = each[2]._parameters["weight"]
        param.register_post_accumulate_grad_hook(lambda p, note=note: note.append(p.grad.sum().view(1)))
        param.register_hook(lambda grad, note=note: note.append(grad.sum().view(1)))
        each(batch(0)).square().mean().backward()
    assert len(seen[0]) == len(seen[1]) == 6
    sums = 2 if form == "dense weight" else 0
    for got, want in zip(seen[0], seen[1], strict=True):
        if got.shape != (1,) or sums:
            close(got, want)


@pytest.mark.cell("EMA")
@pytest.mark.cell("SWA")
@every_layout
@every_form
def test_averages(layout, form):
    """Averages of a pattern's weights are those of dense weights; under a method they follow (`sten.follow`)."""
    for function, weights in ((get_ema_multi_avg_fn(0.75), (0.75, 0.25)), (None, (0.5, 0.5))):
        model = sparse(layout, form)
        average = AveragedModel(model, multi_avg_fn=function) if function else AveragedModel(model)
        average.update_parameters(model)
        first = dense_of(model)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3)
        average.update_parameters(model)
        second, want = dense_of(model), mlp()
        with torch.no_grad():
            for p, a, b in zip(want.parameters(), first.parameters(), second.parameters(), strict=True):
                p.copy_(weights[0] * a + weights[1] * b)
        close(average(batch(0)), want(batch(0)))


@pytest.mark.cell("DataParallel", refused="use DistributedDataParallel")
@every_layout
@every_form
def test_data_parallel(layout, form):
    """It copies Parameters to GPUs as plain tensors: refused before the first copy. Without GPUs it calls the model."""
    model = sparse(layout, form)
    assert torch.equal(nn.DataParallel(model)(batch(0)), model(batch(0)))
    with pytest.raises(NotImplementedError, match=r"^Expected a dense model for nn\.DataParallel, .*; use Distr\w+\.$"):
        if form == "finalized":
            torch.nn.parallel.comm.broadcast_coalesced([model[0].weight], [0, 1])
        else:
            model[0]._replicate_for_data_parallel()


@every_layout
def test_parametrization_on_top(layout):
    """Of a finalized weight; in training it is refused (tests/test_user_acts.py)."""

    class Double(nn.Module):
        def forward(self, w):
            return w * 2

    model = sparse(layout, "finalized")
    dense = dense_of(model)
    for each in (model, dense):
        nn.utils.parametrize.register_parametrization(each[0], "weight", Double())
        each(batch(0)).square().mean().backward()
    close(model(batch(0)), dense(batch(0)))
    got, want = (each[0].parametrizations.weight.original for each in (model, dense))
    close(got.grad, want.grad * got.mask())


def through_torch_save(model):
    """A state dict, read without running what the file says, into a model of the same form."""
    file, other = io.BytesIO(), copy.deepcopy(model)
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, marks=pytest.mark.cell("deepcopy"), id="deepcopy"),
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), marks=pytest.mark.cell("pickle"), id="pickle"),
        pytest.param(through_torch_save, marks=pytest.mark.cell("weights_only"), id="weights_only"),
    ],
)
@every_layout
@every_form
def test_copies_are_equal_and_independent(layout, form, copied):
    model = sparse(layout, form)
    want = model(batch(0)).detach()
    other = copied(model)
    assert torch.equal(other(batch(0)), want)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert torch.equal(model(batch(0)), want) and not torch.equal(other(batch(0)), want)


@pytest.mark.cell("8-bit optimizers")
@every_layout
@pytest.mark.parametrize("form", FORMS[1:])
def test_optimizer_states_of_8_bits(layout, form):
    """torchao's optimizer, whose states of 4096 numbers and more are tensors of its own."""
    optim = pytest.importorskip("torchao.optim")
    pattern = form == "trainable"
    method = sten.Static() if pattern else sten.Gradual(1, 3) if layout.rate is None else sten.STE()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64))
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-2)
    sten.sparsify(model, layout, method, 0.5 if layout.rate is None else None, optimizer=optimizer)
    x, losses = torch.randn(8, 64), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert any("8bit" in type(t).__name__ for state in optimizer.state.values() for t in state.values())
