"""Conversions inside torch.inference_mode(): what they make trains outside of it."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import SMALL
from small import batch, mlp, rate

import sten
from sten.layouts import CSR, NM

FORMS = {
    "finalized": lambda model, layout: sten.sparsify(model, layout, sparsity=rate(layout)),
    "trainable": lambda model, layout: sten.trainable(sten.sparsify(model, layout, sparsity=rate(layout))),
    "dense weight": lambda model, layout: sten.sparsify(model, layout, sten.STE(), rate(layout)),
    "densified": lambda model, layout: sten.densify(sten.sparsify(model, layout, sparsity=rate(layout))),
}


def gradients(model) -> list[torch.Tensor]:
    x = batch(0).requires_grad_()
    model(x).square().sum().backward()
    grads = [getattr(p.grad, "to_dense", lambda p=p: p.grad)() for p in model.parameters()]
    torch.optim.SGD(model.parameters(), 0.1).step()
    return [x.grad, *grads, model(x).detach()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_as_outside(layout, form):
    model = mlp()
    outside = FORMS[form](copy.deepcopy(model), layout)
    with torch.inference_mode():
        assert FORMS[form](model, layout) is model and model(batch(0)).is_inference()
    for got, want in zip(gradients(model), gradients(outside), strict=True):
        torch.testing.assert_close(got, want)
    assert not any(t.is_inference() for t in [*model.parameters(), *model.buffers()])


METHODS = [sten.Wanda(), sten.SparseGPT(), sten.chain(sten.Wanda(), sten.Reconstruct(2))]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_calibration(method):
    """Batches that were made in inference mode, too."""
    model = torch.nn.Sequential(mlp())
    outside = copy.deepcopy(model)
    with torch.inference_mode():
        x = [batch(i) for i in range(3)]
        sten.sparsify(model, NM(2, 4), method, calibration=sten.Calibration(x, blocks="0"))
        table = sten.sensitivity(copy.deepcopy(outside), [NM(2, 4), None], x)
    x = sten.Calibration([t.clone() for t in x], blocks="0")
    sten.sparsify(outside, NM(2, 4), method, calibration=x)
    assert len(table.rows) > 1
    for got, want in zip(gradients(model), gradients(outside), strict=True):
        torch.testing.assert_close(got, want)


def test_training_goes_on():
    """Conversions between steps, each inside; the optimizer keeps its state."""
    results = []
    for inside in (False, True):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        acts = [
            lambda m, o: sten.sparsify(m, CSR(), sten.RigL(20, every=1), 0.5, optimizer=o),
            lambda m, o: sten.finalize(m),
            lambda m, o: sten.attach(m, o),
            lambda m, o: sten.permute(sten.densify(m), NM(2, 4), example=batch(0)),
        ]
        for act in acts:
            for i in range(2):
                optimizer.zero_grad()
                model(batch(i)).square().sum().backward()
                optimizer.step()
            with torch.inference_mode(inside):
                act(model, optimizer)
        results.append(gradients(model))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


def test_files(tmp_path):
    saved = sten.sparsify(mlp(), CSR(), sparsity=0.5)
    with torch.inference_mode():
        sten.save(saved, tmp_path / "model.safetensors")
        model = sten.load(mlp(), tmp_path / "model.safetensors")
    other = mlp()
    with torch.inference_mode():
        sten.load(other_one := other, tmp_path / "model.safetensors")
        assert other_one is other
    for got, want in zip(gradients(other), gradients(saved), strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        model(batch(0))


def test_a_model_that_was_made_inside_stays_there():
    with torch.inference_mode():
        model = mlp()
        want = model(batch(0))
        for layout in (CSR(), NM(2, 4)):
            sten.finalize(sten.trainable(sten.sparsify(model, layout, sparsity=rate(layout))))
            assert all(p.is_inference() for p in model.parameters())
            assert model(batch(0)).shape == want.shape
        sten.densify(model)
    with torch.no_grad():
        model(batch(0))
