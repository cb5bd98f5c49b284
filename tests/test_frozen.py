"""Weights that do not train: left out at `sten.sparsify`, or frozen later, when they keep pattern and numbers."""

import warnings

import pytest
import torch
from torch import nn
from training_methods import METHODS
from training_models import OPTIMIZERS, engine_of, loss_of, mlp, sparse, train

import sten
from sten.layouts import BSR, CSR, NM, FanIn, Masked, VectorNM

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:sten. the masks leave rows")]

DYNAMIC = [method for method in METHODS if not method.acts_once]
UPDATES = [
    (method, layout)
    for method, layouts in [
        (sten.SET(24, every=2), [Masked(), CSR(), BSR((4, 4)), NM(2, 4), VectorNM(1, 4, 4), FanIn()]),
        (sten.RigL(24, 0.6, every=2, stop=1.0), [Masked(), CSR(), BSR((4, 4)), NM(2, 4), VectorNM(1, 4, 4), FanIn()]),
        (sten.DSTEE(24, every=2, stop=1.0), [CSR(), FanIn()]),
        (sten.SRigL(24, every=2, stop=1.0), [FanIn()]),
        (sten.SparseMomentum(24, every=2), [CSR(), Masked()]),
        (sten.Gradual(1, 20, 2), [CSR(), BSR((4, 4)), FanIn()]),
        (sten.BlockPruneGrow(1, 20, 2), [BSR((4, 4))]),
        (sten.Transposable(refresh=2), [NM(2, 4)]),
        (sten.BiMask(refresh=2, tries=3), [NM(2, 4)]),
    ]
    for layout in layouts
]
every_update = pytest.mark.parametrize(
    ("method", "layout"), UPDATES, ids=[f"{type(method).__name__}-{layout}" for method, layout in UPDATES]
)


def layout_of(method):
    return next(layout for layout in (CSR(), NM(2, 4), FanIn(), BSR((4, 4))) if fits(method, layout))


def fits(method, layout):
    try:
        method.check(layout)
    except ValueError:
        return False
    return True


def optimizer_for(method, params):
    return sten.optim.AdamS(params, 1e-2) if method.optimizer else OPTIMIZERS["momentum"](params)


@pytest.mark.parametrize("method", DYNAMIC, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("attach", [False, True])
def test_a_frozen_weight_is_left_dense_and_listed(method, attach):
    """The first frozen layer, as in fine-tuning; the optimizer has what trains, as most scripts write it."""
    model = mlp()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    layout = layout_of(method)
    sparsity = 0.75 if layout.rate is None else None
    optimizer = optimizer_for(method, [p for p in model.parameters() if p.requires_grad])
    if attach:
        optimizer = None
    sten.sparsify(model, layout, method, sparsity, optimizer=optimizer)
    if attach:
        optimizer = optimizer_for(method, [p for p in model.parameters() if p.requires_grad])
        sten.attach(model, optimizer)
    assert type(model[0]) is nn.Linear and f"it is frozen, and {type(method).__name__} acts" in str(sten.summary(model))
    train(model, optimizer, 14)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedules that are not at their end
        sten.finalize(model)
    assert torch.equal(model[0].weight, before) and isinstance(model[2].weight, sten.SparseTensor)


@pytest.mark.parametrize("weights", ["0.weight", ["2.weight", "0.weight"]])
def test_a_frozen_weight_that_was_named_is_refused(weights):
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for given in (optimizer, None):
        with pytest.raises(ValueError, match=r"requires a gradient for RigL, .* got 0\.weight, which is frozen"):
            sten.sparsify(model, CSR(), sten.RigL(24, every=4), 0.75, weights=weights, optimizer=given)
    assert type(model[0]) is type(model[2]) is nn.Linear and not optimizer._optimizer_step_pre_hooks


def test_a_method_that_acts_once_prunes_frozen_weights():
    model = mlp().requires_grad_(False)
    sten.sparsify(model, CSR(), sten.Magnitude(), 0.75)
    assert model[0].weight.density == 0.25 and not model[0].weight.requires_grad


def settles(method, layout):
    """Whether the masks of these few entries stay as they are, though updates go on."""
    return isinstance(method, sten.BiMask) or (isinstance(method, sten.RigL) and isinstance(layout, BSR))


def state_of(weight):
    return weight.dense(weight.param).clone(), weight.active().clone()


def freeze(model, optimizer, how):
    if how == "requires_grad":
        model[0].requires_grad_(False)
    else:  # taken out of the optimizer
        optimizer.param_groups[0]["params"].pop(0)
    optimizer.zero_grad()


@every_update
@pytest.mark.parametrize("how", ["requires_grad", "popped"])
def test_a_weight_that_is_frozen_later_keeps_pattern_and_numbers(method, layout, how):
    model, optimizer, engine = sparse(method, layout)
    train(model, optimizer, 3)
    first, second = engine.weights
    freeze(model, optimizer, how)
    frozen, moving = state_of(first), state_of(second)
    param, updates = first.param, engine.updates
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="sten: the masks leave rows")
        train(model, optimizer, 8, first=3)
    assert all(map(torch.equal, state_of(first), frozen)), "the frozen weight changed"
    assert engine.updates > updates and engine.deferred_update_step is None
    assert not torch.equal(state_of(second)[0], moving[0]), "the other weight must go on"
    if not settles(method, layout):
        assert not torch.equal(state_of(second)[1], moving[1]), "the mask of the other weight must move"
    # it continues
    if how == "popped":
        optimizer.param_groups[0]["params"].insert(0, first.param)
    else:
        param.requires_grad_()
    train(model, optimizer, 8, first=11)
    assert not torch.equal(state_of(first)[0], frozen[0])
    if not settles(method, layout):
        assert not torch.equal(state_of(first)[1], frozen[1])


