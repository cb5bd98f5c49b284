"""The warnings of empty rows and of a forgotten `sten.attach`, and the cases without a warning."""

import copy
import warnings

import pytest
import torch
from torch import nn
from training_models import OPTIMIZERS, loss_of, mlp, sparse, train

import sten
from sten.layouts import BSR, CSR, NM, FanIn, Masked, VectorNM
from sten.training.engine import dynamic_weights

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
    assert not any(weight.reminder for weight in dynamic_weights(model))


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
    assert all(weight.reminder for weight in dynamic_weights(model))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sten.attach(model, optimizer)
    assert not any(weight.reminder for weight in dynamic_weights(model))
