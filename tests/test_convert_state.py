"""densify, copies, pickles and state_dicts of both forms, in every direction."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from masked import expect_close, masks, sparse_weights, state
from small import batch, every_layout, loss_of, mlp, rate
from torch import nn

import sten
from sten.layouts import CSR, NM, GroupedNM


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
    """Loaded numbers arrive; a sparse weight stays sparse. A dense model refuses the trainable form by its shapes."""
    model = sten.sparsify(mlp(), layout=layout, sparsity=rate(layout))
    given = in_form(model, source)
    into = in_form(model, target)
    with torch.no_grad():
        for p in into.parameters():
            p.mul_(3)
    if source == "trainable" and target == "dense":
        with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
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
    into = in_form(sten.sparsify(mlp(), layout=sten.NM(2, 4)), form)
    want = state(into)
    with pytest.raises(RuntimeError, match=r"0\.weight: Expected no non-zeros off the pattern"):
        into.load_state_dict(mlp().state_dict())
    expect_close(
        {n: t for n, t in state(into).items() if "weight" in n}, {n: t for n, t in want.items() if "weight" in n}
    )


@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_strict_names_what_is_missing(form):
    into = in_form(sten.sparsify(mlp(), layout=sten.NM(2, 4)), form)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.weight"'):
        into.load_state_dict({k: v for k, v in into.state_dict().items() if not k.startswith("0.weight")})
    into.load_state_dict({}, strict=False)


@pytest.mark.cell("deepcopy")
@pytest.mark.cell("pickle")
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


@pytest.mark.cell("weights_only", layout="GroupedNM")
@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_state_dict_through_a_file(form):
    model = in_form(sten.sparsify(mlp(), layout=GroupedNM(1, 4, 4)), form)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    into = in_form(sten.sparsify(mlp(), layout=GroupedNM(1, 4, 4), sparsifier=sten.Random()), form)
    into.load_state_dict(torch.load(buffer, weights_only=True))
    expect_close(state(into), state(model), 0, 0)


@pytest.mark.cell("EMA", layout="CSR")
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
    model = in_form(sten.sparsify(mlp(), layout=sten.NM(2, 4)), form)
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
    with torch.no_grad():  # a graph that is alive would hold the Parameters, which torch then refuses to swap
        y = model(batch(0))
    torch.testing.assert_close(model.double()(batch(0).double()), y.double(), rtol=1e-4, atol=1e-5)
    assert model.bfloat16()(batch(0).bfloat16()).dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert set(sparse_weights(model)) == {"0.weight", "2.weight"}
