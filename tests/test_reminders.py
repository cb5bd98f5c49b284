"""The warnings of empty rows and of a forgotten `sten.attach`, and the cases without a warning."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from training_models import OPTIMIZERS, dense_weights, engine_of, loss_of, mlp, sparse, train

import sten
from sten.layouts import BSR, CSR, NM, FanIn, Masked, VectorNM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("layout", [CSR(), Masked(), BSR((4, 4))], ids=str)
@pytest.mark.parametrize("method", [sten.Magnitude(), sten.Static(), sten.SET(24, every=4)], ids=lambda m: str(m)[:6])
def test_sparsify_warns_of_empty_rows(layout, method):
    with pytest.warns(UserWarning, match=r"0\.weight \(\d+ of 32\)") as caught:
        sten.sparsify(mlp(), layout, method, 0.97)
    assert len(caught) == 1 and caught[0].filename == __file__ and "sten.ERK" in str(caught[0].message)


@pytest.mark.parametrize("layout", [CSR(), FanIn()], ids=str)
def test_a_warning_of_layers_without_entries(layout):
    with pytest.warns(UserWarning, match=r"0\.weight \(all 32\);"):
        sten.sparsify(mlp(), layout, sparsity=0.9999, weights="0.weight")


def test_one_warning_for_a_large_model():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    with pytest.warns(UserWarning, match=r"4\.weight \(\d of 8\) and 7 more; ") as caught:
        sten.sparsify(model, CSR(), sparsity=0.95)
    assert len(caught) == 1


def test_a_mask_update_does_not_repeat_the_warning():
    with pytest.warns(UserWarning, match="rows empty"):
        model, optimizer, engine = sparse(sten.SET(24, every=2), sparsity=0.97)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 5)
    assert engine.updates == 2


def test_a_mask_update_warns_of_empty_rows():
    model, optimizer, _ = sparse(sten.Gradual(2, 4, 2), sparsity=0.97)  # no empty rows before
    with pytest.warns(UserWarning, match=r"0\.weight \(\d+ of 32\)") as caught:
        train(model, optimizer, 5)
    assert caught[0].filename == train.__code__.co_filename


@pytest.mark.parametrize("layout", [NM(1, 4), VectorNM(1, 4, 4), FanIn(), sten.GroupedNM(2, 4, 1)], ids=str)
@pytest.mark.usefixtures("quiet")
def test_layouts_without_empty_rows_do_not_warn(layout):
    sten.sparsify(mlp(), layout, sparsity=None if layout.rate else 0.9)


@pytest.mark.usefixtures("quiet")
def test_rows_that_were_zero_before_do_not_warn():
    model = mlp()
    with torch.no_grad():
        model[0].weight[3] = 0
    sten.sparsify(model, CSR(), None)


@pytest.mark.parametrize(
    ("steps", "hint"), [(50, r"in 0\.75 \* 50 steps, got every=100: pass every=3, say"), (1, "raise total_steps")]
)
def test_a_method_without_mask_updates_is_refused(steps, hint):
    with pytest.raises(ValueError, match=f"Expected a mask update of RigL .*{hint}") as error:
        sten.RigL(steps)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="Expected a mask update of SparseMomentum"):
        sten.SparseMomentum(steps)


UNATTACHED = [
    (sten.SET(24, every=4), CSR()), (sten.RigL(24, every=4), BSR((4, 4))), (sten.Gradual(2, 8, 3), CSR()),
    (sten.SRSTE(), NM(2, 4)), (sten.DecayingMask(20), NM(1, 4)), (sten.Transposable(), NM(2, 4)), (sten.CAST(20),
    NM(2, 4)),
]  # fmt: skip


@pytest.mark.parametrize("case", UNATTACHED, ids=lambda c: type(c[0]).__name__)
def test_an_unattached_method_warns_once(case):
    method, layout = case
    model = sten.sparsify(mlp(), layout, method, None if layout.rate else 0.5)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    loss_of(model, 0).backward()
    with pytest.warns(
        UserWarning, match=rf"{type(method).__name__} does not act on 0\.weight, 2\.weight: call"
    ) as caught:
        optimizer.step()
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)


QUIET = [
    (sten.Static(), CSR()), (sten.Magnitude(), CSR()), (sten.STE(), NM(2, 4)), (sten.BDWP(), NM(2, 4)),
]  # fmt: skip


@pytest.mark.parametrize("case", QUIET, ids=lambda c: type(c[0]).__name__)
@pytest.mark.usefixtures("quiet")
def test_stateless_and_fixed_methods_do_not_warn(case):
    method, layout = case
    model = sten.trainable(sten.sparsify(mlp(), layout, method, None if layout.rate else 0.5))
    train(model, OPTIMIZERS["sgd"](model.parameters()), 2)


@pytest.mark.parametrize("case", UNATTACHED[:-1], ids=lambda c: type(c[0]).__name__)
@pytest.mark.usefixtures("quiet")
def test_no_warning_where_attach_comes_before_the_first_step(case):
    method, layout = case
    model = sten.sparsify(mlp(), layout, method, None if layout.rate else 0.5)
    other = mlp()
    train(other, OPTIMIZERS["sgd"](other.parameters()), 2)  # another model's steps are not ours
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    loss_of(model, 0).backward()  # a learning-rate finder, a test of the loss
    optimizer.zero_grad()
    sten.attach(model, optimizer)
    train(copy.deepcopy(model), OPTIMIZERS["sgd"](mlp().parameters()), 1)
    train(model, optimizer, 1)


@pytest.mark.usefixtures("quiet")
def test_no_warning_after_finalize_or_attach():
    model = sten.sparsify(mlp(), CSR(), sten.SET(24, every=4), 0.5)
    train(sten.finalize(model), OPTIMIZERS["sgd"](model.parameters()), 1)
    model = sten.sparsify(mlp(), CSR(), sten.SET(24, every=4), 0.5)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sten.attach(model, optimizer)
    train(model, optimizer, 2)


# a method whose engine was lost


LOST = [
    (sten.SET(24, every=3), CSR()), (sten.RigL(24, every=3), BSR((4, 4))), (sten.SparseMomentum(24, every=3), CSR()),
    (sten.Gradual(2, 14, 3), CSR()), (sten.SRSTE(), NM(2, 4)),
]  # fmt: skip
every_lost = pytest.mark.parametrize("case", LOST, ids=lambda c: type(c[0]).__name__)


def both_copied(model, optimizer):
    return copy.deepcopy((model, optimizer))


def both_pickled(model, optimizer):
    return pickle.loads(pickle.dumps((model, optimizer)))


def model_copied(model, optimizer):
    other = copy.deepcopy(model)
    return other, OPTIMIZERS["adamw"](other.parameters())


def new_optimizer(model, optimizer):
    other = OPTIMIZERS["adamw"](model.parameters())
    other.load_state_dict(optimizer.state_dict())
    return model, other


def in_a_file(model, optimizer):
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_lost
@pytest.mark.parametrize("lose", [both_copied, both_pickled, model_copied, new_optimizer, in_a_file])
def test_a_lost_engine_warns_once_and_attach_goes_on(case, lose):
    method, layout = case
    straight, first, _ = sparse(method, layout, 0.5, "adamw")
    train(straight, first, 4)
    before = dense_weights(straight)
    model, optimizer = lose(straight, first)
    loss_of(model, 4).backward()
    text = rf"{type(method).__name__} does not act on 0\.weight, 2\.weight: call sten\.attach\(model, optimizer\)"
    with pytest.warns(UserWarning, match=text) as caught:
        optimizer.step()
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2, first=5)
        if model is not straight:
            assert all(map(torch.equal, before, dense_weights(straight)))
            train(straight, first, 1, first=4)


@every_lost
@pytest.mark.parametrize("lose", [both_copied, both_pickled, new_optimizer, in_a_file])
@pytest.mark.usefixtures("quiet")
def test_attach_continues_a_run_elsewhere(case, lose):
    """A copy, or the same model under a new optimizer with the old one's state, trains as if nothing had happened."""
    method, layout = case
    straight, first, _ = sparse(method, layout, 0.5, "adamw")
    train(straight, first, 4)
    other, old, _ = sparse(method, layout, 0.5, "adamw")
    train(other, old, 4)
    model, optimizer = lose(other, old)
    sten.attach(model, optimizer)
    train(straight, first, 8, first=4)
    train(model, optimizer, 8, first=4)
    assert engine_of(model).step == 12 and engine_of(model).updates == engine_of(straight).updates
    if not isinstance(method, sten.SparseMomentum) or lose is new_optimizer:  # copies have no running averages
        for a, b in zip(dense_weights(straight), dense_weights(model), strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("quiet")
def test_a_wrapper_of_the_optimizer_does_not_warn():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, {})
            self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

        def step(self, closure=None):
            return self.optimizer.step(closure)

    model = mlp()
    optimizer = Wrapper(OPTIMIZERS["sgd"](model.parameters()))
    sten.sparsify(model, CSR(), sten.SET(24, every=3), 0.5, optimizer=optimizer)
    train(model, optimizer, 7)
    assert engine_of(model).updates == 2


@pytest.mark.usefixtures("quiet")
def test_a_copy_that_no_optimizer_steps_does_not_warn():
    model, optimizer, _ = sparse(sten.RigL(24, every=3), CSR())
    average = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, 2)
    other = mlp()
    train(other, OPTIMIZERS["sgd"](other.parameters()), 1)
    del average
