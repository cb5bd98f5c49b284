"""Between forward and backward: steps, writes, casts and mask updates, each as a masked dense twin takes them."""

import copy

import pytest
import torch
from masked import masked_twin
from small import batch, every_layout, mlp, rate
from torch import nn

import sten
from sten.layouts import BSR, CSR, NM, FanIn

FORMS = ["pattern", "finalized"]
every_form = pytest.mark.parametrize("form", FORMS)


def pair(layout, form, dense=None):
    """A sparse model and its masked dense twin."""
    dense = dense or mlp()
    model = sten.sparsify(copy.deepcopy(dense), layout, sparsity=rate(layout), weights="*")
    if form == "pattern":
        sten.trainable(model)
    return model, masked_twin(dense, model)


def step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def scale(model, x):
    with torch.no_grad():
        model[0].weight.mul_(2)


def load(model, x):
    model.load_state_dict(copy.deepcopy(model.state_dict()))


ACTS = [step, scale, load]


def grad_of(model):
    grad = model[0].weight.grad
    return grad.to_dense() if isinstance(grad, sten.SparseTensor) else grad


def outcome(model, x, act):
    """The error of a backward pass that comes after the act, or the gradients of input and weight."""
    loss = model(x).sum()
    act(model, batch(1) if x.dim() == 2 else torch.randn_like(x))
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return x.grad, grad_of(model)


@every_layout
@every_form
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_weights_that_changed_raise_as_in_torch(layout, form, act):
    model, twin = pair(layout, form)
    for m in (model, twin):
        text = outcome(m, batch(0).requires_grad_(), act)
        assert "modified by an inplace operation" in text, text


@every_layout
@every_form
def test_a_first_layer_needs_no_old_weight(layout, form):
    """Without a gradient of the input nothing reads the weight in backward, so a step in between is allowed."""
    dense = nn.Sequential(nn.Linear(12, 20))
    model, twin = pair(layout, form, dense)
    got, want = (outcome(m, batch(0), step) for m in (model, twin))
    torch.testing.assert_close(got[1], want[1])


@every_form
@pytest.mark.parametrize("layout", [CSR(), BSR((4, 4)), NM(2, 4)], ids=str)
@pytest.mark.parametrize("asked", ["input", "weight"])
def test_convolutions(layout, form, asked):
    dense = nn.Sequential(nn.Conv2d(4, 8, 3))
    model, twin = pair(layout, form, dense)
    x = torch.randn(2, 4, 6, 6, requires_grad=asked == "input")
    got = outcome(model, x, step)
    if asked == "input":
        assert "modified by an inplace operation" in got
    else:  # torch refuses here, too: its convolution saves the weight in any case
        twin(x).sum().backward()
        torch.testing.assert_close(got[1], grad_of(twin))


@pytest.mark.parametrize("asked", ["input", "weight"])
@pytest.mark.parametrize(
    "case", [(sten.RigL(24, every=1), CSR()), (sten.SET(24, every=1), NM(2, 4)), (sten.SRigL(24, every=1), FanIn())],
    ids=lambda c: type(c[0]).__name__,
)  # fmt: skip
def test_a_mask_update_in_between_raises(case, asked):
    method, layout = case
    model = nn.Sequential(nn.Linear(12, 20))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    sten.sparsify(model, layout, method, rate(layout), optimizer=optimizer)
    x = batch(0).requires_grad_(asked == "input")
    for i in range(3):  # a mask update that reads gradients begins at the second step
        loss = model(x).sum()
        optimizer.zero_grad()
        model(batch(1 + i)).square().sum().backward()
        optimizer.step()
    assert int(model[0].weight_pattern.engine.updates) > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_layout
def test_compiled(layout):
    """A graph that has unpacked the weight keeps its dense copy, which no step changes."""
    torch._dynamo.reset()
    model, twin = pair(layout, "pattern")
    x, z = (batch(0).requires_grad_() for _ in range(2))
    twin(z).sum().backward()
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum()
    step(model, batch(1))
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(x.grad, z.grad)


# casts


CASTS = [lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.float(), lambda m: m.to("meta")]