@every_update
def test_nothing_moves_while_all_weights_are_frozen_and_the_bias_trains(method, layout):
    model, optimizer, engine = sparse(method, layout)
    train(model, optimizer, 3)
    for weight in engine.weights:
        weight.param.requires_grad_(False)
    optimizer.zero_grad()
    before = [state_of(weight) for weight in engine.weights]
    updates, twin = engine.updates, mlp()
    with torch.no_grad():
        for mine, layer in zip((twin[0], twin[2]), (model[0], model[2]), strict=True):
            mine.weight.copy_(layer.weight.to_dense())
            mine.bias.copy_(layer.bias)
            mine.weight.requires_grad_(False)
    other = OPTIMIZERS["momentum"](twin.parameters())
    for mine, yours in ((twin[0].bias, model[0].bias), (twin[2].bias, model[2].bias)):
        other.state[mine]["momentum_buffer"] = optimizer.state[yours]["momentum_buffer"].clone()
    train(model, optimizer, 6, first=3)
    train(twin, other, 6, first=3)
    for weight, (w, mask) in zip(engine.weights, before, strict=True):
        assert torch.equal(weight.dense(weight.param), w) and torch.equal(weight.active(), mask)
    assert engine.updates == updates and engine.step == 9
    if not isinstance(method, sten.BiMask):  # whose gradient of the input has a mask of its own
        for mine, yours in ((twin[0].bias, model[0].bias), (twin[2].bias, model[2].bias)):  # no step is lost
            torch.testing.assert_close(yours, mine)


