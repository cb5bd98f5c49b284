"""What users and their libraries do to `module.weight` in trainable form: as a masked dense twin, or one sentence.

A refusal changes nothing. The forms: a pattern weight in every layout, and methods that train a dense weight.
"""

import copy

import pytest
import torch
from cases import SMALL
from masked import masks, state
from small import batch, mlp, rate
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from weights import one_sentence

import sten
from sten.layouts import CSR, NM

REFUSALS = (RuntimeError, ValueError, TypeError)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.add_module("0", nn.Linear(12, 12))
        self.add_module("1", nn.Linear(12, 12))
        self.get_submodule("1").weight = self.get_submodule("0").weight

    def __getitem__(self, i):
        return self.get_submodule(str(i))

    def forward(self, x):
        return self[1](torch.tanh(self[0](x)))


class Transposed(nn.Module):
    """A layer that stores the transpose of what it multiplies with, as Hugging Face's Conv1D."""

    def __init__(self):
        super().__init__()
        conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
        torch.manual_seed(0)
        self.add_module("0", conv1d(20, 12))

    def __getitem__(self, i):
        return self.get_submodule(str(i))

    def forward(self, x):
        return self[0](x)


def pattern(layout, make=mlp):
    model = make()
    sten.sparsify(model, layout, sparsity=rate(layout), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    return model


def dense_weight(method, layout, make=mlp):
    """A model under a method that trains a dense weight, past its last mask update."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sten.sparsify(model, layout, method, rate(layout), optimizer=optimizer)
    for step in range(4):
        model(batch(step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


FORMS = {
    **{str(layout): lambda layout=layout: pattern(layout) for layout in SMALL},
    "tied": lambda: pattern(CSR(), Tied),
    "transposed": lambda: pattern(CSR(), Transposed),
    "Gradual": lambda: dense_weight(sten.Gradual(1, 3, 1), CSR()),
    "Gradual tied": lambda: dense_weight(sten.Gradual(1, 3, 1), CSR(), Tied),
    "Gradual transposed": lambda: dense_weight(sten.Gradual(1, 3, 1), CSR(), Transposed),
    "SRSTE": lambda: dense_weight(sten.SRSTE(), NM(2, 4)),
    "BiMask": lambda: dense_weight(sten.BiMask(refresh=2), NM(2, 4)),
}
every_form = pytest.mark.parametrize("form", FORMS)
DENSE = ("Gradual", "SRSTE", "BiMask")


def twin_of(model):
    """A dense model with the numbers that the model computes with."""
    twin = mlp() if isinstance(model, nn.Sequential) else type(model)()
    with torch.no_grad():
        for name, param in twin.named_parameters():
            module, _, last = name.rpartition(".")
            param.copy_(getattr(model.get_submodule(module), last).to_dense())
    return twin


def without_grad(act):
    def wrapped(module, mask):
        with torch.no_grad():
            act(module, mask)

    return wrapped


def assign(module, value):
    module.weight = nn.Parameter(value)


def assign_data(module, value):
    module.weight.data = value


def set_in_place(operate):
    def act(module, mask):
        module.weight.data = operate(module.weight.detach().to_dense())

    return act


def dense(module):
    return module.weight.detach().to_dense()


def double(module, mask):
    module.weight *= 2


# act -> (what it does to a module and a mask of its weight)
ACTS = {
    "mul_": without_grad(lambda m, mask: m.weight.mul_(2)),
    "*=": without_grad(double),
    "clamp_": without_grad(lambda m, mask: m.weight.clamp_(-0.05, 0.05)),
    "copy_": without_grad(lambda m, mask: m.weight.copy_(dense(m) * 3)),
    "add_ at the pattern": without_grad(lambda m, mask: m.weight.add_(mask.float())),
    "add_": without_grad(lambda m, mask: m.weight.add_(torch.ones_like(mask, dtype=torch.float32))),
    "data.mul_": lambda m, mask: m.weight.data.mul_(2),
    "data.clamp_": lambda m, mask: m.weight.data.clamp_(-0.05, 0.05),
    "data =": lambda m, mask: assign_data(m, dense(m).clamp(-0.05, 0.05)),
    "data = off the pattern": lambda m, mask: assign_data(m, torch.ones_like(mask, dtype=torch.float32)),
    "init.zeros_": lambda m, mask: nn.init.zeros_(m.weight),
    "init.constant_": lambda m, mask: nn.init.constant_(m.weight, 0.0),
    "assign": lambda m, mask: assign(m, dense(m) * 2),
    "assign zeros": lambda m, mask: assign(m, torch.zeros_like(mask, dtype=torch.float32)),
    "assign off the pattern": lambda m, mask: assign(m, torch.ones_like(mask, dtype=torch.float32)),
    "register_parameter": lambda m, mask: m.register_parameter("weight", nn.Parameter(dense(m) * 2)),
    "grad mode": lambda m, mask: m.weight.mul_(2),
}
MUST_WORK = {"data =", "assign", "assign zeros", "register_parameter", "*="}


def outputs(model):
    return model(batch(0)).detach()


@every_form
@pytest.mark.parametrize("act", ACTS)
def test_acts_on_the_numbers(form, act):
    model = FORMS[form]()
    twin, mask, before, params = twin_of(model), masks(model)["0.weight"], state(model), list(model.parameters())
    error = None
    try:
        ACTS[act](model[0], mask)
    except REFUSALS as caught:
        error = caught
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    if error is not None:
        assert "\n" not in str(error) and (act not in MUST_WORK or (form == "BiMask" and act == "*=")), error
        assert all(torch.equal(t, before[name]) for name, t in state(model).items())
        return
    ACTS[act](twin[0], mask)  # what a dense model refuses, sten refuses too
    if "tied" in form:  # assignment acts as copy_: it does not untie
        twin[1].weight = twin[0].weight
    if form.startswith(DENSE) and "off the pattern" in act:  # trained, and masked when it is used
        with torch.no_grad():
            now = model[0].weight.detach().to_dense() != 0
            twin[0].weight.mul_(now)
    torch.testing.assert_close(outputs(model), outputs(twin))


@every_form
def test_an_initialization_is_seen_or_refused(form):
    model = FORMS[form]()
    for init in (nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.trunc_normal_, nn.init.normal_):
        before = outputs(model)
        try:
            init(model[0].weight)
        except RuntimeError as error:
            assert "Expected a tensor that can be written" in str(error)
            assert torch.equal(outputs(model), before)
        else:
            assert not torch.equal(outputs(model), before)


@every_form
@pytest.mark.parametrize("how", ["requires_grad_", "requires_grad =", "module", "assign"])
def test_freezing_freezes_the_trained_parameter(form, how):
    model = FORMS[form]()
    if how == "requires_grad_":
        model[0].weight.requires_grad_(False)
    elif how == "requires_grad =":
        model[0].weight.requires_grad = False
    elif how == "module":
        model[0].requires_grad_(False)
    else:
        model[0].weight = nn.Parameter(dense(model[0]), requires_grad=False)
    assert not model[0]._parameters["weight"].requires_grad and not model[0].weight.requires_grad
    model[0].weight.requires_grad_(True)
    assert model[0]._parameters["weight"].requires_grad and model[0].weight.requires_grad


@every_form
def test_grad_is_that_of_the_trained_parameter(form):
    model = FORMS[form]()
    twin = twin_of(model)
    assert model[0].weight.grad is None
    for m in (model, twin):
        m(batch(1)).square().sum().backward()
    mask, want = masks(model)["0.weight"], twin[0].weight.grad
    got = model[0].weight.grad
    full = not isinstance(got, sten.SparseTensor)
    assert full == form.startswith(DENSE)
    if form != "BiMask" and form != "SRSTE":  # their gradient is by definition another one
        torch.testing.assert_close(got.to_dense() * mask, want * mask)
    model[0].weight.grad.mul_(2)  # clipping by hand
    torch.testing.assert_close(model[0].weight.grad.to_dense(), got.to_dense())
    new = torch.randn_like(want)
    model[0].weight.grad = new
    torch.testing.assert_close(model[0].weight.grad.to_dense(), new if full else new * mask)
    model[0].weight.grad = None
    assert model[0]._parameters["weight"].grad is None


@every_form
def test_hooks_are_refused_and_name_the_parameter(form):
    module = FORMS[form]()[0]
    for register in (module.weight.register_hook, module.weight.register_post_accumulate_grad_hook):
        with pytest.raises(RuntimeError, match=r'module\._parameters\["weight"\]') as error:
            register(lambda grad: None)
        assert one_sentence(error)


@every_form
def test_another_shape_or_dtype_is_refused(form):
    model = FORMS[form]()
    before, w = outputs(model), dense(model[0])
    for value in (w[:, :4].clone(), w[:1].clone(), w.double(), w.half()):
        with pytest.raises(ValueError, match="Expected a tensor of shape") as error:
            model[0].weight = nn.Parameter(value)
        assert one_sentence(error)
    assert torch.equal(outputs(model), before)


def test_what_is_read_trains():
    """The effective weight is differentiable: a penalty on it reaches the trained Parameter."""
    model = dense_weight(sten.Gradual(1, 3, 1), CSR())
    twin, mask = twin_of(model), masks(model)["0.weight"]
    for m in (model, twin):
        (m[0].weight.square().sum() + m[0].weight[3:5].abs().sum()).backward()
    torch.testing.assert_close(model[0]._parameters["weight"].grad * mask, twin[0].weight.grad * mask)
    assert type(model[0].weight * 2) is torch.Tensor and type(model(batch(0))) is torch.Tensor


# libraries that replace the Parameter


class Twice(nn.Module):
    def forward(self, w):
        return 2 * w


REPLACERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "register_parametrization": lambda m: parametrize.register_parametrization(m, "weight", Twice()),
    "register_parametrization unsafe": lambda m: parametrize.register_parametrization(
        m, "weight", Twice(), unsafe=True
    ),
    "utils.spectral_norm": nn.utils.spectral_norm,
    "prune.l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", amount=3),
    "prune.identity": lambda m: prune.identity(m, "weight"),
    "prune.custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.ones(m.weight.shape)),
    "del": lambda m: delattr(m, "weight"),
}


@every_form
@pytest.mark.parametrize("name", REPLACERS)
def test_what_replaces_the_parameter_is_refused(name, form):
    if form.endswith("transposed") and "norm" in name:
        pytest.skip("torch reads the sizes of its own layers only")
    model = FORMS[form]()
    keys, want, before = list(model.state_dict()), outputs(model), type(model[0])
    with pytest.raises(RuntimeError, match=r"Expected .* got ") as error:
        REPLACERS[name](model[0])
    assert one_sentence(error)
    assert list(model.state_dict()) == keys and torch.equal(outputs(model), want) and type(model[0]) is before


@pytest.mark.parametrize("name", [n for n in REPLACERS if n != "del"])
@pytest.mark.filterwarnings("ignore:sten")
def test_what_the_refusal_proposes_works(name):
    model = sten.densify(pattern(CSR()))
    REPLACERS[name](model[0])
    assert outputs(model).isfinite().all()


# several at once, as a user's copies of the model


def test_an_effective_weight_can_be_copied_and_pickled():
    model = dense_weight(sten.SRSTE(), NM(2, 4))
    with torch.no_grad():
        w = model[0].weight
        for other in (copy.deepcopy(w), w.clone(), w.detach().clone(), w * 1):
            assert torch.equal(other, w)
        assert w.numpy().shape == (20, 12) and w.tolist()[0] == w[0].tolist()