@every_layout
@pytest.mark.parametrize("asked", ["input", "weight"])
@pytest.mark.parametrize("cast", CASTS[:3], ids=["double", "bfloat16", "float"])
def test_a_trainable_model_is_cast_while_an_output_is_alive(layout, cast, asked):
    model, twin = pair(layout, "pattern")
    x, z = (batch(0).requires_grad_(asked == "input") for _ in range(2))
    losses = [m(i).square().sum() for m, i in ((model, x), (twin, z))]
    for m, loss in zip((model, twin), losses, strict=True):
        cast(m)
        loss.backward()
    for name, param in twin.named_parameters():
        got = (
            model.get_submodule(name[0]).weight.grad.to_dense() if "weight" in name else model.get_parameter(name).grad
        )
        torch.testing.assert_close(got, param.grad)
    if asked == "input":
        torch.testing.assert_close(x.grad, z.grad)


@every_layout
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("cast", CASTS, ids=["double", "bfloat16", "float", "meta"])
def test_a_finalized_model_is_cast_while_an_output_is_alive(layout, cast, frozen):
    """torch swaps Parameters of a subclass; a graph that still leads to the old one raises torch's own sentence."""
    model, twin = pair(layout, "finalized")
    for m in (model, twin):
        m.requires_grad_(not frozen)
    x, z = (batch(0).requires_grad_() for _ in range(2))
    loss, want = model(x).square().sum(), twin(z).square().sum()
    dtype = cast(copy.deepcopy(twin))[0].weight.dtype
    assert cast(model)[0].weight.dtype == dtype and model[0].weight.device == cast(copy.deepcopy(twin))[0].weight.device
    if frozen:
        loss.backward()
        want.backward()
        torch.testing.assert_close(x.grad, z.grad)
    else:
        with pytest.raises(RuntimeError, match="swap_tensors"):
            loss.backward()


@every_layout
@pytest.mark.parametrize("result", [lambda w: w.to_dense(), lambda w: w[0], lambda w: w.exp(), lambda w: w.norm()])
def test_a_finalized_model_is_cast_while_a_dense_copy_is_alive(layout, result):
    model, twin = pair(layout, "finalized")
    alive, want = result(model[0].weight), result(twin[0].weight).detach().clone()
    model.double()
    torch.testing.assert_close(model(batch(0).double()), twin.double()(batch(0).double()))
    torch.testing.assert_close(alive.detach(), want)
    with pytest.raises(RuntimeError, match="swap_tensors"):
        alive.sum().backward()


@every_layout
def test_a_cast_while_a_view_is_in_use_is_refused(layout):
    model, twin = pair(layout, "finalized")
    view = model[0].weight.t()
    with pytest.raises(RuntimeError, match=r"Expected no view of a sparse weight.*w\.t\(\).*call \.to\(\) again"):
        model.to(torch.float64)
    del view
    assert torch.equal(model.to(torch.float64)(batch(0).double()), model(batch(0).double()))
    torch.testing.assert_close(model(batch(0).double()), twin.double()(batch(0).double()))


def test_a_dense_copy_of_a_leaf_that_took_another_pattern_raises():
    w, other = (sten.from_dense(torch.eye(4).roll(i, 1), CSR()) for i in range(2))
    p = nn.Parameter(w)
    loss = p.to_dense().square().sum()
    p.data = other
    with pytest.raises(RuntimeError, match="has another pattern than in the forward pass"):
        loss.backward()


# gradients of gradients, and the weight of a leaf that took another pattern


@every_layout
@every_form
def test_gradients_of_gradients(layout, form):
    model, twin = pair(layout, form)
    for m in (model, twin):
        x = batch(0).requires_grad_()
        (grad,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    torch.testing.assert_close(grad_of(model), grad_of(twin), rtol=1e-4, atol=1e-5)


def test_a_leaf_that_took_another_pattern_raises():
    w, other = (sten.from_dense(torch.eye(4).roll(i, 1), CSR()) for i in range(2))
    p, x = nn.Parameter(w), torch.randn(3, 4, requires_grad=True)
    loss = nn.functional.linear(x, p).sum()
    p.data = other
    with pytest.raises(RuntimeError, match="has another pattern than in the forward pass"):
        loss.backward()