@pytest.mark.parametrize("method", [sten.RigL(40, every=3), sten.DSTEE(40, every=3)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("layout", [CSR(), BSR((4, 4)), FanIn(), NM(2, 4)], ids=str)
def test_beside_a_frozen_weight_the_others_train_as_beside_a_dense_frozen_layer(method, layout):
    """Model `b` has the frozen numbers in an ordinary dense layer: the oracle of what the sparse frozen one does."""
    a, first, engine = sparse(method, layout, dtype=torch.float64)
    b = mlp(dtype=torch.float64)
    second = OPTIMIZERS["momentum"](b.parameters())
    sparsity = 0.75 if layout.rate is None else None
    with torch.no_grad():
        b[0].weight.copy_(a[0].weight.to_dense())
    sten.sparsify(b, layout, method, sparsity, weights="2.weight", optimizer=second)
    mask = engine.weights[1].active()
    value = engine.weights[1].dense(engine.weights[1].param)
    edit = sten.extend.Edit(mask=mask, value=value, state=engine.weights[1].state)
    engine_of(b).weights[0].change(edit, second)()
    for model, optimizer in ((a, first), (b, second)):
        (model[0].weight if model is a else model[0]).requires_grad_(False)
        model[0].bias.requires_grad_(False)
        train(model, optimizer, 14, dtype=torch.float64)
    assert engine.updates == 4 and engine_of(b).updates == 4
    assert torch.equal(engine.weights[1].active(), engine_of(b).weights[0].active())
    torch.testing.assert_close(a[2].weight.to_dense(), b[2].weight.to_dense())
    torch.testing.assert_close(a[2].bias, b[2].bias)


def test_a_weight_that_is_unfrozen_just_before_a_mask_update_takes_part():
    model, optimizer, engine = sparse(sten.RigL(24, every=4))
    model[0].weight.requires_grad_(False)
    train(model, optimizer, 3)
    before = engine.weights[0].active()
    model[0].weight.requires_grad_()
    train(model, optimizer, 1, first=3)
    assert engine.updates == 1 and not torch.equal(engine.weights[0].active(), before)


def test_sparse_momentum_moves_entries_among_the_weights_that_train():
    model, optimizer, engine = sparse(sten.SparseMomentum(40, every=3))
    counts = [int(weight.active().sum()) for weight in engine.weights]
    train(model, optimizer, 2)
    model[0].weight.requires_grad_(False)
    train(model, optimizer, 8, first=2)
    assert engine.updates == 3 and [int(weight.active().sum()) for weight in engine.weights] == counts


@pytest.mark.parametrize("sparsity", [sten.Uniform(0.75), sten.ERK(0.75), sten.Global(0.75)], ids=str)
def test_gradual_gives_the_others_the_share_that_they_have_without_freezing(sparsity):
    runs = []
    for frozen in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        sten.sparsify(model, CSR(), sten.Gradual(1, 8, 2), sparsity, optimizer=optimizer)
        model[0]._parameters["weight"].requires_grad_(not frozen)
        train(model, optimizer, 9)
        runs.append([int(weight.active().sum()) for weight in engine_of(model).weights])
    assert runs[0][1] == runs[1][1] and runs[1][0] == 32 * 16 and sum(runs[0]) == 192


@pytest.mark.parametrize("method", [sten.SparseMomentum(24, every=3), sten.RigL(24, every=3), sten.DSTEE(24, every=3)])
def test_a_layer_that_no_gradient_reaches_keeps_its_mask_with_a_warning(method):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.used(x)

    model = Skips()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sten.sparsify(model, CSR(), method, 0.75, optimizer=optimizer)
    engine = engine_of(model)
    before = [state_of(weight) for weight in engine.weights]
    with pytest.warns(UserWarning, match=r"no gradient reached unused\.weight at the mask update of step"):
        train(model, optimizer, 5)
    assert engine.updates == 1
    assert all(map(torch.equal, state_of(engine.weights[0]), before[0]))
    assert not torch.equal(state_of(engine.weights[1])[1], before[1][1])


def test_a_layer_that_was_replaced_does_not_stop_the_others():
    model, optimizer, engine = sparse(sten.RigL(24, every=3))
    train(model, optimizer, 2)
    model[0] = nn.Linear(16, 32)  # the sparse one is gone
    before = engine.weights[1].active()
    train(model, optimizer, 6, first=2)
    assert engine.updates == 2 and not torch.equal(engine.weights[1].active(), before)


def test_a_compiled_model_with_a_frozen_weight():
    model, optimizer, engine = sparse(sten.RigL(24, every=3))
    plain, first, other = sparse(sten.RigL(24, every=3))
    for each in (model, plain):
        each[0].weight.requires_grad_(False)
    torch._dynamo.reset()
    train(torch.compile(model, backend="aot_eager", fullgraph=True), optimizer, 7)
    train(plain, first, 7)
    assert engine.updates == other.updates == 2
    for mine, yours in zip(engine.weights, other.weights, strict=True):
        assert torch.equal(mine.active(), yours.active())
        torch.testing.assert_close(mine.dense(mine.param), yours.dense(yours.param), rtol=1e-4, atol=1e-5)


def test_freezing_while_gradients_of_an_earlier_pass_exist():
    """Between backward and step: torch's optimizers still apply the gradient; the mask stays."""
    model, optimizer, engine = sparse(sten.SET(24, every=3))
    train(model, optimizer, 2)
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    mask = engine.weights[0].active()
    model[0].weight.requires_grad_(False)
    optimizer.step()
    assert engine.updates == 1 and torch.equal(engine.weights[0].active(), mask)
